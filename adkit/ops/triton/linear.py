"""Linear layers of few rows, with the norm before and the gate or the residual sum after them, in one kernel.

A decode step reads every weight once and does little with it, so a layer's time is the weight's bytes over
the memory's rate, plus what starting a kernel costs. The norm needs no kernel of its own: rstd is one number
a row, so W norm(x) = rstd (W (g * x)), and the sum of squares is taken on the way. Four ways to compute the
layer, chosen by measurement (:func:`adkit.ops.triton.tuning.best`):

- ``rows``: up to 8 rows of input, multiplied in registers; a program holds BLOCK_N rows of the weight.
- ``stream``: the same for one row of input, by a fixed number of programs that stay and take BLOCK_N rows in turn.
- ``tiles``: up to 64 rows by ``tl.dot``; the sum over D may be split over SPLIT programs, of which
  the last one to finish adds the parts in their order, so that results do not vary.
- ``library``: norm, cuBLAS and gate one after another; always above 64 rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from adkit.ops.linear import fused_dtype, product
from adkit.ops.triton import pdl, tuning
from adkit.ops.triton.counting import counters
from adkit.ops.triton.linear_kernels import row_kernel, rows_kernel, stream_kernel, tiles_kernel
from adkit.ops.triton.mlp import swiglu_packed
from adkit.ops.triton.norm import rmsnorm

MOST_ROWS = 64
_AHEAD_BYTES = 16384
LIBRARY = {"path": "library"}


@dataclass(frozen=True)
class Layer:
    """One call without its weight, of which tuning uses copies: x [M, D], residual [M, F], the rest as in the op.

    ``out`` [M, F] is where the result goes, if not into memory of its own; it may be the residual.
    """

    x: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    residual: Tensor | None
    eps: float | None
    offset: float
    in_float: bool
    act: str | None
    out_dtype: torch.dtype | None = None
    out: Tensor | None = None

    def outs(self, weight: Tensor) -> int:
        """F."""
        return weight.shape[0] // (1 if self.act is None else 2)

    def may_inline(self, weight: Tensor) -> bool:
        """True where tiles may norm their input. A wide one would take twice the shared memory; and in float16 the
        product of input and norm's weight may leave the range, before rstd brings it back."""
        return self.eps is not None and self.x.dtype == weight.dtype != torch.float16

    def run(self, settings: tuning.Settings, weight: Tensor) -> Tensor:
        """[M, F], computed the way that ``settings`` name."""
        path = settings["path"]
        if path == "library":
            return self._library(weight)
        if path == "stream":
            return self._by_streams(settings, weight)
        return self._by_rows(settings, weight) if path == "rows" else self._by_tiles(settings, weight)

    def _normed(self, dtype: torch.dtype) -> Tensor:
        if self.eps is None:
            return self.x
        return rmsnorm(self.x, self.norm_weight, self.eps, self.offset, self.in_float, dtype)

    def _library(self, weight: Tensor) -> Tensor:
        x = self._normed(weight.dtype)
        dtype = fused_dtype(weight, self.residual, self.out_dtype)
        if (
            self.residual is not None
            and self.residual.dtype == dtype
            and self.bias is None
            and self.act is None
        ):
            if dtype == weight.dtype:
                return torch.addmm(self.residual, x, weight.t(), out=self.out)
            if x.is_cuda:
                return torch.addmm(self.residual, x, weight.t(), out_dtype=dtype, out=self.out)
        out = product(x, weight, self.bias, dtype)
        if self.act is not None:
            out = swiglu_packed(out, self.act)
        if self.residual is not None:
            out = (out + self.residual).to(dtype)
        return out if self.out is None else self.out.copy_(out)

    def _arguments(self, x: Tensor, weight: Tensor, norm: bool) -> tuple[Tensor, list[Any], dict[str, Any]]:
        """The output, and the arguments that all kernels have."""
        dtype = fused_dtype(weight, self.residual, self.out_dtype)
        out = x.new_empty((x.shape[0], self.outs(weight)), dtype=dtype) if self.out is None else self.out
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

    def _by_rows(self, settings: tuning.Settings, weight: Tensor) -> Tensor:
        out, pointers, flags = self._arguments(self.x, weight, self.eps is not None)
        (many, outs), width = out.shape, weight.shape[1]
        block, warps = settings["BLOCK_N"], settings["num_warps"]
        grid = (triton.cdiv(outs, block),)
        flags |= {
            "BLOCK_N": block,
            "BLOCK_K": warps * 32 * 16 // weight.element_size(),  # 16 bytes a thread: the widest load
            "num_warps": warps,
        }
        if many == 1:
            row_kernel[grid](*pointers, width, outs, self.eps or 0.0, self.offset, **flags)
        else:
            flags["ROWS"] = triton.next_power_of_2(many)
            rows_kernel[grid](*pointers, many, width, outs, self.eps or 0.0, self.offset, **flags)
        return out

    def _by_streams(self, settings: tuning.Settings, weight: Tensor) -> Tensor:
        out, pointers, flags = self._arguments(self.x, weight, self.eps is not None)
        outs, width = out.shape[1], weight.shape[1]
        block = settings["BLOCK_N"]
        programs = min(triton.cdiv(outs, block), settings["each"] * _processors(weight.device))
        stream_kernel[(programs,)](
            *pointers,
            width,
            outs,
            self.eps or 0.0,
            self.offset,
            BLOCK_N=block,
            BLOCK_K=triton.next_power_of_2(width),
            num_warps=settings["num_warps"],
            **flags,
        )
        return out

    def _by_tiles(self, settings: tuning.Settings, weight: Tensor) -> Tensor:
        inline = settings["inline"] and self.may_inline(weight)
        x = self.x if inline else self._normed(weight.dtype)
        out, pointers, flags = self._arguments(x, weight, inline)
        (many, outs), width = out.shape, weight.shape[1]
        rows, block, split = _padded(many), settings["BLOCK_N"], settings["SPLIT"]
        tiles = triton.cdiv(outs, block)
        parts = counts = x
        if split > 1:
            each = rows * block * (1 if self.act is None else 2) + rows
            parts = torch.empty(tiles * split * each, dtype=torch.float32, device=x.device)
            counts = counters("linear", x.device)
        tiles_kernel[(tiles, split)](
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
            AHEAD=_AHEAD_BYTES // block // weight.element_size(),
            PRECISION="ieee" if weight.dtype == torch.float32 else "tf32",
            WIDE_DOT=triton.knobs.runtime.interpret,  # the interpreter multiplies bfloat16 as integers
            num_warps=settings["num_warps"],
            num_stages=settings["num_stages"],
            **flags,
        )
        return out


