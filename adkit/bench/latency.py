"""Decode latency of a compiled model, beside Hugging Face in the same process.

Decode rate = batch * (new tokens - 1) / (last token - first token). Bandwidth share = weight bytes read a token
(embedding table excluded, a tied lm_head included) * steps/s over the measured copy rate of the device.
"""

from __future__ import annotations

import gc
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from adkit.contract import ConfigError, SamplingParams, nearest
from adkit.graph.snapshot import Snapshot
from adkit.workbench import Workbench

PEERS = ("hf", "hf-static-compile")
REPEATS = 3


def measure(
    model: Any,
    *,
    batches: Sequence[int] = (1,),
    prompt: int = 128,
    new: int = 128,
    peers: Sequence[str] = (),
    overrides: Sequence[str] = (),
    show: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Figures of ``model`` (random weights where it has none) at each batch size, median of three runs.

    Returns plain data: tokens/s, seconds to the first token, seconds a step at the median and the 99th percentile,
    peak bytes, and on a GPU the share of the copy bandwidth; the same of each peer.
    """
    for peer in peers:
        if peer not in PEERS:
            raise ConfigError(f"no peer {peer!r}{nearest(peer, PEERS)}")
    most = max(batches)
    wb = Workbench(
        model,
        overrides=overrides,
        max_batch_size=most,
        max_seq_len=prompt + new,
        max_num_tokens=max(prompt * most, 512),
    )
    if wb.factory.weights == "none":
        wb = Workbench(
            model,
            overrides=overrides,
            random_weights=True,
            max_batch_size=most,
            max_seq_len=prompt + new,
            max_num_tokens=max(prompt * most, 512),
        )
    llm = wb.llm()
    device = wb.device
    read = bytes_a_step(wb.graph)
    copy = copy_rate(device) if device.type == "cuda" else None
    rows = []
    generator = torch.Generator().manual_seed(0)
    vocab = wb.factory.config.get_text_config(decoder=True).vocab_size
    prompts = torch.randint(vocab, (most, prompt), generator=generator)
    for batch in batches:
        row = _summary(
            "adkit", batch, new, [_adkit(llm, prompts[:batch].tolist(), new) for _ in range(1 + REPEATS)][1:]
        )
        if copy:
            row["copy_bandwidth_share"] = round(read * row["steps_per_second"] / copy, 3)
        rows.append(row)
        show(_line(row))
    backend = wb.steps["compile_model"].info.details
    del llm
    result: dict[str, Any] = {
        "what": f"decode latency of {wb.name}, prompt {prompt}, {new} new tokens",
        "machine": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "dtype": str(wb.factory.dtype),
        "weight_bytes_read": read,
        "copy_bytes_per_second": copy,
        "compile": backend,
        "rows": rows,
    }
    if peers:
        factory = wb.factory
        del wb
        gc.collect()
        rows += _peers(factory, device, peers, prompts, batches, new, show)
    return result


def _adkit(llm: Any, prompts: list[list[int]], new: int) -> tuple[float, list[float]]:
    """(seconds to the first token of all, seconds of each later step)."""
    engine = llm.engine
    engine.reset()  # forget cached prefixes: every run does the same work
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    _sync()
    start = time.perf_counter()
    handles = [engine.add(p, params) for p in prompts]
    while any(h.num_output == 0 for h in handles):
        engine.step()
    first = time.perf_counter()
    stamps = [first]
    while engine.has_work:
        engine.step()
        stamps.append(time.perf_counter())
    return first - start, [b - a for a, b in itertools.pairwise(stamps)]


def _peers(
    factory: Any,
    device: torch.device,
    peers: Sequence[str],
    prompts: torch.Tensor,
    batches: Sequence[int],
    new: int,
    show: Callable[[str], None],
) -> list[dict[str, Any]]:
    model = factory.build().to_empty(device=device)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    with torch.no_grad():
        for name, tensor in factory.load(None, device):
            state[name].copy_(tensor)
    rows = []
    for peer in peers:
        static = {"cache_implementation": "static"} if peer == "hf-static-compile" else {}
        for batch in batches:
            runs = [_hf(model, prompts[:batch].to(device), new, static) for _ in range(2 + REPEATS)][2:]
            rows.append(_summary(peer, batch, new, runs))
            show(_line(rows[-1]))
    return rows


def _hf(model: Any, ids: torch.Tensor, new: int, options: dict[str, Any]) -> tuple[float, list[float]]:
    stamps: list[float] = []

    def stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        _sync()
        stamps.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    _sync()
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            stopping_criteria=[stop],
            **options,
        )
    return stamps[0] - start, [b - a for a, b in itertools.pairwise(stamps)]


def _summary(name: str, batch: int, new: int, runs: list[tuple[float, list[float]]]) -> dict[str, Any]:
    rate = statistics.median(len(steps) / sum(steps) for _, steps in runs)
    steps = sorted(s for _, run in runs for s in run)
    return {
        "engine": name,
        "batch": batch,
        "tokens_per_second": round(batch * rate, 1),
        "steps_per_second": round(rate, 2),
        "first_token_seconds": round(statistics.median(t for t, _ in runs), 5),
        "step_seconds_p50": round(steps[len(steps) // 2], 6),
        "step_seconds_p99": round(steps[int(len(steps) * 0.99)], 6),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def _line(row: dict[str, Any]) -> str:
    share = f", {row['copy_bandwidth_share']:.0%} of copy bandwidth" if "copy_bandwidth_share" in row else ""
    return (
        f"{row['engine']:<18} batch {row['batch']:>3}: {row['tokens_per_second']:>9.1f} tokens/s, "
        f"step {row['step_seconds_p50'] * 1e3:.2f} ms, first token {row['first_token_seconds'] * 1e3:.1f} ms{share}"
    )


def bytes_a_step(graph: Snapshot) -> int:
    """Weight bytes a decode step reads: every tensor once, a table that is only looked up in left out."""
    read: dict[str, int] = {}
    for n in graph:
        for i in n.inputs():
            source = graph[i]
            if source.op == "get_attr" and n.target_name != "aten.embedding":
                read[source.target] = source.val.numel() * source.val.dtype.itemsize
    return sum(read.values())


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, read and written both counted."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        target.copy_(source)
        b.record()
        torch.cuda.synchronize(device)
        times.append(a.elapsed_time(b) / 1e3)
    return 2 * source.numel() / statistics.median(times)


def _sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
