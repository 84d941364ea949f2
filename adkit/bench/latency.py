"""Decode latency: a batch of equal requests, all there at once, beside Hugging Face in the same process.

Decode rate = tokens after the first / (last token - first token), see ``timeline``. Bandwidth share = weight bytes
that a step reads (``work``) * steps/s over the measured rate of the device's memory: of a copy on a GPU, of reading so
many bytes on a CPU (``machine``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tqdm.auto import tqdm

from adkit.bench import peers
from adkit.bench.machine import peak_bytes
from adkit.bench.results import Result, Row, heading, line, result_of
from adkit.bench.subject import Subject, ranks_of
from adkit.bench.timeline import latency_figures
from adkit.bench.workload import LENGTHS, Lengths, Room, Workload, make_workload
from adkit.config import Fragment, load_config
from adkit.contract import ConfigError

WARM_UPS, REPEATS = 2, 3


def measure(
    model: Any,
    *,
    batches: Sequence[int] = (1,),
    prompt: int | None = None,
    new: int | None = None,
    vs: Sequence[str] = (),
    seed: int = 0,
    peer_seconds: float = 120,
    config: Sequence[Fragment] = (),
    overrides: Sequence[str] = (),
    random_weights: bool = False,
    tp: int | None = None,
    attention_dp: bool = False,
    command: str = "",
    progress: bool = True,
    show: Callable[[str], None] = print,
    keep: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Figures of ``model`` at each batch size, medians of three runs.

    Weights are random where it has none or ``random_weights`` asks for them. ``tp`` and ``attention_dp``: see
    ``subject``. ``prompt`` and ``new``: tokens (default: 128 of both, or as many as there is room for).
    The batch goes in as one step of prompts unless settings say otherwise. ``keep`` is given
    the result after every row. Returns plain data, see ``results``. Raises ConfigError for sizes and peers that
    cannot be.
    """
    names = peers.check(vs, seconds=peer_seconds)
    if not batches or min(batches) < 1:
        raise ConfigError(f"batch is {list(batches)}; give sizes of at least 1")
    for what, size, least in (("prompt", prompt, 1), ("new", new, 2)):
        if size is not None and size < least:
            raise ConfigError(f"{what} is {size}; a rate needs {least} tokens at least")
    prompt, new = Room.of(model, config, overrides).fit(prompt, new, LENGTHS, show, least_new=2)
    most = max(batches)
    at_once = load_config([{"max_batch_size": most}, *config], overrides).max_batch_size
    if at_once < most:
        raise ConfigError(
            f"batch {most} is to decode at once, and max_batch_size is {at_once}; ask for smaller batches or raise it"
        )
    ranks = (
        ranks_of(tp) if attention_dp else 1
    )  # each takes a share of these sizes, and may get a sequence more
    defaults = {
        "max_batch_size": most,
        "max_seq_len": prompt + new,
        "max_num_tokens": max(prompt * -(-most // ranks) * ranks, 512),
    }
    subject = Subject(
        model, defaults, config=config, overrides=overrides, random_weights=random_weights, tp=tp,
        attention_dp=attention_dp,
    )  # fmt: skip
    subject.build()
    whole = make_workload(most, Lengths(prompt, prompt), Lengths(new, new), subject.vocab, seed)
    loads = [whole.first(b) for b in batches]
    title = f"decode latency of {subject.factory.name}, prompt {prompt}, {new} new tokens"
    sizes = {"batches": list(batches), "prompt": prompt, "new": new, "seed": seed, "repeats": REPEATS}
    result = result_of(subject, "latency", title, sizes, command)

    show(heading(result))

    def add(row: Row) -> None:
        result["rows"].append(row)
        show(line(row))
        keep(result)

    def figures(run: Callable[[Workload], Any], load: Workload) -> Row:
        runs = tqdm(
            range(WARM_UPS + REPEATS), desc=f"batch {len(load)}", unit=" runs", delay=2, leave=False,
            disable=not progress,
        )  # fmt: skip
        row = latency_figures([run(load) for _ in runs][WARM_UPS:])
        weights = subject.work.weight_bytes(len(load)) * float(str(row["steps_per_second"]))
        row[f"{subject.ceilings.access}_bandwidth_share"] = round(weights / subject.ceilings.memory, 3)
        return row

    for load in loads:
        row: Row = {**subject.name, "requests": len(load)}
        row |= figures(lambda load: subject.run(load, progress=progress)[0], load)
        row["peak_bytes"] = peak_bytes(subject.device)
        add(row)
    subject.close()
    peers.measure(
        names, subject.factory, subject.device, loads, figures, limit=peer_seconds, progress=progress,
        add=add,
    )  # fmt: skip
    return result
