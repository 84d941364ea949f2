"""Canonical linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from adkit.ops import costs
from adkit.ops.registry import define


@define(
    "torch_linear_simple(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    category="linear",
    token_local=True,
    fake=lambda input, weight, bias=None: input.new_empty((*input.shape[:-1], weight.shape[0])),
    cost=costs.linear,
)
def torch_linear_simple(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [..., D], weight [F, D], bias [F] -> [..., F]."""
    return F.linear(input, weight, bias)