def _padded(rows: int) -> int:
    return max(16, triton.next_power_of_2(rows))


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


#: BLOCK_N and programs a processor of streams; a thread has 32 or 64 columns.
_STREAMS = ((1, 4), (2, 2), (2, 4), (1, 8), (4, 2), (1, 2), (2, 1), (4, 1))
#: BLOCK_N and warps for so many rows in registers.
_IN_REGISTERS = {
    1: ((4, 4), (4, 2), (8, 4), (2, 4), (2, 8), (1, 4)),
    2: ((4, 2), (2, 4), (2, 8), (4, 4), (1, 4)),
    4: ((4, 2), (2, 4), (1, 4), (2, 8)),
    8: ((2, 2), (2, 4), (1, 4)),
}
#: BLOCK_N, BLOCK_K in 16 bits, stages and warps of tiles.
_TILES = ((32, 256, 3, 4), (16, 256, 4, 2), (32, 128, 6, 4), (64, 128, 4, 4))


@lru_cache
def candidates(rows: int, outs: int, width: int, inline: bool, dtype: torch.dtype) -> list[tuning.Settings]:
    """Ways worth trying for input [rows, width] and output [rows, outs], the best in general first.

    ``rows`` is a power of two; ``inline``: tiles may norm their input.
    """
    found: list[tuning.Settings] = [
        {"path": "rows", "BLOCK_N": block, "num_warps": warps} for block, warps in _IN_REGISTERS.get(rows, ())
    ]
    if rows == 1:
        columns = triton.next_power_of_2(width)
        found += [
            {"path": "stream", "BLOCK_N": block, "each": each, "num_warps": warps}
            for warps in dict.fromkeys(min(16, max(4, columns // n)) for n in (1024, 2048))
            for block, each in _STREAMS
        ]
        return [*found, LIBRARY]
    inlines = [True, False] if inline else [False]
    for block, columns, stages, warps in _TILES:
        tiles = triton.cdiv(outs, block)
        most = min(16, triton.cdiv(width, columns))
        fill = triton.next_power_of_2(triton.cdiv(90, tiles))  # programs for most SMs of an H100, or twice
        for split in dict.fromkeys((min(fill, most), min(2 * fill, most))):
            found += [
                {
                    "path": "tiles",
                    "BLOCK_N": block,
                    "BLOCK_K": columns * 2 // dtype.itemsize,
                    "SPLIT": split,
                    "inline": inline,
                    "num_warps": warps,
                    "num_stages": stages,
                }
                for inline in inlines
            ]
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
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch_fused_linear``: input [..., D], weight [F, D], residual [..., F] -> [..., F]."""
    x = input.reshape(-1, input.shape[-1]).contiguous()
    outs = weight.shape[0] // (1 if act is None else 2)
    other = None if residual is None else residual.reshape(-1, outs).contiguous()
    layer = Layer(x, bias, norm_weight, other, eps, weight_offset, weight_in_float, act, out_dtype)
    return layer.run(fastest(layer, weight), weight).view(*input.shape[:-1], outs)


def fused_linear_(
    residual: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    act: str | None = None,
) -> None:
    """``torch_fused_linear_``: input [..., D], weight [F, D]; residual [..., F] becomes the sum."""
    x = input.reshape(-1, input.shape[-1]).contiguous()
    to = residual.reshape(-1, residual.shape[-1]).contiguous()
    layer = Layer(x, bias, norm_weight, to, eps, weight_offset, weight_in_float, act, residual.dtype)
    settings = fastest(layer, weight)  # found without ``out``: the sum must be made once
    replace(layer, out=to).run(settings, weight)
    if to.data_ptr() != residual.data_ptr():  # its rows do not lie one after the other
        residual.copy_(to.view(residual.shape))


def fastest(layer: Layer, weight: Tensor) -> tuning.Settings:
    """The way to compute the layer that is fastest for so many rows, measured where it is not known."""
    rows = layer.x.shape[0]
    if not 0 < rows <= MOST_ROWS or not weight.is_contiguous():
        return LIBRARY
    return tuning.best("linear", key(layer, weight), ways(layer, weight), layer.run, streamed=(weight,))


def ways(layer: Layer, weight: Tensor) -> list[tuning.Settings]:
    """Ways worth trying for a layer and any others with its ``key``."""
    rows = triton.next_power_of_2(layer.x.shape[0])
    return candidates(rows, layer.outs(weight), weight.shape[1], layer.may_inline(weight), weight.dtype)


def key(layer: Layer, weight: Tensor) -> tuple[Any, ...]:
    """What the fastest way depends on."""
    norm = "norm" if layer.x.dtype == weight.dtype else f"norm({str(layer.x.dtype).removeprefix('torch.')})"
    parts = {norm: layer.eps is not None, "bias": layer.bias is not None, layer.act: layer.act is not None,
             "sum": layer.residual is not None}  # fmt: skip
    around = "+".join(str(name) for name, there in parts.items() if there) or "plain"
    dtype = str(weight.dtype).removeprefix("torch.")
    return triton.next_power_of_2(layer.x.shape[0]), *weight.shape, around, dtype
