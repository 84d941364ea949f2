"""Kernels of linear layers of few rows; :mod:`adkit.ops.triton.linear` chooses between them and launches them.

A residual is asked for before the products are made, not when the sum is. The sum may go over it, and programs that
write share cache lines with those that read: at the end of a program, with nothing else to do, such a read costs a
microsecond.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from adkit.ops.triton import pdl
from adkit.ops.triton.mlp import _act


@triton.jit
def _norm_factor(norm_ptr, cols, live, offset, HAS_WEIGHT: tl.constexpr):
    """What the norm multiplies the columns by, beside rstd."""
    if HAS_WEIGHT:
        return tl.load(norm_ptr + cols, live, 0.0, eviction_policy="evict_last").to(tl.float32) + offset
    else:
        return tl.full(cols.shape, 1.0, tl.float32)


@triton.jit
def row_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    width,
    outs,
    eps,
    offset,
    NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of x times BLOCK_N rows of the weight; the next block is on its way while one is multiplied.

    What ``rows_kernel`` does for one row, with a dimension less: it streams weights 3 to 4% faster.
    """
    pdl.release(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, outs - 1).to(tl.int64)  # rows past the end read the last one again
    cols = tl.arange(0, BLOCK_K)
    at = weight_ptr + inside[:, None] * width + cols[None, :]
    up_at = at + tl.cast(outs, tl.int64) * width
    live = cols < width
    w = tl.load(at, live[None, :], 0.0, eviction_policy="evict_first")
    if ACT != "":
        up = tl.load(up_at, live[None, :], 0.0, eviction_policy="evict_first")
        up_total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    write = rows < outs
    pdl.wait(PDL)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows, write, 0.0).to(tl.float32)
    for start in range(0, width, BLOCK_K):
        after = start + BLOCK_K + cols
        next_w = tl.load(at + start + BLOCK_K, (after < width)[None, :], 0.0, eviction_policy="evict_first")
        if ACT != "":
            next_up = tl.load(
                up_at + start + BLOCK_K, (after < width)[None, :], 0.0, eviction_policy="evict_first"
            )
        here = start + cols
        x = tl.load(x_ptr + here, here < width, 0.0, eviction_policy="evict_last").to(tl.float32)
        if NORM:
            squares += x * x
            x = x * _norm_factor(norm_ptr, here, here < width, offset, HAS_NORM_WEIGHT)
        total += w.to(tl.float32) * x[None, :]
        w = next_w
        if ACT != "":
            up_total += up.to(tl.float32) * x[None, :]
            up = next_up
    y = tl.sum(total, 1)
    if NORM:
        rstd = tl.rsqrt(tl.sum(squares, 0) / width + eps)
        y = y * rstd
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, write, 0.0).to(tl.float32)
    if ACT != "":
        other = tl.sum(up_total, 1)
        if NORM:
            other = other * rstd
        if HAS_BIAS:
            other += tl.load(bias_ptr + outs + rows, write, 0.0).to(tl.float32)
        y = _act(y, ACT) * other
    if HAS_RESIDUAL:
        y += residual
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), write)


