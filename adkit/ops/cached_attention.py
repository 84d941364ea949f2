"""Attention of a packed batch over a paged cache: the reference that every faster backend is compared with.

R sequences lie one after another in T tokens; their keys and values live in P pages of ``page_size`` tokens
(:mod:`adkit.contract.batch` says what each field means). Tokens past ``cu_seqlens[-1]`` are padding.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from adkit.ops import costs
from adkit.ops.attention import alibi_bias, allowed, attend, like_query
from adkit.ops.registry import define

#: Scores held at once (elements): a long prompt is attended block of queries by block, in bounded memory.
_BLOCK_SCORES = 1 << 24


def write_slots(cache: Tensor, slots: Tensor, new: Tensor) -> None:
    """Put the packed ``new`` [T, K, H] into ``cache`` [P, page_size, K, H] at ``slots`` [T], in place."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new.detach().to(cache.dtype))


def read_pages(cache: Tensor, pages: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """The first ``length`` tokens of the sequences with ``pages`` [..., M] -> [..., K, length, H]."""
    used = pages[..., : -(-length // cache.shape[1])]
    tokens = cache.index_select(0, used.flatten()).view(*used.shape[:-1], -1, *cache.shape[2:])
    tokens = tokens[..., :length, :, :]
    return tokens.to(dtype).transpose(-2, -3)


@define(
    "torch_attention_with_paged_cache(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, "
    "Tensor? sinks, Tensor? alibi_slopes, Tensor cu_seqlens, Tensor cache_lens, Tensor page_table, "
    "Tensor? slot_mapping, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, *, float? scale=None, bool is_causal=True, float? softcap=None, "
    "int? window=None, int? chunk=None) -> Tensor",
    category="attention",
    token_local=False,
    fake=like_query,
    cost=costs.cached_attention,
    syncs=True,
)
def torch_attention_with_paged_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    page_table: Tensor,
    slot_mapping: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Write this step's keys and values to their slots, then attend to each sequence's whole history.

    query [1, T, N, H], key [1, T, K, H], value [1, T, K, Hv]; cu_seqlens [R + 1], cache_lens [R],
    page_table [R, M], slot_mapping [T], None where an earlier op has written this step's keys and values (which
    must be given all the same: they equal what stands in the cache); k_cache [P, page_size, K, H] and v_cache
    [P, page_size, K, Hv] change in place -> [1, T, N, Hv], zeros for padding. Masks and ALiBi use absolute
    positions, cache_lens + offset. Constants as in ``torch_attention``. Sequences of one token (decode) are
    computed together. Reads the lengths on the host, so a CUDA graph cannot capture it. Raises ValueError for
    ``attn_bias`` or attention that is not causal, which a paged history cannot serve.
    """
    if attn_bias is not None or not is_causal:
        given = "attn_bias" if attn_bias is not None else "is_causal=False"
        raise ValueError(
            f"cached attention was given {given}; it serves causal attention without a general bias"
        )
    q, dtype = query[0], query.dtype
    if slot_mapping is not None:
        write_slots(k_cache, slot_mapping, key[0])
        write_slots(v_cache, slot_mapping, value[0])
    out = q.new_zeros((*q.shape[:-1], value.shape[-1]))
    starts, cached = cu_seqlens.tolist(), cache_lens.tolist()
    counts = [end - start for start, end in pairwise(starts)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def attended(rows: Tensor, k: Tensor, v: Tensor, q_pos: Tensor) -> Tensor:
        """rows [..., N, Q, H] at q_pos [..., Q] over k, v [..., K, L, *]."""
        k_pos = torch.arange(k.shape[-2], device=q.device)
        bias = None if alibi_slopes is None else alibi_bias(alibi_slopes, q_pos, k_pos)
        mask = allowed(q_pos, k_pos, True, window, chunk).unsqueeze(-3)
        return attend(rows, k, v, mask, scale=scale, softcap=softcap, sinks=sinks, bias=bias)

    single = [r for r, n in enumerate(counts) if n == 1]
    if single:
        length = max(cached[r] for r in single) + 1
        every = len(single) == len(cached)
        lanes = slice(None) if every else torch.tensor(single, device=q.device)
        rows = cu_seqlens[:-1][lanes].long()
        pages = page_table[lanes]
        k, v = (read_pages(c, pages, length, dtype) for c in (k_cache, v_cache))
        found = attended(q[rows].unsqueeze(-2), k, v, cache_lens[lanes].unsqueeze(-1))
        out[rows] = found.squeeze(-2)
    for r, n in enumerate(counts):
        if n < 2:
            continue
        start, length = starts[r], cached[r] + n
        k, v = (read_pages(c, page_table[r], length, dtype) for c in (k_cache, v_cache))
        block = max(1, _BLOCK_SCORES // (q.shape[1] * length))
        for at in range(0, n, block):
            stop = min(n, at + block)
            q_pos = torch.arange(cached[r] + at, cached[r] + stop, device=q.device)
            rows_at = slice(start + at, start + stop)
            out[rows_at] = attended(q[rows_at].transpose(0, 1), k, v, q_pos).transpose(0, 1)
    return out.unsqueeze(0)
