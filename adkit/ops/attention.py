"""Canonical attention: grouped queries, scale, causal / window / chunk masks, softcap, sinks, ALiBi, bias."""

from __future__ import annotations

import torch
from torch import Tensor

from adkit.ops.registry import define


def allowed(q_pos: Tensor, k_pos: Tensor, is_causal: bool, window: int | None, chunk: int | None) -> Tensor:
    """Boolean [Q, K]: may the query at position ``q_pos[i]`` attend to the key at ``k_pos[j]``.

    ``window`` w: the last w positions, itself included (HF's ``sliding_window``); ``chunk`` c: positions of
    the same block of c (llama4).
    """
    q, k = q_pos[:, None], k_pos[None, :]
    ok = torch.ones(q_pos.numel(), k_pos.numel(), dtype=torch.bool, device=q_pos.device)
    if is_causal:
        ok &= k <= q
    if window is not None:
        ok &= q - k < window
        if not is_causal:
            ok &= k - q < window
    if chunk is not None:
        ok &= torch.div(q, chunk, rounding_mode="floor") == torch.div(k, chunk, rounding_mode="floor")
    return ok


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Softmax attention in float32 accuracy of the scores.

    q [..., N, Q, H], k [..., K, L, H], v [..., K, L, Hv], mask bool [Q, L] -> [..., N, Q, Hv] in q's dtype.
    """
    groups = q.shape[-3] // k.shape[-3]
    if groups > 1:
        k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.float().masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        probs = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        probs = scores.softmax(-1)
    return probs.to(v.dtype) @ v


def _fake(query, key, value, attn_bias=None, sinks=None, alibi_slopes=None, *, layout="bsnd", **_):  # type: ignore[no-untyped-def]
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@define(
    "torch_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_bias=None, Tensor? sinks=None, "
    "Tensor? alibi_slopes=None, *, float? scale=None, bool is_causal=True, float? softcap=None, int? window=None, "
    'int? chunk=None, str layout="bsnd") -> Tensor',
    category="attention",
    token_local=False,
    fake=_fake,
)
def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    layout: str = "bsnd",
) -> Tensor:
    """Reference attention over whole sequences.

    Layout bsnd: query [B, S, N, H], key [B, S, K, H], value [B, S, K, Hv] -> [B, S, N, Hv]; bnsd has heads
    before the sequence, in and out. ``scale`` defaults to H ** -0.5. ``softcap`` c: c * tanh(score / c).
    ``sinks`` [N]: one extra logit a head that takes probability and gives nothing (gpt-oss).
    ``alibi_slopes`` [N]: adds slope * (key position - query position). ``attn_bias`` broadcasts to [B, N, S, S].
    """
    if layout == "bsnd":
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    pos_q = torch.arange(query.shape[-2], device=query.device)
    pos_k = torch.arange(key.shape[-2], device=query.device)
    bias = attn_bias
    if alibi_slopes is not None:
        distance = (pos_k[None, :] - pos_q[:, None]).to(query.dtype)
        alibi = alibi_slopes.to(query.dtype)[:, None, None] * distance
        bias = alibi if bias is None else bias + alibi
    out = attend(
        query,
        key,
        value,
        allowed(pos_q, pos_k, is_causal, window, chunk),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        bias=bias,
    )
    return (out.transpose(1, 2) if layout == "bsnd" else out).contiguous()


@define(
    "torch_attention_repeat_kv(Tensor input, int n_rep, int dim=1) -> Tensor",
    category="attention",
    token_local=True,
    fake=lambda input, n_rep, dim=1: input.new_empty(
        [d * n_rep if i == dim else d for i, d in enumerate(input.shape)]
    ),
)
def torch_attention_repeat_kv(input: Tensor, n_rep: int, dim: int = 1) -> Tensor:
    """Each key or value head repeated ``n_rep`` times in a row; [B, K, S, H] -> [B, K * n_rep, S, H].

    ``dim`` is where the heads are: 1 for bnsd, 2 for bsnd.
    """
    return input.repeat_interleave(n_rep, dim)
