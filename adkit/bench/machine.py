"""What the machine is and what it can do at best: the measured ceilings that figures are shares of."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

_TRIES = 8


@dataclass(frozen=True)
class Ceilings:
    """Measured best rates of a device: ``copy`` bytes/s (read and written both counted), ``matmul`` FLOP/s."""

    copy: float
    matmul: float


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure both; takes under a second and, on a GPU, 4 GiB of its memory for that long."""
    found = Ceilings(copy_rate(device), matmul_rate(device, dtype))
    free(device)
    return found


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy on the device (2 GiB on a GPU), read and written both counted."""
    source = torch.empty(2 << 30 if device.type == "cuda" else 64 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source.random_())
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of one square matmul in ``dtype`` (8192^3 on a GPU)."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _median_seconds(lambda: torch.mm(a, b, out=out), device)


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_TRIES):
        sync(device)
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            sync(device)
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
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
