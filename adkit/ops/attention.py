"""Canonical attention: grouped queries, scale, causal / window / chunk masks, softcap, sinks, ALiBi, bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adkit.ops import costs
from adkit.ops.registry import define


def allowed(q_pos: Tensor, k_pos: Tensor, is_causal: bool, window: int | None, chunk: int | None) -> Tensor:
    """Boolean [..., Q, L]: may the query at ``q_pos[..., i]`` attend to the key at ``k_pos[..., j]``.

    ``window`` w: the last w positions, itself included (HF's ``sliding_window``); ``chunk`` c: positions of
    the same block of c (llama4).
    """
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    ok = k <= q if is_causal else torch.ones_like(k <= q)
    if window is not None:
        ok = ok & (q - k < window)
        if not is_causal:
            ok = ok & (k - q < window)
    if chunk is not None:
        ok = ok & (torch.div(q, chunk, rounding_mode="floor") == torch.div(k, chunk, rounding_mode="floor"))
    return ok


def alibi_bias(slopes: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """slope * (key position - query position); slopes [N], positions [..., Q], [..., L] -> [..., N, Q, L]."""
    distance = (k_pos[..., None, :] - q_pos[..., :, None]).unsqueeze(-3)
    return wide(slopes)[:, None, None] * distance


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is when wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
    """Softmax attention, scores in float32 at least, probabilities rounded to v's dtype as HF does.

    q [..., N, Q, H], k [..., K, L, H], v [..., K, L, Hv], mask bool broadcasting to [..., N, Q, L]
    -> [..., N, Q, Hv] in q's dtype. A query that may attend to nothing gives zeros.
    """
    heads, rows, length = q.shape[-3], q.shape[-2], k.shape[-2]
    # The query heads of one kv head become extra rows of one matmul: keys and values are not repeated.
    grouped = (*q.shape[:-3], k.shape[-3], heads // k.shape[-3] * rows)
    scores = wide(q).reshape(*grouped, q.shape[-1]) @ wide(k).transpose(-1, -2)
    scores = scores.reshape(*q.shape[:-3], heads, rows, length) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        probs = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
    else:
        probs = torch._safe_softmax(scores, -1)
    out = probs.to(v.dtype).reshape(*grouped, length) @ v
    return out.reshape(*q.shape[:-1], v.shape[-1]).to(q.dtype)


def like_query(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Shapes of attention's output: the query's heads, of the value's size."""
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@define(
    "torch_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_bias=None, Tensor? sinks=None, "
    "Tensor? alibi_slopes=None, *, float? scale=None, bool is_causal=True, float? softcap=None, "
    'int? window=None, int? chunk=None, str layout="bsnd") -> Tensor',
    category="attention",
    token_local=False,
    fake=like_query,
    cost=costs.attention,
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
    ``alibi_slopes`` [N]: adds slope * (key position - query position). ``attn_bias`` broadcasts to [B, N, S,
    S] in either layout and is added to the scores; a boolean one keeps the scores where it is True.
    """
    if layout == "bsnd":
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    elif layout != "bnsd":
        raise ValueError(f"torch_attention was given layout {layout!r}; expected 'bsnd' or 'bnsd'")
    pos_q = torch.arange(query.shape[-2], device=query.device)
    pos_k = torch.arange(key.shape[-2], device=query.device)
    mask, bias = allowed(pos_q, pos_k, is_causal, window, chunk), attn_bias
    if bias is not None and bias.dtype == torch.bool:
        mask, bias = mask & bias, None
    if alibi_slopes is not None:
        alibi = alibi_bias(alibi_slopes, pos_q, pos_k)
        bias = alibi if bias is None else bias + alibi
    out = attend(
        query,
        key,
        value,
        mask,
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
