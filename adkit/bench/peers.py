"""Hugging Face's own ways to generate, as peers: each takes the model and a workload and gives a timeline.

``hf``: ``generate`` with its growing cache. ``hf-static-compile``: ``generate`` over a static cache, which transformers
compiles on a GPU. Both take requests in batches, padded on the left; a batch runs to its longest answer, and only the
tokens that were asked for count. ``hf-continuous``: transformers' continuous batching with its own defaults.
A peer that fails is reported with its error and the others go on; one that takes longer than its limit is
stopped, and counted by what it made until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from adkit.bench import machine
from adkit.bench.timeline import Timeline
from adkit.bench.workload import Workload
from adkit.contract import ConfigError, nearest
from adkit.models import ModelFactory

#: Most requests in one batch of ``generate``.
BATCH = 64
Run = Callable[[Workload], Timeline]


def check(names: Sequence[str], known: Sequence[str] | None = None, seconds: float = 1) -> list[str]:
    """The names, when all are peers and may take ``seconds``; ConfigError, with the nearest name, otherwise."""
    known = list(PEERS) if known is None else known
    for name in names:
        if name not in known:
            raise ConfigError(f"no peer {name!r}{nearest(name, known)}")
    if not seconds > 0:
        raise ConfigError(f"peer_seconds is {seconds:g}; give a peer more than 0 seconds, or leave out vs")
    return list(names)


def load_model(factory: ModelFactory, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The Hugging Face model with the same weights as adkit's, widened to ``dtype`` where one is given."""
    model = factory.build()
    if dtype is not None and dtype != factory.dtype:
        model = model.to(dtype)
    model = model.to_empty(device=device)
    state: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state |= dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in factory.load(None, device):
            state[name].copy_(tensor)
    return model


@contextmanager
def peer(name: str, model: Any, load: Workload, limit: float, *, progress: bool) -> Iterator[Run]:
    """A peer made ready for workloads like ``load``; calling it runs one, for at most ``limit`` seconds.

    The call raises TimeoutError where no token came in that time.
    """
    with PEERS[name](model, load, limit, progress) as run:

        def checked(load: Workload) -> Timeline:
            made = run(load)
            if not made.tokens:
                raise TimeoutError(f"no token came in the {limit:g} s that a peer may take (--peer-seconds)")
            return made

        yield checked


def measure(
    names: Sequence[str],
    factory: ModelFactory,
    device: torch.device,
    loads: Sequence[Workload],
    figures: Callable[[Run, Workload], dict[str, Any]],
    *,
    limit: float,
    progress: bool,
    add: Callable[[dict[str, Any]], None],
) -> None:
    """``add`` a row of ``figures`` for every peer and workload; a row with ``error`` where a peer fails."""
    model: Any = None
    for name in names:
        for load in loads:
            machine.free(device)
            machine.reset_peak(device)
            row: dict[str, Any] = {"engine": name, "requests": len(load)}
            try:
                model = model or load_model(factory, device)
                with peer(name, model, load, limit, progress=progress) as run:
                    row |= figures(run, load)
                row["peak_bytes"] = machine.peak_bytes(device)
                if name == "hf-static-compile" and device.type == "cpu":
                    row["note"] = "not compiled: transformers compiles it on a GPU alone"
            except Exception as error:  # whatever another library makes of the model
                row["error"] = told(error)
            add(row)


