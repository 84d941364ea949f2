"""Canonical linear layers: the plain one, and one with what stands before and after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from adkit.ops import costs
from adkit.ops.mlp import torch_swiglu_packed
from adkit.ops.norm import torch_rmsnorm
from adkit.ops.registry import define


@define(
    'torch_linear_simple(Tensor input, Tensor weight, Tensor? bias=None, *, str tp_mode="none", '
    'int[]? output_sizes=None, int tp_min_local_shape=1, str layer_type="unknown") -> Tensor',
    category="linear",
    token_local=True,
    fake=lambda input, weight, bias=None, **_: input.new_empty((*input.shape[:-1], weight.shape[0])),
    cost=costs.linear,
)
def torch_linear_simple(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tp_mode: str = "none",
    output_sizes: Sequence[int] | None = None,
    tp_min_local_shape: int = 1,
    layer_type: str = "unknown",
) -> Tensor:
    """input [..., D], weight [F, D], bias [F] -> [..., F].

    The rest are sharding hints (``ops/hints.py``) and change nothing: ``tp_mode`` colwise cuts F (each block of
    ``output_sizes``; no piece below ``tp_min_local_shape``), rowwise cuts D, gather cuts F and joins the outputs.
    """
    return F.linear(input, weight, bias)


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
) -> Tensor:
    outs = weight.shape[0] if act is None else weight.shape[0] // 2
    return input.new_empty((*input.shape[:-1], outs))


@define(
    "torch_fused_linear(Tensor input, Tensor weight, Tensor? bias=None, Tensor? norm_weight=None, "
    "Tensor? residual=None, float? eps=None, float weight_offset=0.0, bool weight_in_float=False, "
    "str? act=None) -> Tensor",
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
) -> Tensor:
    """A linear layer with the norm before it and the gate or the residual sum after it.

    input [..., D], weight [F, D], bias [F], residual [..., F] -> [..., F]: residual + linear(norm(input)).
    ``eps`` asks for ``torch_rmsnorm`` of the input (``norm_weight`` None: scale-free); ``act`` for
    ``torch_swiglu_packed`` of the product, which halves the last dimension, before the residual is added.
    """
    if eps is not None:
        input = torch_rmsnorm(input, norm_weight, eps, weight_offset, weight_in_float)
    out = F.linear(input, weight, bias)
    if act is not None:
        out = torch_swiglu_packed(out, act)
    return out if residual is None else out + residual
