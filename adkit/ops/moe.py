"""Canonical mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from adkit.ops import costs
from adkit.ops.activation import ACTIVATIONS
from adkit.ops.registry import define


def gate_fn(
    gate: Tensor, up: Tensor, act: str, alpha: float | None, limit: float | None, up_offset: float
) -> Tensor:
    """The expert's gate: act(gate) * (up + up_offset), gate clamped above and up both ways by ``limit``.

    ``alpha`` a (gpt-oss): gate * sigmoid(a * gate) in place of ``act``.
    """
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    gated = ACTIVATIONS[act](gate) if alpha is None else gate * torch.sigmoid(gate * alpha)
    return gated * (up + up_offset if up_offset else up)


@define(
    "torch_moe(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor down, "
    'Tensor? gate_up_bias=None, Tensor? down_bias=None, *, str act="silu", bool transposed=False, '
    "bool interleaved=False, bool gated=True, float? alpha=None, float? limit=None, "
    "float up_offset=0.0) -> Tensor",
    category="moe",
    token_local=True,
    fake=lambda hidden, *_, **__: hidden.new_empty(hidden.shape),
    cost=costs.moe,
    syncs=True,
)
def torch_moe(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    act: str = "silu",
    transposed: bool = False,
    interleaved: bool = False,
    gated: bool = True,
    alpha: float | None = None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    """Sum over a token's k experts of weight * down(gate(gate_up(hidden))).

    hidden [T, D], topk_ids and topk_weights [T, k], gate_up [E, 2F, D] (gate rows then up rows;
    ``interleaved``: alternating), down [E, D, F]; ``transposed``: [E, D, 2F] and [E, F, D]. Not ``gated``:
    gate_up is [E, F, D]. An id of E or more means no expert. -> [T, D]
    """
    out = hidden.new_zeros(hidden.shape)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(topk_ids == e)
        if token.numel() == 0:
            continue
        x = hidden[token]
        h = x @ (gate_up[e] if transposed else gate_up[e].t())
        if gate_up_bias is not None:
            h = h + gate_up_bias[e]
        if gated:
            gate, up = (h[..., ::2], h[..., 1::2]) if interleaved else h.chunk(2, -1)
            h = gate_fn(gate, up, act, alpha, limit, up_offset)
        else:
            h = ACTIVATIONS[act](h)
        y = h @ (down[e] if transposed else down[e].t())
        if down_bias is not None:
            y = y + down_bias[e]
        out.index_add_(0, token, (y * topk_weights[token, slot, None]).to(out.dtype))
    return out
