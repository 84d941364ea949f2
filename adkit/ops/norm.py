"""Canonical norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adkit.ops import costs
from adkit.ops.registry import define


def _fake(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input.new_empty(input.shape)


def fake_rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Shape and dtype of ``torch_rmsnorm``'s output."""
    promoted = (
        input.dtype if weight is None or weight_in_float else torch.promote_types(input.dtype, weight.dtype)
    )
    return input.new_empty(input.shape, dtype=out_dtype or promoted)


def fake_add_rms(input: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Shapes and dtypes of ``torch_fused_add_rmsnorm``'s outputs."""
    shape = torch.broadcast_shapes(input.shape, residual.shape)
    total = input.new_empty(shape, dtype=torch.promote_types(input.dtype, residual.dtype))
    return fake_rmsnorm(total, *args, **kwargs), total


@define(
    "torch_rmsnorm(Tensor input, Tensor? weight, float eps, float weight_offset=0.0, "
    "bool weight_in_float=False, ScalarType? out_dtype=None) -> Tensor",
    category="norm",
    token_local=True,
    fake=fake_rmsnorm,
    cost=costs.per_element(4),
)
def torch_rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 (arXiv 1910.07467).

    input [..., D], weight [D] or None (scale-free) -> [..., D] in input's dtype, or rounded from it to
    ``out_dtype``. ``weight_offset`` 1 is Gemma's 1 + w. ``weight_in_float``: multiply before casting back (Gemma,
    OLMo2) instead of after (Llama).
    """
    mean_square = input.float().square().mean(-1, keepdim=True)
    return normalised(input, mean_square, weight, eps, weight_offset, weight_in_float, out_dtype)


def normalised(
    input: Tensor,
    mean_square: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch_rmsnorm`` of rows whose mean squares are known: input [..., D], mean_square float32 [..., 1]."""
    x = input.float() * torch.rsqrt(mean_square + eps)
    if weight is None:
        y = x.to(input.dtype)
    elif weight_in_float:
        y = (x * (weight.float() + weight_offset)).to(input.dtype)
    else:
        y = x.to(input.dtype) * (weight + weight_offset if weight_offset else weight)
    return y.to(out_dtype or y.dtype).contiguous()


@define(
    "torch_fused_add_rmsnorm(Tensor input, Tensor residual, Tensor? weight, float eps, "
    "float weight_offset=0.0, "
    "bool weight_in_float=False, ScalarType? out_dtype=None) -> (Tensor normed, Tensor sum)",
    category="norm",
    token_local=True,
    fake=fake_add_rms,
    cost=costs.per_element(5),
)
def torch_fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch_rmsnorm`` of input + residual, and that sum, rounded to its dtype before the norm reads it.

    input and residual [..., D], of which one may be wider, weight [D] or None -> normed [..., D], sum [..., D].
    """
    total = (input + residual).contiguous()
    return torch_rmsnorm(total, weight, eps, weight_offset, weight_in_float, out_dtype), total


@define(
    "torch_l2norm(Tensor input, float eps) -> Tensor",
    category="norm",
    token_local=True,
    fake=_fake,
    cost=costs.per_element(3),
)
def torch_l2norm(input: Tensor, eps: float) -> Tensor:
    """x * rsqrt(sum(x^2) + eps) over the last dimension in float32; [..., D] -> [..., D]."""
    x = input.float()
    return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)).to(input.dtype).contiguous()
