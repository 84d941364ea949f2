"""Canonical gated activations."""

from __future__ import annotations

import torch
from torch import Tensor

from adkit.ops import costs
from adkit.ops.activation import ACTIVATIONS
from adkit.ops.registry import define


def _fake(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    shape = torch.broadcast_shapes(gate.shape, up.shape)
    return up.new_empty(shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@define(
    'torch_swiglu(Tensor gate, Tensor up, str act="silu") -> Tensor',
    category="mlp",
    token_local=True,
    fake=_fake,
    cost=costs.per_element(6),
)
def torch_swiglu(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up; [..., F] each -> [..., F]. silu: SwiGLU; gelu, gelu_tanh: GeGLU (arXiv 2002.05202)."""
    return (ACTIVATIONS[act](gate) * up).contiguous()


@define(
    'torch_swiglu_packed(Tensor gate_up, str act="silu") -> Tensor',
    category="mlp",
    token_local=True,
    fake=lambda gate_up, act="silu": gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    cost=costs.per_element(6),
)
def torch_swiglu_packed(gate_up: Tensor, act: str = "silu") -> Tensor:
    """act(first half) * second half; [..., 2F] -> [..., F]: the gate of a fused gate-up projection."""
    gate, up = gate_up.chunk(2, -1)
    return (ACTIVATIONS[act](gate) * up).contiguous()
