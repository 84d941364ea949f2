"""Prompts and chunks of prompts: causal attention in tiles over packed sequences (arXiv 2307.08691).

A tile is ``BLOCK_M`` consecutive tokens of one sequence and one query head. Its keys come from two places: what
earlier steps left, through the page table; and this step's tokens, straight from the packed keys and
values. Of those, blocks wholly before the tile need no mask; the ones on the diagonal do. Which tiles there
are is worked out on the device, the longest of a sequence first.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from adkit.ops.triton.attention_step import Step
from adkit.ops.triton.flash import LOG2E, fold_block, load_rows, start_rows
from adkit.ops.triton.tuning import Settings, best


@triton.jit
def _tiles(
    first, cu_ptr, sequences, tokens, FROM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr
):
    """How many tiles each of ``BLOCK_R`` sequences from ``first`` on has.

    Padding is one more sequence behind the last; a sequence of fewer than FROM tokens has no tiles.
    """
    r = first + tl.arange(0, BLOCK_R)
    start = tl.load(cu_ptr + r, r <= sequences, 0)
    end = tl.load(cu_ptr + r + 1, r < sequences, tokens)
    count = tl.where(r <= sequences, end - start, 0)
    return tl.where((count >= FROM) | (r == sequences), tl.cdiv(count, BLOCK_M), 0)


@triton.jit(do_not_specialize=["sequences", "tokens", "pages_stride"])
def prefill(
    q_ptr,
    out_ptr,
    key_ptr,
    value_ptr,
    key_tiles,
    value_tiles,
    k_cache_ptr,
    v_cache_ptr,
    sinks_ptr,
    slopes_ptr,
    cu_ptr,
    cached_ptr,
    pages_ptr,
    sequences,
    tokens,
    pages_stride,
    q_token,
    q_head,
    key_token,
    key_head,
    value_token,
    value_head,
    scale,
    softcap,
    FROM: tl.constexpr,
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
    DESCRIPTORS: tl.constexpr,
    HISTORY_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (any number of programs): each takes every so many-th of the tiles x query heads.

    Sequences of at least FROM tokens are served, and padding is set to zero. With DESCRIPTORS, ``key_tiles``
    and ``value_tiles`` are tensor descriptors of the packed keys and values as [T, K * dim].
    """
    HEADS: tl.constexpr = KV_HEADS * HEADS_PER_KV
    ends = tl.cumsum(_tiles(0, cu_ptr, sequences, tokens, FROM, BLOCK_M, BLOCK_R), 0)
    tiles = tl.max(ends, 0)
    for first in range(BLOCK_R, sequences + 1, BLOCK_R):
        tiles += tl.sum(_tiles(first, cu_ptr, sequences, tokens, FROM, BLOCK_M, BLOCK_R), 0)
    for work in range(tl.program_id(0), tiles * HEADS, tl.num_programs(0)):
        head = work % HEADS
        tile = work // HEADS
        # The sequence of this tile: as many lie before it as have all their tiles before it.
        seq = tl.sum((ends <= tile).to(tl.int32), 0)
        before = tl.max(tl.where(ends <= tile, ends, 0), 0)
        passed = tl.max(ends, 0)
        for first in range(BLOCK_R, sequences + 1, BLOCK_R):
            more = passed + tl.cumsum(_tiles(first, cu_ptr, sequences, tokens, FROM, BLOCK_M, BLOCK_R), 0)
            seq += tl.sum((more <= tile).to(tl.int32), 0)
            before = tl.maximum(before, tl.max(tl.where(more <= tile, more, 0), 0))
            passed = tl.max(more, 0)
        padding = seq >= sequences
        start = tl.load(cu_ptr + seq)
        end = tl.load(cu_ptr + seq + 1, ~padding, tokens)
        count = end - start
        offset = (tl.cdiv(count, BLOCK_M) - 1 - (tile - before)) * BLOCK_M
        cached = tl.load(cached_ptr + seq, ~padding, 0)

        token = offset + tl.arange(0, BLOCK_M)
        live = token < count
        position = cached + token
        dims = tl.arange(0, BLOCK_H)
        values = tl.arange(0, BLOCK_V)
        kind = out_ptr.dtype.element_ty
        row = (start + token).to(tl.int64)
        q = tl.load(
            q_ptr + (row * q_token + head * q_head)[:, None] + dims[None, :],
            live[:, None] & (dims < HEAD_DIM)[None, :],
            0.0,
        )
        top, total = start_rows(sinks_ptr, head + tl.zeros_like(token), live, True, BLOCK_M, HAS_SINKS)
        slope = total
        if HAS_ALIBI:
            slope = tl.zeros_like(total) + tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        kv_head = head // HEADS_PER_KV
        low = 0
        if WINDOW > 0:
            low = tl.maximum(low, cached + offset - WINDOW + 1)
        if CHUNK > 0:
            low = tl.maximum(low, (cached + offset) // CHUNK * CHUNK)
        LOCAL: tl.constexpr = WINDOW > 0 or CHUNK > 0

        # What earlier steps left in the pages.
        pages = pages_ptr + tl.cast(seq, tl.int64) * pages_stride
        # (Page numbers are loaded ahead of keys, so each block in flight takes two stages.)
        for at in tl.range(low, cached, BLOCK_N, num_stages=HISTORY_STAGES):
            key = at + tl.arange(0, BLOCK_N)
            held = tl.minimum(key, cached - 1)  # beyond the end: any key that is there, and not counted
            page = tl.load(pages + held // PAGE_SIZE).to(tl.int64)
            slot = ((page * PAGE_SIZE + held % PAGE_SIZE) * KV_HEADS + kv_head)[:, None]
            k = load_rows(k_cache_ptr + slot * HEAD_DIM, dims, HEAD_DIM, BLOCK_H).to(kind)
            v = load_rows(v_cache_ptr + slot * VALUE_DIM, values, VALUE_DIM, BLOCK_V).to(kind)
            seen = (key < cached)[None, :]
            if LOCAL:
                seen &= _near(key, position, WINDOW, CHUNK)
            acc, top, total = fold_block(
                acc,
                top,
                total,
                q,
                k,
                v,
                seen,
                (key[None, :] - position[:, None]).to(tl.float32),
                slope,
                scale,
                softcap,
                True,
                LOCAL,
                HAS_SOFTCAP,
                HAS_ALIBI,
                PRECISION,
                WIDE_DOT,
            )
        # This step's tokens: first those that every row sees, then the diagonal.
        step_low = tl.maximum(low - cached, 0) // BLOCK_N * BLOCK_N
        step_high = tl.where(padding, 0, tl.minimum(count, offset + BLOCK_M))
        middle = tl.minimum(offset // BLOCK_N * BLOCK_N, step_high)
        key_base = key_ptr + start.to(tl.int64) * key_token + kv_head * key_head
        value_base = value_ptr + start.to(tl.int64) * value_token + kv_head * value_head
        for at in range(step_low, middle, BLOCK_N):
            key = at + tl.arange(0, BLOCK_N)
            if DESCRIPTORS:
                k = key_tiles.load([start + at, kv_head * HEAD_DIM])
                v = value_tiles.load([start + at, kv_head * VALUE_DIM])
            else:
                k = load_rows(key_base + key[:, None] * key_token, dims, HEAD_DIM, BLOCK_H)
                v = load_rows(value_base + key[:, None] * value_token, values, VALUE_DIM, BLOCK_V)
            seen = live[:, None]
            if LOCAL:
                seen = _near(cached + key, position, WINDOW, CHUNK)
            acc, top, total = fold_block(
                acc,
                top,
                total,
                q,
                k,
                v,
                seen,
                (key[None, :] - token[:, None]).to(tl.float32),
                slope,
                scale,
                softcap,
                LOCAL,
                LOCAL,
                HAS_SOFTCAP,
                HAS_ALIBI,
                PRECISION,
                WIDE_DOT,
            )
        for at in range(middle, step_high, BLOCK_N):
            key = at + tl.arange(0, BLOCK_N)
            held = tl.minimum(key, count - 1)[:, None]  # never another sequence's: it may hold a NaN
            k = load_rows(key_base + held * key_token, dims, HEAD_DIM, BLOCK_H)
            v = load_rows(value_base + held * value_token, values, VALUE_DIM, BLOCK_V)
            seen = key[None, :] <= token[:, None]
            if LOCAL:
                seen &= _near(cached + key, position, WINDOW, CHUNK)
            acc, top, total = fold_block(
                acc,
                top,
                total,
                q,
                k,
                v,
                seen,
                (key[None, :] - token[:, None]).to(tl.float32),
                slope,
                scale,
                softcap,
                True,
                LOCAL,
                HAS_SOFTCAP,
                HAS_ALIBI,
                PRECISION,
                WIDE_DOT,
            )
        total = tl.where(total > 0, total, 1.0)
        tl.store(
            out_ptr + ((row * HEADS + head) * VALUE_DIM)[:, None] + values[None, :],
            (acc / total[:, None]).to(kind),
            live[:, None] & (values < VALUE_DIM)[None, :],
        )


@triton.jit
def _near(key, position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Which keys [L] the window and the chunk let each row [M] see."""
    seen = key[None, :] >= 0
    if WINDOW > 0:
        seen &= position[:, None] - key[None, :] < WINDOW
    if CHUNK > 0:
        seen &= position[:, None] // CHUNK == key[None, :] // CHUNK
    return seen


def candidates(itemsize: int, BLOCK_H: int, BLOCK_V: int) -> list[Settings]:
    """Settings worth measuring; the first fits an A100's shared memory."""
    width = itemsize * max(BLOCK_H, BLOCK_V)
    if width > 512:
        tried = [(16, 16, 4, 2, 2)]
    elif width > 256:
        tried = [(64, 32, 4, 2, 3), (128, 64, 8, 2, 3)]
    else:
        tried = [(64, 64, 4, 3, 5), (128, 128, 8, 3, 5), (128, 64, 8, 3, 5)]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "HISTORY_STAGES")
    return [dict(zip(names, values, strict=True)) for values in tried]


def described(rows: Tensor, block_rows: int, block_dim: int) -> TensorDescriptor | None:
    """A descriptor of packed rows [T, K, dim]; None where the hardware cannot copy tiles of it."""
    tokens, heads, dim = rows.shape
    step = rows.stride(0) * rows.element_size()
    if dim != block_dim or step % 16 or rows.data_ptr() % 16:
        return None
    return TensorDescriptor(rows, [tokens, heads * dim], [rows.stride(0), 1], [block_rows, block_dim])


def launch(step: Step, *, settings: Settings | None = None, descriptors: bool = True) -> None:
    """Fill ``step.out`` for sequences of several tokens, or of one where it is alone; zeros for padding."""
    constants = step.constants
    if settings is None:
        settings = best(
            "flash_prefill",
            (*step.kind(), "long" if step.q.shape[0] >= 512 * step.sequences else "short"),
            candidates(step.q.element_size(), constants["BLOCK_H"], constants["BLOCK_V"]),
            lambda tried: launch(step, settings=tried),
        )
    tokens, heads = step.q.shape[:2]
    tiles = triton.cdiv(tokens, settings["BLOCK_M"]) + min(step.sequences, 8)
    keys = described(step.key, settings["BLOCK_N"], constants["BLOCK_H"])
    values = described(step.value, settings["BLOCK_N"], constants["BLOCK_V"])
    both = descriptors and keys is not None and values is not None
    prefill[(tiles * heads,)](
        step.q,
        step.out,
        step.key,
        step.value,
        keys if both else step.key,
        values if both else step.value,
        step.k_cache,
        step.v_cache,
        step.q if step.sinks is None else step.sinks,
        step.q if step.alibi_slopes is None else step.alibi_slopes,
        step.cu_seqlens,
        step.cache_lens,
        step.page_table,
        step.sequences,
        tokens,
        step.page_table.stride(0),
        step.q.stride(0),
        step.q.stride(1),
        step.key.stride(0),
        step.key.stride(1),
        step.value.stride(0),
        step.value.stride(1),
        **step.numbers(),
        **constants,
        FROM=2 if step.sequences > 1 else 1,
        DESCRIPTORS=both,
        BLOCK_R=32 if step.sequences < 32 else 256,  # and one more for padding
        **settings,
    )
