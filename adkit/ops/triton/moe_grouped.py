"""Experts for many tokens: pairs sorted by expert on the device, then one matrix product a block of rows.

    count    pairs of each expert, chunk by chunk                             [chunks, E]
    arrange  pairs by expert, and blocks of rows that have one expert each    [P], [3, blocks]
    up       gate and up of each sorted row, activation                       [P, F]
    down     times the routing weight, each row to its pair                   [P, D]
    combine  sum of a token's k rows                                          [T, D]

Sizes of grids come from shapes: at most P / BLOCK_M + min(E, P) blocks; those without rows return at once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton.mlp import _act
from adkit.ops.triton.moe import Gating, gate_values, spread
from adkit.ops.triton.tuning import Settings, best

_CHUNK = 256  # pairs that a program of the sort compares with each other
_GROUP = 8  # blocks of rows that share a piece of weights while it is in the cache


@triton.jit
def _count(ids_ptr, counts_ptr, pairs, experts, EXPERTS: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk of pairs: how many chose each expert."""
    chunk = tl.program_id(0)
    here = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + here, here < pairs, experts).to(tl.int32)
    there = ids < experts
    bins = tl.arange(0, EXPERTS)
    counts = tl.histogram(tl.where(there, ids, 0), EXPERTS)
    counts -= tl.where(bins == 0, tl.sum(1 - there.to(tl.int32), 0), 0)  # the others are no expert's
    tl.store(counts_ptr + chunk * EXPERTS + bins, counts)


@triton.jit
def _arrange(
    ids_ptr, counts_ptr, order_ptr, blocks_ptr, pairs, experts, chunks, blocks,
    BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """One chunk of pairs: where each goes. The first chunk also writes the blocks as (expert, first row, end
    of the expert's rows); those that are left have no expert (-1)."""
    chunk = tl.program_id(0)
    bins = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    for at in range(0, chunks, ROWS):
        rows = at + tl.arange(0, ROWS)
        counts = tl.load(counts_ptr + rows[:, None] * EXPERTS + bins[None, :], (rows < chunks)[:, None], 0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((rows < chunk)[:, None], counts, 0), 0)
    start = tl.cumsum(total, 0) - total
    if chunk == 0:
        count = (total + BLOCK_M - 1) // BLOCK_M
        first = tl.cumsum(count, 0) - count
        for i in range(0, tl.max(count, 0)):
            has = i < count
            tl.store(blocks_ptr + first + i, bins, has)
            tl.store(blocks_ptr + blocks + first + i, start + i * BLOCK_M, has)
            tl.store(blocks_ptr + 2 * blocks + first + i, start + total, has)
        for at in range(tl.sum(count, 0), blocks, CHUNK):
            rest = at + tl.arange(0, CHUNK)
            tl.store(blocks_ptr + rest, -1, rest < blocks)
    here = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + here, here < pairs, experts).to(tl.int32)
    there = ids < experts
    row = tl.gather(start + before, tl.where(there, ids, 0), 0)
    for at in range(chunk * CHUNK, (chunk + 1) * CHUNK, PART):
        others = at + tl.arange(0, PART)
        other_ids = tl.load(ids_ptr + others, others < pairs, experts).to(tl.int32)
        earlier = (ids[:, None] == other_ids[None, :]) & (others[None, :] < here[:, None])
        row += tl.sum(earlier.to(tl.int32), 1)
    tl.store(order_ptr + row, here, there)


@triton.jit
def _place(program, blocks, tiles, GROUP: tl.constexpr):
    """(block of rows, tile of columns): GROUP blocks go through the tiles side by side."""
    group = program // (GROUP * tiles)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inside = program % (GROUP * tiles)
    return group * GROUP + inside % size, inside // size


