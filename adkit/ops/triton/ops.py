"""The ``triton_*`` ops: schema and meaning of their ``torch_*`` twins, run by a kernel where one can run.

Nothing here imports triton: a kernel's module is imported when its op first runs on CUDA, or anywhere under
``TRITON_INTERPRET=1``. Elsewhere the op runs its reference, and says so once.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from typing import Any

from torch import Tensor

from adkit.graph.cost import COSTS
from adkit.ops.registry import OPS, define

_warned: set[str] = set()


def kernels_can_run(on_cuda: bool) -> bool:
    """True where a Triton kernel can run: on CUDA with triton installed, or anywhere in its interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1" and not on_cuda:
        return False
    return importlib.util.find_spec("triton") is not None


def _twin(reference: str, module: str) -> None:
    """Define ``triton_<x>`` after ``torch_<x>``; its launcher is the function ``<x>`` of ``module``."""
    info = OPS[reference]
    launcher = reference.removeprefix("torch_")

    def run(*args: Any, **kwargs: Any) -> Any:
        if kernels_can_run(any(isinstance(a, Tensor) and a.is_cuda for a in args)):
            return getattr(importlib.import_module(f"adkit.ops.triton.{module}"), launcher)(*args, **kwargs)
        if launcher not in _warned:
            _warned.add(launcher)
            warnings.warn(
                f"triton_{launcher} runs as {reference}: no CUDA device with triton here "
                "(TRITON_INTERPRET=1, set before triton is imported, runs the kernel on the CPU)",
                RuntimeWarning,
                stacklevel=2,
            )
        return info.reference(*args, **kwargs)

    run.__doc__ = f"{reference} as a Triton kernel.\n\n{info.doc}"
    schema = f"triton_{launcher}{info.schema[len(reference) :]}"
    cost = COSTS.get(f"adkit.{reference}")
    define(schema, category=info.category, token_local=info.token_local, fake=info.fake, cost=cost)(run)


_twin("torch_rmsnorm", "norm")
_twin("torch_fused_add_rmsnorm", "norm")
_twin("torch_swiglu_packed", "mlp")
_twin("torch_rope_with_explicit_cos_sin", "rope")
_twin("torch_rope_with_qk_interleaving", "rope")
_twin("torch_attention_with_paged_cache", "attention")