def told(error: Exception) -> str:
    """An error in one line, not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _generate(
    model: Any, load: Workload, limit: float, progress: bool, options: dict[str, Any]
) -> Iterator[Run]:
    device = model.device
    longest = max(load.news)

    def run(load: Workload) -> Timeline:
        machine.sync(device)
        stamps: list[list[float]] = []
        start = time.perf_counter()
        with tqdm(total=load.new_tokens, unit=" tokens", delay=2, leave=False, disable=not progress) as bar:
            for at in range(0, len(load), BATCH):
                part = Workload(load.prompts[at : at + BATCH], load.news[at : at + BATCH])
                came = _batch(model, part, min(longest, max(part.news)), start + limit, options)
                stamps += [came[:n] for n in part.news]
                bar.update(sum(len(s) for s in stamps[at:]))
        cut = sum(map(len, stamps)) < load.new_tokens
        return Timeline(start, stamps, cut)

    with torch.no_grad():
        yield run


def _batch(model: Any, load: Workload, new: int, deadline: float, options: dict[str, Any]) -> list[float]:
    """When each step's tokens of one batch came; none when the deadline has passed."""
    if time.perf_counter() > deadline:
        return []
    device = model.device
    width = max(map(len, load.prompts))
    ids = torch.zeros(len(load), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(load.prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    stamps: list[float] = []

    def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        machine.sync(device)
        stamps.append(time.perf_counter())
        late = stamps[-1] > deadline
        return torch.full((input_ids.shape[0],), late, dtype=torch.bool, device=input_ids.device)

    model.generate(
        ids.to(device), attention_mask=mask.to(device), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, stopping_criteria=[stop], **options,
    )  # fmt: skip
    return stamps


@contextmanager
def _hf(model: Any, load: Workload, limit: float, progress: bool) -> Iterator[Run]:
    with _generate(model, load, limit, progress, {}) as run:
        yield run


@contextmanager
def _hf_static_compile(model: Any, load: Workload, limit: float, progress: bool) -> Iterator[Run]:
    import torch._dynamo

    try:
        with _generate(model, load, limit, progress, {"cache_implementation": "static"}) as run:
            yield run
    finally:
        torch._dynamo.reset()  # its graphs hold memory


@contextmanager
def _hf_continuous(model: Any, load: Workload, limit: float, progress: bool) -> Iterator[Run]:
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    hints = WorkloadHints(
        max_prompt_length=max(map(len, load.prompts)),
        max_generated_length=max(load.news),
        num_requests=len(load),
    )
    # An eos of -1 never comes, so every request makes all its tokens.
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max(load.news))
    settings = ContinuousBatchingConfig()
    if model.device.type == "cpu":  # the default would take most of the machine's memory
        settings.num_blocks = sum(
            (len(p) + n) // 256 + 2 for p, n in zip(load.prompts, load.news, strict=True)
        )
        settings.max_batch_tokens = max(load.prompt_tokens, 256)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, workload_hints=hints, timeout=5
    ) as manager:

        def run(load: Workload) -> Timeline:
            start = time.perf_counter()
            names = [
                manager.add_request(prompt, max_new_tokens=new, record_timestamps=True, eos_token_id=-1)
                for prompt, new in zip(load.prompts, load.news, strict=True)
            ]
            came: dict[str, list[float]] = {}
            with tqdm(total=len(load), unit=" requests", delay=2, leave=False, disable=not progress) as bar:
                while len(came) < len(names) and time.perf_counter() - start < limit:
                    result = manager.get_result(timeout=1)
                    if result is None:
                        if not manager.is_running():
                            raise RuntimeError("transformers' generation thread ended unexpectedly")
                    elif result.error is not None:
                        raise RuntimeError(result.error)
                    elif result.is_finished():
                        came[result.request_id] = _arrivals(result)
                        bar.update()
            cut = len(came) < len(names)
            if cut:
                came |= _unfinished(manager)
                for name in names:
                    manager.cancel_request(name)
            return Timeline(start, [came.get(name, []) for name in names], cut)

        yield run


def _arrivals(result: Any) -> list[float]:
    """When a request's tokens came.

    Of those made before it was pushed out and taken up again only their number is known.
    """
    stamps = list(result.timestamps or ())
    unknown = len(result.generated_tokens) - len(stamps)
    return stamps[:1] * unknown + stamps


def _unfinished(manager: Any) -> dict[str, list[float]]:
    """Arrivals of the requests that are under way, which nothing public of transformers tells."""
    scheduler = manager.batch_processor.scheduler
    states = [*scheduler.active_requests.values(), *scheduler.waiting_requests.values()]
    return {s.request_id: _arrivals(s.to_generation_output()) for s in states}


PEERS: dict[str, Callable[[Any, Workload, float, bool], Any]] = {
    "hf": _hf,
    "hf-static-compile": _hf_static_compile,
    "hf-continuous": _hf_continuous,
}
