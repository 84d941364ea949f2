"""Decode: one token of each sequence attends to its pages, the history cut into parts that run side by side.

A program takes one token, one kv head with all its query heads (rows padded to the 16 of ``tl.dot``), and
one part of the keys. How many parts a launch has room for is fixed by batch and kv heads, so that a CUDA graph
can capture it; how long a part is follows on the device from the sequence's length: short histories are
cut into fewer parts, and the programs left over end at once. Partial results are put together by the
program of a token and kv head that finishes last (a counter tells), so there is no second launch. After
flash-decoding (arXiv 2311.01282 describes the idea).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from adkit.ops.triton import pdl
from adkit.ops.triton.attention_step import Step
from adkit.ops.triton.counting import MOST_COUNTERS, counters
from adkit.ops.triton.flash import LOG2E, fold_block, load_rows, start_rows
from adkit.ops.triton.tuning import Settings, best

#: Programs that fill the GPUs this is for: four a multiprocessor.
PROGRAMS = 512


@triton.jit
def _sequence_of(token, cu_ptr, sequences):
    """The sequence that a token belongs to; ``sequences`` for a token behind the last."""
    low = 0
    high = sequences
    while low < high:
        middle = (low + high) // 2
        before = tl.load(cu_ptr + middle + 1) <= token
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _combine(
    partial_ptr,
    softmax_ptr,
    out_ptr,
    parts,
    HEADS_PER_KV: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Weigh partial results [parts, HEADS_PER_KV, VALUE_DIM] by their softmax, PARTS of them at a time."""
    head = tl.arange(0, GROUP)
    values = tl.arange(0, BLOCK_V)
    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, BLOCK_V], tl.float32)
    for at in range(0, parts, PARTS):
        part = at + tl.arange(0, PARTS)
        row = (part * HEADS_PER_KV)[:, None] + head[None, :]
        live = (part < parts)[:, None] & (head < HEADS_PER_KV)[None, :]
        # Another program wrote these a moment ago: read them where writes of all meet (".cg", the L2 cache).
        tops = tl.load(softmax_ptr + row * 2, live, float("-inf"), cache_modifier=".cg")
        totals = tl.load(softmax_ptr + row * 2 + 1, live, 0.0, cache_modifier=".cg")
        found = tl.load(
            partial_ptr + (row * VALUE_DIM)[:, :, None] + values[None, None, :],
            live[:, :, None] & (values < VALUE_DIM)[None, None, :],
            0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(tops - base[None, :])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(totals * weight, 0)
        acc = acc * shrink[:, None] + tl.sum(found * weight[:, :, None], 0)
        top = new_top
    tl.store(
        out_ptr + (head * VALUE_DIM)[:, None] + values[None, :],
        (acc / tl.where(total > 0, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty),
        (head < HEADS_PER_KV)[:, None] & (values < VALUE_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["sequences", "pages_stride"])
def decode(
    q_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    sinks_ptr,
    slopes_ptr,
    cu_ptr,
    cached_ptr,
    pages_ptr,
    partial_ptr,
    softmax_ptr,
    counter_ptr,
    sequences,
    pages_stride,
    q_token,
    q_head,
    scale,
    softcap,
    ALONE: tl.constexpr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_L: tl.constexpr,
    LEAST: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    RELEASE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tokens or sequences x KV_HEADS, parts).

    ALONE: the first axis counts tokens and every token is served. Otherwise it counts sequences, and those
    that bring one token are served. A part is at least LEAST keys long, or all there are.
    """
    if RELEASE:
        pdl.release(PDL)
    pdl.wait(PDL)
    pair = tl.program_id(0)
    part = tl.program_id(1)
    index = pair // KV_HEADS
    kv_head = pair % KV_HEADS
    token = tl.load(cu_ptr + index)
    end = tl.load(cu_ptr + index + 1)
    position = tl.load(cached_ptr + index)
    served = end - token == 1
    seq = index
    if ALONE:
        # Sequences of one token each: token t is sequence t, except where a batch is packed otherwise.
        if (token != index) | (end != index + 1):
            seq = _sequence_of(index, cu_ptr, sequences)
            position = index - tl.load(cu_ptr + seq) + tl.load(cached_ptr + seq, seq < sequences, 0)
        token = index
        served = True
    if not served:
        return
    low = 0
    if WINDOW > 0:
        low = tl.maximum(low, position - WINDOW + 1)
    if CHUNK > 0:
        low = tl.maximum(low, position // CHUNK * CHUNK)
    high = tl.where(seq < sequences, position + 1, low)  # padding has no keys
    blocks = tl.cdiv(high - low, BLOCK_L)
    part_blocks = tl.maximum(tl.cdiv(blocks, tl.num_programs(1)), LEAST // BLOCK_L)
    parts = tl.cdiv(blocks, part_blocks)
    if part >= tl.maximum(parts, 1):
        return
    begin = low + part * part_blocks * BLOCK_L
    end = tl.minimum(high, begin + part_blocks * BLOCK_L)

    row = tl.arange(0, BLOCK_M)
    live = row < HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + row
    dims = tl.arange(0, BLOCK_H)
    values = tl.arange(0, BLOCK_V)
    kind = out_ptr.dtype.element_ty
    q = tl.load(
        q_ptr + token.to(tl.int64) * q_token + (head * q_head)[:, None] + dims[None, :],
        live[:, None] & (dims < HEAD_DIM)[None, :],
        0.0,
    )
    top, total = start_rows(sinks_ptr, head, live, part == 0, BLOCK_M, HAS_SINKS)
    slope = total
    if HAS_ALIBI:
        slope = tl.load(slopes_ptr + head, live, 0.0).to(tl.float32) * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    pages_ptr += seq.to(tl.int64) * pages_stride
    for at in range(begin, end, BLOCK_L):
        key = at + tl.arange(0, BLOCK_L)
        held = tl.minimum(key, end - 1)  # beyond the end: any key that is there, and not counted
        page = tl.load(pages_ptr + held // PAGE_SIZE).to(tl.int64)
        slot = ((page * PAGE_SIZE + held % PAGE_SIZE) * KV_HEADS + kv_head)[:, None]
        k = load_rows(k_cache_ptr + slot * HEAD_DIM, dims, HEAD_DIM, BLOCK_H).to(kind)
        v = load_rows(v_cache_ptr + slot * VALUE_DIM, values, VALUE_DIM, BLOCK_V).to(kind)
        acc, top, total = fold_block(
            acc,
            top,
            total,
            q,
            k,
            v,
            (key < end)[None, :],
            (key - position).to(tl.float32)[None, :],
            slope,
            scale,
            softcap,
            True,
            False,
            HAS_SOFTCAP,
            HAS_ALIBI,
            PRECISION,
            WIDE_DOT,
        )

    out_row = (token.to(tl.int64) * KV_HEADS + kv_head) * HEADS_PER_KV
    if parts <= 1:
        total = tl.where(total > 0, total, 1.0)
        tl.store(
            out_ptr + ((out_row + row) * VALUE_DIM)[:, None] + values[None, :],
            (acc / total[:, None]).to(kind),
            live[:, None] & (values < VALUE_DIM)[None, :],
        )
    else:
        first = pair.to(tl.int64) * tl.num_programs(1) * HEADS_PER_KV
        mine = first + part * HEADS_PER_KV + row
        tl.store(
            partial_ptr + (mine * VALUE_DIM)[:, None] + values[None, :],
            acc,
            live[:, None] & (values < VALUE_DIM)[None, :],
        )
        tl.store(softmax_ptr + mine * 2, top, live)
        tl.store(softmax_ptr + mine * 2 + 1, total, live)
        tl.debug_barrier()  # every thread has stored before one of them counts
        if tl.atomic_add(counter_ptr + pair, 1, sem="acq_rel") == parts - 1:
            tl.store(counter_ptr + pair, 0)  # for the next launch
            _combine(
                partial_ptr + first * VALUE_DIM,
                softmax_ptr + first * 2,
                out_ptr + out_row * VALUE_DIM,
                parts,
                HEADS_PER_KV,
                VALUE_DIM,
                PARTS,
                GROUP,
                BLOCK_V,
            )


def parts_for(pairs: int, longest: int, least: int) -> int:
    """Parts that a launch has room for: enough programs to fill a GPU, none shorter than ``least`` keys.

    ``pairs``: tokens x kv heads; ``longest``: tokens that the page table has room for.
    """
    if pairs > MOST_COUNTERS:  # they fill a GPU without cutting anything
        return 1
    wanted = triton.next_power_of_2(max(1, PROGRAMS // pairs))
    return min(wanted, 32, triton.cdiv(longest, least))


def candidates(itemsize: int, BLOCK_H: int, BLOCK_V: int) -> list[Settings]:
    """Settings worth measuring. Page numbers are loaded ahead of keys: a block in flight takes two stages."""
    width = itemsize * (BLOCK_H + BLOCK_V)
    if width > 1024:
        tried = [(16, 4, 2)]
    elif width > 512:
        tried = [(32, 4, 2), (32, 4, 5)]
    else:
        tried = [(64, 4, 5), (32, 2, 7), (128, 4, 2)]
    return [{"BLOCK_L": n, "LEAST": 256, "num_warps": w, "num_stages": stages} for n, w, stages in tried]


def typical(step: Step) -> Step:
    """The step with histories of 1,000 tokens, as far as there is room: what settings are measured on.

    The step's own may be a warm-up's, which has none.
    """
    sequences, width = step.page_table.shape
    page_size, device = step.k_cache.shape[1], step.q.device
    order = torch.arange(sequences * width, dtype=torch.int32, device=device) % step.k_cache.shape[0]
    return replace(
        step,
        out=torch.empty_like(step.out),
        cu_seqlens=torch.arange(sequences + 1, dtype=torch.int32, device=device).clamp_(max=step.q.shape[0]),
        cache_lens=torch.full_like(step.cache_lens, min(1000, width * page_size - 1)),
        page_table=order.view(sequences, width),
    )


def launch(step: Step, *, alone: bool) -> None:
    """Fill ``step.out`` for sequences of one token; ``alone``: for every token, padding included."""
    made: list[Step] = []

    def attempt(settings: Settings) -> None:
        made[:] = made or [typical(step)]
        run(made[0], alone=alone, settings=settings)

    constants = step.constants
    settings = best(
        "flash_decoding",
        (*step.kind(), triton.next_power_of_2(step.sequences)),
        candidates(step.q.element_size(), constants["BLOCK_H"], constants["BLOCK_V"]),
        attempt,
    )
    run(step, alone=alone, settings=settings)


def run(step: Step, *, alone: bool, settings: Settings, parts: int | None = None) -> None:
    """Launch the kernel; ``parts`` where something else than the usual number is wanted."""
    constants = step.constants
    kv_heads, group = constants["KV_HEADS"], constants["HEADS_PER_KV"]
    value_dim, block_v = constants["VALUE_DIM"], constants["BLOCK_V"]
    pairs = step.sequences * kv_heads
    longest = step.page_table.shape[1] * constants["PAGE_SIZE"]
    parts = parts or parts_for(pairs, longest, settings["LEAST"])
    device = step.q.device
    rows = pairs * parts * group if parts > 1 else 0
    padded = triton.next_power_of_2(group)
    decode[(pairs, parts)](
        step.q,
        step.out,
        step.k_cache,
        step.v_cache,
        step.q if step.sinks is None else step.sinks,
        step.q if step.alibi_slopes is None else step.alibi_slopes,
        step.cu_seqlens,
        step.cache_lens,
        step.page_table,
        torch.empty(rows * value_dim, dtype=torch.float32, device=device),
        torch.empty(rows * 2, dtype=torch.float32, device=device),
        counters("flash_decoding", device),
        step.sequences,
        step.page_table.stride(0),
        step.q.stride(0),
        step.q.stride(1),
        **step.numbers(),
        **constants,
        ALONE=alone,
        BLOCK_M=max(16, padded),
        GROUP=padded,
        PARTS=max(1, min(8, 4096 // (padded * block_v))),
        # The layers after it stream weights of few rows through the L1 cache, which is what this kernel's shared
        # memory leaves: they are to start when it is gone. Tiles of more rows have large shared memory themselves.
        RELEASE=step.sequences > 8,
        **pdl.launch(),
        **settings,
    )
