"""Canonical norms."""

from __future__ import annotations

import torch
from torch import Tensor

from adkit.ops.registry import define


def _fake(input, *_, **__):  # type: ignore[no-untyped-def]
    return torch.empty_like(input)


@define(
    "torch_rmsnorm(Tensor input, Tensor? weight, float eps, float weight_offset=0.0, bool weight_in_float=False) -> Tensor",
    category="norm",
    token_local=True,
    fake=_fake,
)
def torch_rmsnorm(
    input: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0, weight_in_float: bool = False
) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 (arXiv 1910.07467).

    input [..., D], weight [D] or None (scale-free) -> [..., D] in input's dtype. ``weight_offset`` 1 is
    Gemma's 1 + w. ``weight_in_float``: multiply before casting back (Gemma, OLMo2) instead of after (Llama).
    """
    x = input.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return x.to(input.dtype)
    if weight_in_float:
        return (x * (weight.float() + weight_offset)).to(input.dtype)
    return x.to(input.dtype) * (weight + weight_offset if weight_offset else weight)


@define("torch_l2norm(Tensor input, float eps) -> Tensor", category="norm", token_local=True, fake=_fake)
def torch_l2norm(input: Tensor, eps: float) -> Tensor:
    """x * rsqrt(sum(x^2) + eps) over the last dimension in float32; [..., D] -> [..., D]."""
    x = input.float()
    return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)).to(input.dtype)
