"""Attention over the paged cache, prompts and decode in one kernel, and the kernel that writes the cache.

A program takes ``BLOCK_T`` consecutive tokens of one sequence and all query heads of one kv head: row m of
its block is token m // GROUP, head m % GROUP. It walks the sequence's pages with an online softmax (arXiv
1805.02867). Which sequence a program serves is worked out on the device, so nothing waits for the host and a
CUDA graph can capture the launch. Later work makes it fast (split pages for long decodes, tensor
descriptors).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _write_kv(
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    k_width,
    v_width,
    key_token,
    value_token,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    k = tl.load(key_ptr + token * key_token + cols, cols < k_width)
    tl.store(k_cache_ptr + slot * k_width + cols, k.to(k_cache_ptr.dtype.element_ty), cols < k_width)
    v = tl.load(value_ptr + token * value_token + cols, cols < v_width)
    tl.store(v_cache_ptr + slot * v_width + cols, v.to(v_cache_ptr.dtype.element_ty), cols < v_width)


@triton.jit
def _attend(
    q_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    sinks_ptr,
    slopes_ptr,
    cu_ptr,
    cached_ptr,
    pages_ptr,
    sequences,
    pages_stride,
    q_token,
    q_head,
    out_token,
    out_head,
    scale,
    softcap,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE_DOT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BLOCK_T * GROUP
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    # Sequence r owns programs from cu_seqlens[r] // BLOCK_T + r on: room for each to round up.
    r = tl.arange(0, BLOCK_R)
    begins = tl.load(cu_ptr + r, r < sequences, 0) // BLOCK_T + r
    seq = tl.sum(((begins <= program) & (r < sequences)).to(tl.int32), 0) - 1
    start = tl.load(cu_ptr + seq)
    count = tl.load(cu_ptr + seq + 1) - start
    offset = (program - start // BLOCK_T - seq) * BLOCK_T
    if offset >= count:
        return
    cached = tl.load(cached_ptr + seq)
    row = tl.arange(0, BLOCK_M)
    token = offset + row // GROUP
    head = row % GROUP
    live = (token < count) & (head < HEADS_PER_KV)
    head = kv_head * HEADS_PER_KV + head
    position = cached + token
    dims = tl.arange(0, BLOCK_H)
    values = tl.arange(0, BLOCK_V)
    row_token = (start + token).to(tl.int64)
    q = tl.load(
        q_ptr + (row_token * q_token + head * q_head)[:, None] + dims[None, :],
        live[:, None] & (dims < HEAD_DIM)[None, :],
        0.0,
    )
    kind = out_ptr.dtype.element_ty
    if WIDE_DOT:
        q = q.to(tl.float32)
    # A sink is a key whose score is known and whose value is zero: the softmax starts from it.
    if HAS_SINKS:
        top = tl.load(sinks_ptr + head, live, 0.0).to(tl.float32)
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head, live, 0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    first = cached + offset
    low = 0
    if WINDOW > 0:
        low = tl.maximum(low, first - WINDOW + 1)
    if CHUNK > 0:
        low = tl.maximum(low, first // CHUNK * CHUNK)
    high = cached + tl.minimum(count, offset + BLOCK_T)
    for at in range(low, high, BLOCK_L):
        key = at + tl.arange(0, BLOCK_L)
        inside = key < high
        page = tl.load(pages_ptr + seq * pages_stride + key // PAGE_SIZE, inside, 0).to(tl.int64)
        slot = (page * PAGE_SIZE + key % PAGE_SIZE) * KV_HEADS + kv_head
        k = tl.load(
            k_cache_ptr + (slot * HEAD_DIM)[None, :] + dims[:, None],
            inside[None, :] & (dims < HEAD_DIM)[:, None],
            0.0,
        ).to(kind)
        if WIDE_DOT:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)  # tanh x = 2 sigmoid(2x) - 1
        if HAS_ALIBI:
            scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        seen = (key[None, :] <= position[:, None]) & inside[None, :]
        if WINDOW > 0:
            seen &= position[:, None] - key[None, :] < WINDOW
        if CHUNK > 0:
            seen &= position[:, None] // CHUNK == key[None, :] // CHUNK
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet
        probs = tl.exp(scores - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(probs, 1)
        v = tl.load(
            v_cache_ptr + (slot * VALUE_DIM)[:, None] + values[None, :],
            inside[:, None] & (values < VALUE_DIM)[None, :],
            0.0,
        ).to(kind)
        probs = probs.to(kind)
        if WIDE_DOT:
            probs = probs.to(tl.float32)
            v = v.to(tl.float32)
        acc = acc * shrink[:, None] + tl.dot(probs, v, input_precision=PRECISION)
        top = new_top
    total = tl.where(total > 0, total, 1.0)
    tl.store(
        out_ptr + (row_token * out_token + head * out_head)[:, None] + values[None, :],
        (acc / total[:, None]).to(kind),
        live[:, None] & (values < VALUE_DIM)[None, :],
    )


def _packed(x: Tensor) -> Tensor:
    """[1, T, heads, dim] -> [T, heads, dim] whose heads of a token lie together."""
    x = x[0]
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def write_kv(key: Tensor, value: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Put key [1, T, K, H] and value [1, T, K, Hv] into their slots of the caches, in place."""
    key, value = _packed(key), _packed(value)
    k_width, v_width = key.shape[1] * key.shape[2], value.shape[1] * value.shape[2]
    if key.shape[0]:
        _write_kv[(key.shape[0],)](
            key,
            value,
            k_cache,
            v_cache,
            slot_mapping,
            k_width,
            v_width,
            key.stride(0),
            value.stride(0),
            BLOCK=triton.next_power_of_2(max(k_width, v_width)),
        )


