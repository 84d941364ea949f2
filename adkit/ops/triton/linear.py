"""Linear layers of few rows, with the norm before and the gate or the residual sum after them, in one kernel.

A decode step reads every weight once and does little with it, so a layer's time is the weight's bytes over
the memory's rate, plus what starting a kernel costs. The norm needs no kernel of its own: rstd is one number
a row, so W norm(x) = rstd (W (g * x)), and the sum of squares is taken on the way. Three ways to compute the
layer, chosen by measurement (:func:`adkit.ops.triton.tuning.best`):

- ``row``: one row of input, multiplied in registers; a program holds BLOCK_N rows of the weight.
- ``tiles``: up to 64 rows by ``tl.dot``; the sum over D may be split over SPLIT programs, of which
  the last one to finish adds the parts in their order, so that results do not vary.
- ``library``: norm, cuBLAS and gate one after another; always above 64 rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton import pdl, tuning
from adkit.ops.triton.mlp import _act, swiglu_packed
from adkit.ops.triton.norm import rmsnorm

MOST_ROWS = 64
LIBRARY = {"path": "library"}


@triton.jit
def _norm_factor(norm_ptr, cols, live, offset, HAS_WEIGHT: tl.constexpr):
    """What the norm multiplies the columns by, beside rstd."""
    if HAS_WEIGHT:
        return tl.load(norm_ptr + cols, live, 0.0, eviction_policy="evict_last").to(tl.float32) + offset
    else:
        return tl.full(cols.shape, 1.0, tl.float32)


@triton.jit
def _row(
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
    """One row of x times BLOCK_N rows of the weight; the next block is on its way while one is multiplied."""
    pdl.release(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(rows, outs - 1).to(tl.int64)  # rows past the end read the last one again
    cols = tl.arange(0, BLOCK_K)
    at = weight_ptr + inside[:, None] * width + cols[None, :]
    up_at = at + outs.to(tl.int64) * width
    live = cols < width
    w = tl.load(at, live[None, :], 0.0, eviction_policy="evict_first")
    if ACT != "":
        up = tl.load(up_at, live[None, :], 0.0, eviction_policy="evict_first")
        up_total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    pdl.wait(PDL)
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
    write = rows < outs
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
        y += tl.load(residual_ptr + rows, write, 0.0).to(tl.float32)
    tl.store(out_ptr + rows, y.to(out_ptr.dtype.element_ty), write)


@triton.jit(do_not_specialize=["many", "splits"])
def _tiles(
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
    up_at = w_at + outs.to(tl.int64) * width
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    span = tl.cdiv(tl.cdiv(width, BLOCK_K), splits) * BLOCK_K
    pdl.wait(PDL)
    for start in range(part * span, tl.minimum(part * span + span, width), BLOCK_K):
        live = start + cols < width
        x = tl.load(x_at + start, live[None, :], 0.0, eviction_policy="evict_last")
        w = tl.load(w_at + start, live[:, None], 0.0, eviction_policy="evict_first")
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            x = (wide * _norm_factor(norm_ptr, start + cols, live, offset, HAS_NORM_WEIGHT)[None, :]).to(
                x.dtype
            )
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
    write = (m < many)[:, None] & (n < outs)[None, :]
    to = m.to(tl.int64)[:, None] * outs + n[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, n < outs, 0.0).to(tl.float32)[None, :]
    if ACT != "":
        if HAS_BIAS:
            up_total += tl.load(bias_ptr + outs + n, n < outs, 0.0).to(tl.float32)[None, :]
        total = _act(total, ACT) * up_total
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + to, write, 0.0).to(tl.float32)
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), write)


@dataclass(frozen=True)
class _Layer:
    """One call: x [M, D], residual [M, F] or None, and what surrounds the product; weights come apart."""

    x: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    residual: Tensor | None
    eps: float | None
    offset: float
    in_float: bool
    act: str | None

    def run(self, settings: tuning.Settings, weight: Tensor) -> Tensor:
        """[M, F], computed the way that ``settings`` name."""
        path = settings["path"]
        if path == "library":
            return self._library(weight)
        return self._by_row(settings, weight) if path == "row" else self._by_tiles(settings, weight)

    def normed(self) -> Tensor:
        if self.eps is None:
            return self.x
        return rmsnorm(self.x, self.norm_weight, self.eps, self.offset, self.in_float)

    def _library(self, weight: Tensor) -> Tensor:
        x = self.normed()
        if self.residual is not None and self.bias is None and self.act is None:
            return torch.addmm(self.residual, x, weight.t())
        out = F.linear(x, weight, self.bias)
        if self.act is not None:
            out = swiglu_packed(out, self.act)
        return out if self.residual is None else out + self.residual

    def _arguments(self, x: Tensor, weight: Tensor, norm: bool) -> tuple[Tensor, list[Any], dict[str, Any]]:
        """The output, and the arguments that both kernels have."""
        outs = weight.shape[0] // (1 if self.act is None else 2)
        out = x.new_empty((x.shape[0], outs))
        tensors = [self.bias, self.norm_weight, self.residual]
        pointers = [x, weight, *(x if t is None else t for t in tensors), out]
        flags = {
            "NORM": norm,
            "HAS_NORM_WEIGHT": self.norm_weight is not None,
            "HAS_BIAS": self.bias is not None,
            "HAS_RESIDUAL": self.residual is not None,
            "ACT": self.act or "",
            **pdl.launch(),
        }
        return out, pointers, flags

    def _by_row(self, settings: tuning.Settings, weight: Tensor) -> Tensor:
        out, pointers, flags = self._arguments(self.x, weight, self.eps is not None)
        outs, width = out.shape[1], weight.shape[1]
        block, warps = settings["BLOCK_N"], settings["num_warps"]
        _row[(triton.cdiv(outs, block),)](
            *pointers,
            width,
            outs,
            self.eps or 0.0,
            self.offset,
            BLOCK_N=block,
            BLOCK_K=warps * 32 * 16 // weight.element_size(),  # 16 bytes a thread: the widest load
            num_warps=warps,
            **flags,
        )
        return out

    def _by_tiles(self, settings: tuning.Settings, weight: Tensor) -> Tensor:
        inline = self.eps is not None and settings["inline"]
        x = self.x if inline else self.normed()
        out, pointers, flags = self._arguments(x, weight, inline)
        (many, outs), width = out.shape, weight.shape[1]
        rows, block, split = _padded(many), settings["BLOCK_N"], settings["SPLIT"]
        tiles = triton.cdiv(outs, block)
        parts = counts = x
        if split > 1:
            each = rows * block * (1 if self.act is None else 2) + rows
            parts = torch.empty(tiles * split * each, dtype=torch.float32, device=x.device)
            counts = _counts(x.device)
        _tiles[(tiles, split)](
            *pointers,
            parts,
            counts,
            many,
            split,
            width,
            outs,
            self.eps or 0.0,
            self.offset,
            BLOCK_M=rows,
            BLOCK_N=block,
            BLOCK_K=settings["BLOCK_K"],
            SPLIT=split > 1,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            WIDE_DOT=triton.knobs.runtime.interpret,  # the interpreter multiplies bfloat16 as integers
            num_warps=settings["num_warps"],
            num_stages=settings["num_stages"],
            **flags,
        )
        return out


def _padded(rows: int) -> int:
    return max(16, triton.next_power_of_2(rows))


_MOST_TILES = 1 << 16


@lru_cache
def _counts(device: torch.device) -> Tensor:
    """Programs that have finished, by tile: zero between launches, and never freed, since CUDA graphs hold
    it."""
    return torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)


def candidates(rows: int, outs: int, width: int, norm: bool, dtype: torch.dtype) -> list[tuning.Settings]:
    """Ways worth trying for input [rows, width] and output [rows, outs], the best in general first."""
    found: list[tuning.Settings] = []
    if rows == 1:
        for block, warps in ((4, 4), (2, 4), (1, 4), (8, 4), (2, 8), (4, 8)):
            found.append({"path": "row", "BLOCK_N": block, "num_warps": warps})
        return [*found, LIBRARY]
    # Times a norm's weight, a residual stream may leave float16's range before rstd brings it back.
    inlines = ([False] if dtype == torch.float16 else [True, False]) if norm else [False]
    for block, columns, stages in ((32, 128, 4), (64, 128, 4), (32, 256, 3)):
        tiles = triton.cdiv(outs, block)
        most = min(16, triton.cdiv(width, columns))
        fill = triton.next_power_of_2(
            triton.cdiv(132, tiles)
        )  # programs for every SM of an H100, once or twice
        for split in dict.fromkeys((min(fill, most), min(2 * fill, most))):
            for inline in inlines:
                found.append(
                    {
                        "path": "tiles",
                        "BLOCK_N": block,
                        "BLOCK_K": columns * 2 // dtype.itemsize,
                        "SPLIT": split,
                        "inline": inline,
                        "num_warps": 4,
                        "num_stages": stages,
                    }
                )
    return [*found, LIBRARY]


def fused_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    act: str | None = None,
) -> Tensor:
    """``torch_fused_linear``: input [..., D], weight [F, D], residual [..., F] -> [..., F]."""
    x = input.reshape(-1, input.shape[-1]).contiguous()
    outs = weight.shape[0] // (1 if act is None else 2)
    other = None if residual is None else residual.reshape(-1, outs).contiguous()
    layer = _Layer(x, bias, norm_weight, other, eps, weight_offset, weight_in_float, act)
    return layer.run(_settings(layer, weight, outs), weight).view(*input.shape[:-1], outs)


def _settings(layer: _Layer, weight: Tensor, outs: int) -> tuning.Settings:
    rows = layer.x.shape[0]
    if not 0 < rows <= MOST_ROWS or not weight.is_contiguous():
        return LIBRARY
    ways = candidates(
        triton.next_power_of_2(rows), outs, weight.shape[1], layer.eps is not None, weight.dtype
    )
    return tuning.best("linear", key(layer, weight), ways, layer.run, streamed=(weight,))


def key(layer: _Layer, weight: Tensor) -> tuple[Any, ...]:
    """What the fastest way depends on."""
    parts = {"norm": layer.eps is not None, "bias": layer.bias is not None, layer.act: layer.act is not None,
             "sum": layer.residual is not None}  # fmt: skip
    around = "+".join(str(name) for name, there in parts.items() if there) or "plain"
    dtype = str(weight.dtype).removeprefix("torch.")
    return triton.next_power_of_2(layer.x.shape[0]), *weight.shape, around, dtype