@triton.jit
def stream_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    width,
    outs,
    eps,
    offset,
    NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of x times all rows of the weight, BLOCK_N whole ones at a time, by few programs that stay.

    A program reads x once, keeps it normed, and has the next rows of the weight on their way while it multiplies
    these: no starts and ends between them, which count the more the faster the memory is.
    """
    pdl.release(PDL)
    first = tl.program_id(0) * BLOCK_N
    cols = tl.arange(0, BLOCK_K)
    live = (cols < width)[None, :]
    rows = first + tl.arange(0, BLOCK_N)
    at = weight_ptr + rows.to(tl.int64)[:, None] * width + cols[None, :]
    up = tl.cast(outs, tl.int64) * width
    step = tl.num_programs(0) * BLOCK_N
    w = tl.load(at, live & (rows < outs)[:, None], 0.0, eviction_policy="evict_first")
    if ACT != "":
        w_up = tl.load(at + up, live & (rows < outs)[:, None], 0.0, eviction_policy="evict_first")
    pdl.wait(PDL)
    x = tl.load(x_ptr + cols, cols < width, 0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
        x = x * _norm_factor(norm_ptr, cols, cols < width, offset, HAS_NORM_WEIGHT) * rstd
    for start in range(first, outs, step):
        rows = start + tl.arange(0, BLOCK_N)
        write = rows < outs
        at += step.to(tl.int64) * width
        ahead = live & (rows + step < outs)[:, None]
        next_w = tl.load(at, ahead, 0.0, eviction_policy="evict_first")
        if ACT != "":
            next_up = tl.load(at + up, ahead, 0.0, eviction_policy="evict_first")
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + rows, write, 0.0).to(tl.float32)
        y = tl.sum(w.to(tl.float32) * x[None, :], 1)
        if HAS_BIAS:
            y += tl.load(bias_ptr + rows, write, 0.0).to(tl.float32)
        if ACT != "":
            other = tl.sum(w_up.to(tl.float32) * x[None, :], 1)
            if HAS_BIAS:
                other += tl.load(bias_ptr + outs + rows, write, 0.0).to(tl.float32)
            y = _act(y, ACT) * other
            w_up = next_up
        if HAS_RESIDUAL:
            y += residual
        tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), write)
        w = next_w


@triton.jit
def rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    many,
    width,
    outs,
    eps,
    offset,
    NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """All rows of x times BLOCK_N rows of the weight; one block is on its way while another is multiplied.

    Tensors lie as [row of x, row of the weight, column], with all threads along the columns, so that nothing
    crosses threads before the sums at the end.
    """
    pdl.release(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_K)[None, None, :]
    inside = tl.minimum(n, outs - 1).to(tl.int64)[None, :, None]  # past the end: the last one again
    at = weight_ptr + inside * width + cols
    up_at = weight_ptr + (inside + outs) * width + cols
    x_at = x_ptr + tl.minimum(m, many - 1)[:, None, None] * width + cols
    w = tl.load(at, cols < width, 0.0, eviction_policy="evict_first")
    if ACT != "":
        up = tl.load(up_at, cols < width, 0.0, eviction_policy="evict_first")
        up_total = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((ROWS, BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((ROWS, 1, BLOCK_K), tl.float32)
    write = (m < many)[:, None] & (n < outs)[None, :]
    to = m[:, None] * outs + n[None, :]
    pdl.wait(PDL)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + to, write, 0.0).to(tl.float32)
    for start in range(0, width, BLOCK_K):
        after = start + BLOCK_K
        next_w = tl.load(at + after, after + cols < width, 0.0, eviction_policy="evict_first")
        if ACT != "":
            next_up = tl.load(up_at + after, after + cols < width, 0.0, eviction_policy="evict_first")
        here = start + cols
        x = tl.load(x_at + start, here < width, 0.0, eviction_policy="evict_last").to(tl.float32)
        if NORM:
            squares += x * x
            x = x * _norm_factor(norm_ptr, here, here < width, offset, HAS_NORM_WEIGHT)
        total += w.to(tl.float32) * x
        w = next_w
        if ACT != "":
            up_total += up.to(tl.float32) * x
            up = next_up
    y = tl.sum(total, 2)
    if NORM:
        rstd = tl.rsqrt(tl.sum(squares, 2) / width + eps)
        y = y * rstd
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, n < outs, 0.0).to(tl.float32)[None, :]
    if ACT != "":
        other = tl.sum(up_total, 2)
        if NORM:
            other = other * rstd
        if HAS_BIAS:
            other += tl.load(bias_ptr + outs + n, n < outs, 0.0).to(tl.float32)[None, :]
        y = _act(y, ACT) * other
    if HAS_RESIDUAL:
        y += residual
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), write)


@triton.jit
def _ask_for(at):
    """Start reading from memory into the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["many", "splits"])
