"""Canonical linear layers: the plain one, and one with what stands before and after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adkit.ops import costs
from adkit.ops.mlp import torch_swiglu_packed
from adkit.ops.norm import torch_rmsnorm
from adkit.ops.registry import define


def product(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``F.linear`` whose sums, made in float32, are rounded to ``out_dtype``: [..., D] -> [..., F].

    Where no library rounds so (CPUs), the weight is widened a piece at a time.
    """
    if out_dtype is None or out_dtype == input.dtype:
        return F.linear(input, weight, bias)
    if input.is_cuda:
        rows = input.reshape(-1, input.shape[-1])
        out = torch.mm(rows, weight.t(), out_dtype=out_dtype).view(*input.shape[:-1], weight.shape[0])
    else:
        wide = input.to(out_dtype)
        pieces = weight.split(max(1, _PIECE // weight.shape[1]))
        out = torch.cat([F.linear(wide, piece.to(out_dtype)) for piece in pieces], -1)
    return out if bias is None else out.add_(bias)


#: Numbers of a weight that are widened at a time: few enough for a cache.
_PIECE = 1 << 21


@define(
    "torch_linear_simple(Tensor input, Tensor weight, Tensor? bias=None, *, ScalarType? out_dtype=None, "
    'str tp_mode="none", int[]? output_sizes=None, int tp_min_local_shape=1, str layer_type="unknown") -> Tensor',
    category="linear",
    token_local=True,
    fake=lambda input, weight, bias=None, *, out_dtype=None, **_: input.new_empty(
        (*input.shape[:-1], weight.shape[0]), dtype=out_dtype
    ),
    cost=costs.linear,
)
def torch_linear_simple(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    tp_mode: str = "none",
    output_sizes: Sequence[int] | None = None,
    tp_min_local_shape: int = 1,
    layer_type: str = "unknown",
) -> Tensor:
    """input [..., D], weight [F, D], bias [F] -> [..., F], in input's dtype or rounded to ``out_dtype`` at once.

    The rest are sharding hints (``ops/hints.py``) and change nothing: ``tp_mode`` colwise cuts F (each block of
    ``output_sizes``; no piece below ``tp_min_local_shape``), rowwise cuts D, gather cuts F and joins the outputs.
    """
    return product(input, weight, bias, out_dtype)


def _fake_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    act: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    outs = weight.shape[0] if act is None else weight.shape[0] // 2
    shape = (*input.shape[:-1], outs)
    return input.new_empty(shape, dtype=fused_dtype(weight, residual, out_dtype))


def fused_dtype(weight: Tensor, residual: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of ``torch_fused_linear``'s output."""
    if out_dtype is not None or residual is None:
        return out_dtype or weight.dtype
    return torch.promote_types(weight.dtype, residual.dtype)


@define(
    "torch_fused_linear(Tensor input, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, "
    "Tensor? residual=None, float? eps=None, float weight_offset=0.0, bool weight_in_float=False, "
    "str? act=None, ScalarType? out_dtype=None) -> Tensor",
    category="linear",
    token_local=True,
    fake=_fake_fused,
    cost=costs.fused_linear,
)
def torch_fused_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    act: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer with the norm before it and the gate or the residual sum after it.

    input [..., D], weight [F, D], bias [F], residual [..., F] -> [..., F]: residual + linear(norm(input)).
    ``eps`` asks for ``torch_rmsnorm`` of the input (``norm_weight`` None: scale-free); ``act`` for
    ``torch_swiglu_packed`` of the product, which halves the last dimension, before the residual is added.

    The norm's input may be wider than the weight, to whose dtype its output is rounded. The output has the widest dtype
    of weight and residual, or ``out_dtype``.
    """
    if eps is not None:
        input = torch_rmsnorm(input, norm_weight, eps, weight_offset, weight_in_float, weight.dtype)
    dtype = fused_dtype(weight, residual, out_dtype)
    out = product(input, weight, bias, dtype)
    if act is not None:
        out = torch_swiglu_packed(out, act)
    return out if residual is None else (out + residual).to(dtype)


@define(
    "torch_fused_linear_(Tensor(a!) residual, Tensor input, Tensor weight, Tensor? bias=None, "
    "Tensor? norm_weight=None, float? eps=None, float weight_offset=0.0, bool weight_in_float=False, "
    "str? act=None) -> ()",
    category="linear",
    token_local=True,
    fake=lambda *_, **__: None,
    cost=costs.fused_linear,
)
def torch_fused_linear_(
    residual: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    act: str | None = None,
) -> None:
    """``torch_fused_linear`` added to ``residual`` [..., F] where it lies, rounded to its dtype."""
    around = (eps, weight_offset, weight_in_float, act, residual.dtype)
    residual.copy_(torch_fused_linear(input, weight, bias, norm_weight, residual, *around))