@triton.jit
def _product(
    a_rows, w_rows, w_col, live_m, live_n,
    ROWS: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, PRECISION: tl.constexpr, WIDE_DOT: tl.constexpr,
):  # fmt: skip
    """a [ROWS, WIDTH] times the transpose of w [COLS, WIDTH], both given as pointers to rows; float32.

    ``SWAP`` computes the transpose: few rows make a small second operand, but a first one must be 64 wide.
    """
    if SWAP:
        acc = tl.zeros([COLS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, COLS], tl.float32)
    for at in range(0, WIDTH, BLOCK_K):
        cols = at + tl.arange(0, BLOCK_K)
        if WIDTH % BLOCK_K == 0:
            a = tl.load(a_rows[:, None] + cols[None, :], live_m[:, None], 0.0)
            w = tl.load(w_rows[:, None] + cols[None, :] * w_col, live_n[:, None], 0.0)
        else:
            a = tl.load(a_rows[:, None] + cols[None, :], live_m[:, None] & (cols < WIDTH)[None, :], 0.0)
            inside = live_n[:, None] & (cols < WIDTH)[None, :]
            w = tl.load(w_rows[:, None] + cols[None, :] * w_col, inside, 0.0)
        if WIDE_DOT:  # the interpreter cannot multiply bfloat16
            a, w = a.to(tl.float32), w.to(tl.float32)
        if SWAP:
            acc = tl.dot(w, tl.trans(a), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _up_blocks(
    x_ptr, order_ptr, blocks_ptr, w_ptr, bias_ptr, h_ptr, blocks, tiles, w_expert, w_row, w_col,
    alpha, limit, up_offset,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_DOT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M sorted rows and BLOCK_N columns of the first projection, gated: half as many values of F.

    Columns of gate and up alternate in the tile, wherever they lie in memory, so that one product makes both.
    """
    block, tile = _place(tl.program_id(0), blocks, tiles, GROUP)
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    if expert >= 0:
        rows = tl.load(blocks_ptr + blocks + block) + tl.arange(0, BLOCK_M)
        live_m = rows < tl.load(blocks_ptr + 2 * blocks + block)
        token = tl.load(order_ptr + rows, live_m, 0) // K
        TOTAL: tl.constexpr = 2 * F if GATED else F
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        live_n = cols < TOTAL
        if GATED and not INTERLEAVED:
            cols = cols // 2 + (cols % 2) * F
        acc = _product(
            x_ptr + token.to(tl.int64) * D, w_ptr + expert * w_expert + cols * w_row, w_col, live_m, live_n,
            BLOCK_M, BLOCK_N, D, BLOCK_K, SWAP, PRECISION, WIDE_DOT,
        )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(bias_ptr + expert * TOTAL + cols, live_n, 0.0).to(tl.float32)[None, :]
        if GATED:
            OUT: tl.constexpr = BLOCK_N // 2
            gate, up = tl.split(tl.reshape(acc, [BLOCK_M, OUT, 2]))
            value = gate_values(gate, up, alpha, limit, up_offset, ACT, HAS_ALPHA, HAS_LIMIT)
            out = tile * OUT + tl.arange(0, OUT)
        else:
            value = _act(acc, ACT)
            out = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        at = h_ptr + rows.to(tl.int64)[:, None] * F + out[None, :]
        tl.store(at, value.to(h_ptr.dtype.element_ty), live_m[:, None] & (out < F)[None, :])


@triton.jit
def _down_blocks(
    h_ptr, order_ptr, blocks_ptr, weights_ptr, w_ptr, bias_ptr, y_ptr, blocks, tiles, w_expert, w_row, w_col,
    D: tl.constexpr, F: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_DOT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M sorted rows and BLOCK_N of D, weighted and sent back to the rows' pairs."""
    block, tile = _place(tl.program_id(0), blocks, tiles, GROUP)
    expert = tl.load(blocks_ptr + block).to(tl.int64)
    if expert >= 0:
        rows = tl.load(blocks_ptr + blocks + block) + tl.arange(0, BLOCK_M)
        live_m = rows < tl.load(blocks_ptr + 2 * blocks + block)
        pair = tl.load(order_ptr + rows, live_m, 0)
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        live_n = cols < D
        acc = _product(
            h_ptr + rows.to(tl.int64) * F, w_ptr + expert * w_expert + cols * w_row, w_col, live_m, live_n,
            BLOCK_M, BLOCK_N, F, BLOCK_K, SWAP, PRECISION, WIDE_DOT,
        )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(bias_ptr + expert * D + cols, live_n, 0.0).to(tl.float32)[None, :]
        acc *= tl.load(weights_ptr + pair, live_m, 0.0).to(tl.float32)[:, None]
        at = y_ptr + pair.to(tl.int64)[:, None] * D + cols[None, :]
        tl.store(at, acc.to(y_ptr.dtype.element_ty), live_m[:, None] & live_n[None, :])


@triton.jit
def _combine(y_ptr, ids_ptr, out_ptr, experts, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """One token: the sum over its experts; rows of pairs without an expert were never written."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(K):
        there = (tl.load(ids_ptr + token * K + slot) < experts).to(tl.int32)
        total += tl.load(y_ptr + (token * K + slot) * D + cols, cols < D * there, 0.0).to(tl.float32)
    tl.store(out_ptr + token * D + cols, total.to(out_ptr.dtype.element_ty), cols < D)


def arrange(ids: Tensor, experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Pairs sorted by expert, and blocks of at most ``block_m`` of them that have one expert.

    ids [T, k] -> order int32 [P] (filled up to the pairs that have an expert), blocks int32 [3, blocks]:
    expert (-1: no block), first row, end of the expert's rows. Pairs of an expert keep their order.
    """
    pairs, bins = ids.numel(), max(16, triton.next_power_of_2(experts))
    blocks = pairs // block_m + min(experts, pairs)
    chunk = min(_CHUNK, triton.next_power_of_2(max(pairs, 32)))
    chunks = triton.cdiv(pairs, chunk)
    counts, order, table = (
        torch.empty(n, dtype=torch.int32, device=ids.device) for n in (chunks * bins, pairs, 3 * blocks)
    )
    _count[(chunks,)](ids, counts, pairs, experts, EXPERTS=bins, CHUNK=chunk)
    rows = min(triton.next_power_of_2(chunks), max(1, 4096 // bins))
    _arrange[(chunks,)](
        ids, counts, order, table, pairs, experts, chunks, blocks,
        BLOCK_M=block_m, EXPERTS=bins, CHUNK=chunk, ROWS=rows, PART=32,
    )  # fmt: skip
    return order, table.view(3, blocks)


def rows_of_a_block(pairs: int, experts: int) -> int:
    """BLOCK_M: what an expert gets when all get the same, between 16 and 128."""
    return min(128, max(16, triton.next_power_of_2(triton.cdiv(pairs, experts))))


def _candidates(block_m: int, itemsize: int) -> list[Settings]:
    """Tiles for blocks of so many rows; few rows are bound by reading weights, many by the products."""
    if itemsize > 2:
        shapes = [(64, 32, 4, 2)]
    elif block_m < 64:
        shapes = [(64, 128, 4, 4), (128, 128, 4, 3)]
    else:
        shapes = [(256, 64, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3)]
    return [
        {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for n, k, warps, stages in shapes
    ]


def grouped(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    up_w: Tensor,
    down_w: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gating: Gating,
) -> Tensor:
    """All pairs, sorted by expert; up_w [E, 2F, D] and down_w [E, D, F], of any strides."""
    tokens, d = hidden.shape
    k, (experts, width, f) = ids.shape[1], (up_w.shape[0], up_w.shape[1], down_w.shape[2])
    pairs, block_m = ids.numel(), rows_of_a_block(ids.numel(), experts)
    h, y, out = hidden.new_empty(pairs, f), hidden.new_empty(pairs, d), torch.empty_like(hidden)
    common = {
        "BLOCK_M": block_m,
        "GROUP": _GROUP,
        "SWAP": block_m < 64,
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32",
        "WIDE_DOT": hidden.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
    }

    def up(order: Tensor, blocks: Tensor, s: Settings) -> None:
        tiles = triton.cdiv(width, s["BLOCK_N"])
        _up_blocks[(blocks.shape[1] * tiles,)](
            hidden, order, blocks, up_w, up_bias, h, blocks.shape[1], tiles, *up_w.stride(),
            D=d, F=f, K=k, HAS_BIAS=up_bias is not None, **gating.arguments, **common, **s,
        )  # fmt: skip

    def down(order: Tensor, blocks: Tensor, s: Settings) -> None:
        tiles = triton.cdiv(d, s["BLOCK_N"])
        _down_blocks[(blocks.shape[1] * tiles,)](
            h, order, blocks, weights, down_w, down_bias, y, blocks.shape[1], tiles, *down_w.stride(),
            D=d, F=f, HAS_BIAS=down_bias is not None, **common, **s,
        )  # fmt: skip

    key = (experts, d, f, k, str(up_w.stride(2) == 1), str(hidden.dtype), triton.next_power_of_2(pairs))
    candidates = _candidates(block_m, hidden.element_size())
    even: list[tuple[Tensor, Tensor]] = []  # only where something is measured

    def measured() -> tuple[Tensor, Tensor]:
        if not even:
            even.append(arrange(spread(ids, experts), experts, block_m))
        return even[0]

    order, blocks = arrange(ids, experts, block_m)
    up(order, blocks, best("moe_grouped_up", key, candidates, lambda s: up(*measured(), s)))
    down(order, blocks, best("moe_grouped_down", key, candidates, lambda s: down(*measured(), s)))
    block = min(1024, triton.next_power_of_2(d))
    _combine[(tokens, triton.cdiv(d, block))](y, ids, out, experts, D=d, K=k, BLOCK=block)
    return out
