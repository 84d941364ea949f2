"""The ``triton_*`` ops: schema and meaning of their ``torch_*`` twins, run by a kernel where one can run.

Nothing here imports triton: a kernel's module is imported when its op first runs on CUDA, or anywhere under
``TRITON_INTERPRET=1``. Elsewhere, and where a kernel does not compile for what it was given, the op runs its
reference, and says so once.
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
_refused: dict[tuple[Any, ...], str] = {}


def kernels_can_run(on_cuda: bool) -> bool:
    """True where a Triton kernel can run: on CUDA with triton installed, or anywhere in its interpreter."""
    if os.environ.get("TRITON_INTERPRET") != "1" and not on_cuda:
        return False
    return importlib.util.find_spec("triton") is not None


def fallen_back() -> set[str]:
    """The ``triton_*`` ops that have run as their reference because their kernel did not compile."""
    return {key[0] for key in _refused}


def _kind(launcher: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What compiling depends on: dtypes, widths and constants."""
    kinds = tuple((a.dtype, a.ndim, a.shape[-1:]) if isinstance(a, Tensor) else repr(a) for a in args)
    return (f"triton_{launcher}", kinds, repr(kwargs))


def attempt(launcher: str, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the kernel gives; NotImplemented where it does not compile for arguments of this kind."""
    from triton.errors import TritonError

    if _refused and _kind(launcher, args, kwargs) in _refused:
        return NotImplemented
    try:
        return getattr(importlib.import_module(f"adkit.ops.triton.{module}"), launcher)(*args, **kwargs)
    except TritonError as error:
        shapes = ", ".join(f"{a.dtype} {list(a.shape)}" for a in args if isinstance(a, Tensor))
        if f"triton_{launcher}" not in fallen_back():
            warnings.warn(
                f"triton_{launcher} did not compile for {shapes}, and runs as its reference from here on "
                f"({type(error).__name__}: {error})",
                RuntimeWarning,
                stacklevel=3,
            )
        _refused[_kind(launcher, args, kwargs)] = shapes
        return NotImplemented


def _twin(reference: str, module: str) -> None:
    """Define ``triton_<x>`` after ``torch_<x>``; its launcher is the function ``<x>`` of ``module``."""
    info = OPS[reference]
    launcher = reference.removeprefix("torch_")

    def run(*args: Any, **kwargs: Any) -> Any:
        if kernels_can_run(any(isinstance(a, Tensor) and a.is_cuda for a in args)):
            result = attempt(launcher, module, args, kwargs)
            return info.reference(*args, **kwargs) if result is NotImplemented else result
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
_twin("torch_rope_kv_cache", "rope_cache")
_twin("torch_attention_with_paged_cache", "attention")
_twin("torch_moe", "moe")
_twin("torch_moe_topk", "moe_topk")
_twin("torch_fused_linear", "linear")
_twin("torch_fused_linear_", "linear")
