"""Which op serves a canonical one on a backend."""

from __future__ import annotations

from typing import Any

import torch

from adkit.contract import ConfigError, nearest
from adkit.ops.registry import OPS


def pick(op: str, backend: str = "auto", device: torch.device | str | None = None) -> Any:
    """The overload of ``op`` (its name without a backend, as ``rmsnorm``) on ``backend``.

    ``auto``: triton where the device is CUDA (no device: where there is one) and the op has such a kernel,
    else torch. Raises ConfigError naming what exists for an unknown op or a backend it does not have.
    """
    found = {info.backend for name, info in OPS.items() if name == f"{info.backend}_{op}"}
    if not found:
        known = {name.removeprefix(f"{info.backend}_") for name, info in OPS.items()}
        raise ConfigError(f"no op is called {op!r}{nearest(op, known)}")
    if backend == "auto":
        cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
        backend = "triton" if cuda and "triton" in found else "torch"
    if backend not in found:
        raise ConfigError(f"op {op!r} has no backend {backend!r}{nearest(backend, found | {'auto'})}")
    return OPS[f"{backend}_{op}"].overload