def blocks(head_dim: int, value_dim: int, heads_per_kv: int, itemsize: int, decode: bool) -> dict[str, int]:
    """Block sizes: 16 rows at least (``tl.dot``); keys and values fit an A100's shared memory."""
    block_h = max(16, triton.next_power_of_2(head_dim))
    block_v = max(16, triton.next_power_of_2(value_dim))
    group = triton.next_power_of_2(heads_per_kv)
    rows = 16 if decode or itemsize * block_h > 512 else 64
    block_l = (
        64 if itemsize * (block_h + block_v) <= 512 else 32 if itemsize * (block_h + block_v) <= 1024 else 16
    )
    return {
        "BLOCK_T": max(1, rows // group),
        "GROUP": group,
        "BLOCK_L": block_l,
        "BLOCK_H": block_h,
        "BLOCK_V": block_v,
    }


def attention_with_paged_cache(
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
    """``torch_attention_with_paged_cache``, scores and sums in float32; raises ValueError as it does."""
    if attn_bias is not None or not is_causal:
        given = "attn_bias" if attn_bias is not None else "is_causal=False"
        raise ValueError(
            f"cached attention was given {given}; it serves causal attention without a general bias"
        )
    if slot_mapping is not None:
        write_kv(key, value, slot_mapping, k_cache, v_cache)
    q = query[0] if query.stride(3) == 1 else query[0].contiguous()
    tokens, heads, head_dim = q.shape
    kv_heads, value_dim = v_cache.shape[2:]
    sequences = cache_lens.shape[0]
    out = torch.zeros((tokens, heads, value_dim), dtype=query.dtype, device=query.device)
    size = blocks(head_dim, value_dim, heads // kv_heads, q.element_size(), decode=tokens == sequences)
    if tokens and sequences:
        _attend[(tokens // size["BLOCK_T"] + sequences, kv_heads)](
            q,
            out,
            k_cache,
            v_cache,
            q if sinks is None else sinks,
            q if alibi_slopes is None else alibi_slopes,
            cu_seqlens,
            cache_lens,
            page_table,
            sequences,
            page_table.stride(0),
            q.stride(0),
            q.stride(1),
            out.stride(0),
            out.stride(1),
            head_dim**-0.5 if scale is None else scale,
            1.0 if softcap is None else softcap,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            KV_HEADS=kv_heads,
            HEADS_PER_KV=heads // kv_heads,
            PAGE_SIZE=k_cache.shape[1],
            WINDOW=window or 0,
            CHUNK=chunk or 0,
            HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None,
            HAS_ALIBI=alibi_slopes is not None,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
            WIDE_DOT=triton.knobs.runtime.interpret and q.dtype == torch.bfloat16,
            BLOCK_R=triton.next_power_of_2(sequences),
            **size,
        )
    return out.unsqueeze(0)
