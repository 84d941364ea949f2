"""Canonical mixture of experts: routing, and the experts themselves."""

from __future__ import annotations

from typing import Any

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
    'float up_offset=0.0, bool shardable=False, str layer_type="unknown") -> Tensor',
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
    shardable: bool = False,
    layer_type: str = "unknown",
) -> Tensor:
    """Sum over a token's k experts of weight * down(gate(gate_up(hidden))).

    hidden [T, D], topk_ids and topk_weights [T, k], gate_up [E, 2F, D] (gate rows then up rows;
    ``interleaved``: alternating), down [E, D, F]; ``transposed``: [E, D, 2F] and [E, F, D]. Not ``gated``:
    gate_up is [E, F, D]. An id of E or more means no expert. -> [T, D]
    ``shardable`` and ``layer_type`` are sharding hints (``ops/hints.py``) and change nothing.
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


def _topk_shapes(logits: Tensor, k: int, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Any:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=dtype or _wide(logits)), logits.new_empty(shape, dtype=torch.int64)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


@define(
    'torch_moe_topk(Tensor logits, int k, Tensor? bias=None, *, str score="softmax", int groups=1, '
    "int top_groups=1, bool normalize=False, float eps=0.0, float floor=0.0, float scale=1.0, "
    "ScalarType? dtype=None) -> (Tensor, Tensor)",
    category="moe",
    token_local=True,
    fake=_topk_shapes,
)
def torch_moe_topk(
    logits: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    score: str = "softmax",
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = False,
    eps: float = 0.0,
    floor: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights and ids of the k experts with the highest scores, in float32 at least.

    logits [..., E] -> weights [..., k] in ``dtype`` (None: float32), ids int64 [..., k]; highest first.
    ``score``: ``softmax`` or ``sigmoid`` of the logits; ``topk_softmax`` is the softmax over the k chosen logits.
    ``bias`` [E] counts for the choice alone. With ``groups`` only experts of the ``top_groups`` best groups can
    be chosen, a group being as good as its two best experts (DeepSeek-V3, arXiv 2412.19437). ``normalize``
    divides by max(sum + ``eps``, ``floor``); then weights are multiplied by ``scale``.
    """
    wide = logits.to(_wide(logits))
    scores = {"softmax": lambda: wide.softmax(-1), "sigmoid": wide.sigmoid, "topk_softmax": lambda: wide}[
        score
    ]()
    choice = scores if bias is None else scores + bias
    if top_groups < groups:
        grouped = choice.unflatten(-1, (groups, -1))
        strength = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(strength, dtype=torch.bool)
        kept = kept.scatter(-1, strength.topk(top_groups, -1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    ids = choice.topk(k, -1).indices
    weights = scores.gather(-1, ids)
    if score == "topk_softmax":
        weights = weights.softmax(-1)
    if normalize:
        total = weights.sum(-1, keepdim=True) + eps
        weights = weights / (total.clamp(min=floor) if floor else total)
    if scale != 1.0:
        weights = weights * scale
    return weights.to(dtype or weights.dtype), ids
