"""Which launch settings of a kernel are fastest here: measured once a machine, remembered on disk.

Settings are plain dicts, block sizes with ``num_warps`` and ``num_stages``. Where nothing can be measured (the
interpreter, a CUDA graph being captured) and nothing is remembered, the first candidate runs: put the one
that is best in general there. Results measured on some devices come with adkit (``tuned/``); what is measured
here is kept in ``$ADKIT_CACHE_DIR`` (default ``~/.cache/adkit``) and goes before them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

Settings = dict[str, Any]

_found: dict[tuple[str, tuple[Hashable, ...]], Settings] = {}


def best(
    kernel: str, key: tuple[Hashable, ...], candidates: Sequence[Settings], run: Callable[[Settings], Any]
) -> Settings:
    """The settings among ``candidates`` that run ``kernel`` fastest for ``key``.

    ``key`` is all that the choice depends on: widths, dtypes as strings, and open sizes rounded up to a power
    of two, so that few are measured. ``run`` launches once with given settings and can be called again and
    again; settings that do not compile are left out. Raises the last one's error when none does.
    """
    known = _found.get((kernel, key))
    if known is None:
        known = _find(kernel, key, list(candidates), run)
    return known


def _find(
    kernel: str, key: tuple[Hashable, ...], candidates: list[Settings], run: Callable[[Settings], Any]
) -> Settings:
    if triton.knobs.runtime.interpret or len(candidates) == 1:
        return _found.setdefault((kernel, key), candidates[0])
    name = f"{kernel} {' '.join(map(str, key))}"
    for remembered in (_read(_local_file()), _read(_packaged_file())):
        if remembered.get(name) in candidates:
            return _found.setdefault((kernel, key), remembered[name])
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    chosen = _measure(candidates, run)
    _found[kernel, key] = chosen
    _remember(name, chosen)
    return chosen


def _measure(candidates: list[Settings], run: Callable[[Settings], Any]) -> Settings:
    times: list[tuple[float, int]] = []
    failure: Exception | None = None
    for i, settings in enumerate(candidates):
        try:
            run(settings)
            times.append(
                (
                    triton.testing.do_bench(
                        lambda s=settings: run(s), warmup=3, rep=15, return_mode="median"
                    ),
                    i,
                )
            )
        except triton.errors.TritonError as error:
            failure = error
    if not times:
        assert failure is not None
        raise failure
    return candidates[min(times)[1]]


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
        return json.loads(path.read_text())
    except (OSError, ValueError):  # absent, or cut short by a crash: measured again
        return {}


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
