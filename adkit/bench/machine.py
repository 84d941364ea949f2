"""What the machine is and what it can do at best: the measured ceilings that figures are shares of."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import transformers

_TRIES = 8
_LEAST_SECONDS = 0.25  # of trying on a CPU, where a small thing is done thousands of times a second
_MOST_READ = 1 << 30


@dataclass(frozen=True)
class Ceilings:
    """Measured best rates of a device: ``memory`` bytes/s, ``matmul`` FLOP/s.

    ``access``: what the memory's rate was measured by. A GPU's is that of a large ``copy``, read and written both
    counted. A CPU's is that of a ``read`` of as many bytes as the model's weights have: they may lie in its caches,
    from where they come several times faster than a copy of anything goes.
    """

    memory: float
    matmul: float
    access: Literal["copy", "read"] = "copy"


def ceilings(device: torch.device, dtype: torch.dtype, weight_bytes: float) -> Ceilings:
    """Measure both, for a model with so many bytes of weights; takes about a second and, on a GPU, 4 GiB of its memory
    for that long (on a CPU 1 GiB at most)."""
    if device.type == "cuda":
        found = Ceilings(copy_rate(device), matmul_rate(device, dtype))
    else:
        found = Ceilings(read_rate(weight_bytes), matmul_rate(device, dtype), "read")
    free(device)
    return found


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy on a GPU (2 GiB), read and written both counted."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source.random_())
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device)


def read_rate(nbytes: float) -> float:
    """Bytes a second at which a CPU reads so many again and again (at most 1 GiB): the better of a sum and a
    matrix-vector product, with as many threads as torch has."""
    device, columns = torch.device("cpu"), 1024
    # Ones, as the pages of fresh zeros are all the same one.
    matrix = torch.ones(max(1, int(min(nbytes, _MOST_READ)) // (4 * columns)), columns)
    vector, out = torch.ones(columns), torch.empty(len(matrix))
    ways = (matrix.sum, lambda: torch.mv(matrix, vector, out=out))
    return 4 * matrix.numel() / min(_seconds(way, device) for way in ways)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of one square matmul in ``dtype`` (8192^3 on a GPU)."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long it takes: on a GPU the median of some tries, on a CPU, which others use too, the shortest."""
    times: list[float] = []
    if device.type != "cuda":
        while len(times) < _TRIES or sum(times) < _LEAST_SECONDS:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)
    for _ in range(_TRIES):
        sync(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        sync(device)
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def describe(device: torch.device) -> str:
    """The device in words; no host name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    import adkit

    found = {
        "adkit": adkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:  # there is none for this platform
        pass
    return found


def sync(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give memory that nobody uses any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Start counting the most memory in use afresh."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most bytes in use on a GPU since :func:`reset_peak`; None on a CPU, where nobody counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