def tiles_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    out_ptr,
    parts_ptr,
    counts_ptr,
    many,
    splits,
    width,
    outs,
    eps,
    offset,
    NORM: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE_DOT: tl.constexpr,
    PDL: tl.constexpr,
):
    """All rows of x times BLOCK_N rows of the weight, over one of ``splits`` parts of the columns."""
    pdl.release(PDL)
    tile, part = tl.program_id(0), tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(n, outs - 1).to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    x_at = x_ptr + tl.minimum(m, many - 1).to(tl.int64)[:, None] * width + cols[None, :]
    w_at = weight_ptr + inside[None, :] * width + cols[:, None]
    up_at = weight_ptr + (inside + outs)[None, :] * width + cols[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    span = tl.cdiv(tl.cdiv(width, BLOCK_K), splits) * BLOCK_K
    if PDL:  # the weights' first AHEAD columns, by cache lines, while the predecessor ends
        line: tl.constexpr = 128 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
        ahead = tl.minimum(part * span + tl.arange(0, AHEAD // line) * line, width - 1)
        _ask_for(weight_ptr + inside[:, None] * width + ahead[None, :])
        if ACT != "":
            _ask_for(weight_ptr + (inside + outs)[:, None] * width + ahead[None, :])
    write = (m < many)[:, None] & (n < outs)[None, :]
    to = m.to(tl.int64)[:, None] * outs + n[None, :]
    pdl.wait(PDL)
    if HAS_RESIDUAL and not SPLIT:
        residual = tl.load(residual_ptr + to, write, 0.0).to(tl.float32)
    for start in range(part * span, tl.minimum(part * span + span, width), BLOCK_K):
        live = start + cols < width
        x = tl.load(x_at + start, live[None, :], 0.0, eviction_policy="evict_last")
        w = tl.load(w_at + start, live[:, None], 0.0, eviction_policy="evict_first")
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            x = wide * _norm_factor(norm_ptr, start + cols, live, offset, HAS_NORM_WEIGHT)[None, :]
            x = x.to(w.dtype)
        if WIDE_DOT:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision=PRECISION)
        if ACT != "":
            up = tl.load(up_at + start, live[:, None], 0.0, eviction_policy="evict_first")
            if WIDE_DOT:
                up = up.to(tl.float32)
            up_total = tl.dot(x, up, up_total, input_precision=PRECISION)
    if SPLIT:
        # Parts lie as [tile, part, product | gate's partner | squares].
        size: tl.constexpr = BLOCK_M * BLOCK_N
        stride: tl.constexpr = 2 * size + BLOCK_M if ACT != "" else size + BLOCK_M
        own = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        first = parts_ptr + tile.to(tl.int64) * splits * stride
        mine = first + part * stride
        tl.store(mine + own, total)
        if ACT != "":
            tl.store(mine + size + own, up_total)
        if NORM:
            tl.store(mine + stride - BLOCK_M + m, squares)
        tl.debug_barrier()  # every thread's part stands before one of them counts it
        if tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel") != splits - 1:
            return
        tl.store(counts_ptr + tile, 0)  # as the next launch wants it
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for i in range(splits):
            total += tl.load(first + i * stride + own, cache_modifier=".cg")
            if ACT != "":
                up_total += tl.load(first + i * stride + size + own, cache_modifier=".cg")
            if NORM:
                squares += tl.load(first + i * stride + stride - BLOCK_M + m, cache_modifier=".cg")
    if NORM:
        rstd = tl.rsqrt(squares / width + eps)[:, None]
        total = total * rstd
        up_total = up_total * rstd
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, n < outs, 0.0).to(tl.float32)[None, :]
    if ACT != "":
        if HAS_BIAS:
            up_total += tl.load(bias_ptr + outs + n, n < outs, 0.0).to(tl.float32)[None, :]
        total = _act(total, ACT) * up_total
    if HAS_RESIDUAL:
        if SPLIT:  # only the last program of a tile wants it
            residual = tl.load(residual_ptr + to, write, 0.0).to(tl.float32)
        total += residual
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), write)
