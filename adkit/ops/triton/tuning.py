"""Which launch settings of a kernel are fastest here: measured once a machine, remembered on disk.

Settings are plain dicts, block sizes with ``num_warps`` and ``num_stages``. Where nothing can be measured (the
interpreter, a CUDA graph being captured, ``ADKIT_TUNE=0`` for a quick start) and nothing is remembered, the first
candidate runs: put the one that is best in general there. Results measured on some devices come with adkit
(``tuned/``); what is measured here is kept in ``$ADKIT_CACHE_DIR`` (default ``~/.cache/adkit``) and goes before them.
To ship what one machine has found, copy its file from there to ``tuned/``; linears of one row are better measured in
their place first (``benchmarks/kernels/decode_chain.py --tune``).

Kernels of a few microseconds cannot be timed one launch at a time, and not with their data in cache: many
launches are captured in a CUDA graph, over copies of what would come from memory (``streamed``).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

Settings = dict[str, Any]

#: Launches that are timed together: so many, fewer once they take long.
_LAUNCHES, _LONG = 24, 5e-3
_REPLAYS = 4
#: Times closer than this are a tie, and the earlier candidate goes: noise must not choose.
_TIE = 1.02

_found: dict[tuple[str, tuple[Hashable, ...]], Settings] = {}


def best(
    kernel: str,
    key: tuple[Hashable, ...],
    candidates: Sequence[Settings],
    run: Callable[..., Any],
    streamed: Sequence[Tensor] = (),
) -> Settings:
    """The settings among ``candidates`` that run ``kernel`` fastest for ``key``.

    ``key`` is all that the choice depends on: widths, dtypes as strings, and open sizes rounded up to a power
    of two, so that few are measured. ``run(settings, *streamed)`` launches once and can be called again and
    again, on copies of ``streamed`` too: weights, which other layers drive out of the cache between two uses.
    Settings that do not compile are left out. Raises the last one's error when none does.
    """
    known = _found.get((kernel, key))
    if known is None:
        known = _find(kernel, key, list(candidates), run, streamed)
    return known


def _find(
    kernel: str,
    key: tuple[Hashable, ...],
    candidates: list[Settings],
    run: Callable[..., Any],
    streamed: Sequence[Tensor],
) -> Settings:
    if triton.knobs.runtime.interpret or len(candidates) == 1:
        return _found.setdefault((kernel, key), candidates[0])
    name = _name(kernel, key)
    for remembered in (_read(_local_file()), _read(_packaged_file())):
        if remembered.get(name) in candidates:
            return _found.setdefault((kernel, key), remembered[name])
    if torch.cuda.is_current_stream_capturing() or os.environ.get("ADKIT_TUNE") == "0":
        return candidates[0]
    times = measure(candidates, run, streamed)
    chosen = next(c for c, t in zip(candidates, times, strict=True) if t <= _TIE * min(times))
    keep(kernel, key, chosen)
    return chosen


def keep(kernel: str, key: tuple[Hashable, ...], chosen: Settings) -> None:
    """Use these settings from here on, and in later processes on this machine."""
    _found[kernel, key] = chosen
    _remember(_name(kernel, key), chosen)


def _name(kernel: str, key: tuple[Hashable, ...]) -> str:
    return f"{kernel} {' '.join(map(str, key))}"


def measure(
    candidates: Sequence[Settings], run: Callable[..., Any], streamed: Sequence[Tensor] = ()
) -> list[float]:
    """Seconds of one launch with each of the settings; infinite for those that do not compile.

    Raises the last one's error when none does.
    """
    _compile(candidates, run, streamed)
    copies = _copies(streamed)
    times: list[float] = []
    failure: Exception | None = None
    for settings in candidates:
        try:
            run(settings, *streamed)
            times.append(seconds([partial(run, settings, *copy) for copy in copies]))
        except triton.errors.TritonError as error:
            failure = error
            times.append(math.inf)
    if failure is not None and min(times) == math.inf:
        raise failure
    return times


def _compile(candidates: Sequence[Settings], run: Callable[..., Any], streamed: Sequence[Tensor]) -> None:
    """Launch each of the settings once, side by side: most of what compiling takes leaves the interpreter to others.

    All on the stream that is current here, whose order keeps launches apart.
    """
    stream = torch.cuda.current_stream() if torch.cuda.is_available() else None

    def launch(settings: Settings) -> None:
        with torch.cuda.stream(stream), torch.inference_mode():
            run(settings, *streamed)

    with ThreadPoolExecutor(max(1, min(len(candidates), os.cpu_count() or 1))) as threads:
        for done in [threads.submit(launch, settings) for settings in candidates]:
            done.exception()  # what fails here fails again where it is measured, and is told there


def _copies(streamed: Sequence[Tensor]) -> list[list[Tensor]]:
    """Enough of them that using all in turn leaves none in cache, the originals first; fewer where memory lacks."""
    copies = [list(streamed)]
    size = sum(t.nbytes for t in streamed)
    wanted = math.ceil(2 * _cache_bytes() / size) if size else 1
    try:
        while len(copies) < min(wanted, _LAUNCHES):
            copies.append([torch.clone(t) for t in streamed])
    except torch.cuda.OutOfMemoryError:
        pass
    return copies


def seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Device seconds of one call, the calls made in turn, captured together in a CUDA graph."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(work: Callable[[], Any]) -> float:
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        calls[0]()  # libraries settle on workspaces
        launches = max(2, min(_LAUNCHES, math.ceil(_LONG / timed(calls[0]))))
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(launches):
                calls[i % len(calls)]()
        finally:
            graph.capture_end()
        best = min(timed(graph.replay) for _ in range(_REPLAYS))
    current.wait_stream(stream)
    return best / launches


def _cache_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def _device() -> str:
    name = torch.cuda.get_device_name().replace(" ", "_").replace("/", "_")
    return f"{name}-triton_{'.'.join(triton.__version__.split('.')[:2])}.json"


def _local_file() -> Path:
    root = os.environ.get("ADKIT_CACHE_DIR") or Path.home() / ".cache" / "adkit"
    return Path(root) / "tuned" / _device()


def _packaged_file() -> Path:
    return Path(__file__).parent / "tuned" / _device()


@lru_cache
def _read(path: Path) -> dict[str, Settings]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # absent, or cut short by a crash: measured again
        return {}
    return content if isinstance(content, dict) else {}


def _remember(name: str, settings: Settings) -> None:
    """Add to the file of this machine; a folder that cannot be written is no reason to stop."""
    path = _local_file()
    _read.cache_clear()
    content = _read(path) | {name: settings}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(content, file, indent=0, sort_keys=True)
        os.replace(file.name, path)
    except OSError:
        pass
    _read.cache_clear()
