"""RMSNorm kernels: one program a row, computed in float32 and rounded where the reference rounds."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton import pdl


@triton.jit
def _rmsnorm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    width,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IN_FLOAT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.release(PDL)
    row = tl.program_id(0).to(tl.int64) * width
    cols = tl.arange(0, BLOCK)
    live = cols < width
    pdl.wait(PDL)
    x = tl.load(x_ptr + row + cols, live, 0.0)
    if HAS_RESIDUAL:
        kind = sum_ptr.dtype.element_ty
        residual = tl.load(residual_ptr + row + cols, live, 0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(kind)
        tl.store(sum_ptr + row + cols, x, live)
    else:
        kind = x_ptr.dtype.element_ty
    y = x.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, live, 0.0)
        if IN_FLOAT:
            y = y * (weight.to(tl.float32) + offset)
        else:
            weight = (weight.to(tl.float32) + offset).to(weight_ptr.dtype.element_ty)
            y = y.to(kind).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row + cols, y.to(out_ptr.dtype.element_ty), live)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    offset: float,
    in_float: bool,
    out_dtype: torch.dtype | None,
) -> Any:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x if residual is None else torch.empty_like(x, dtype=dtype)
    promoted = dtype if weight is None or in_float else torch.promote_types(dtype, weight.dtype)
    out = torch.empty_like(x, dtype=out_dtype or promoted)
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    if rows:
        _rmsnorm[(rows,)](
            x,
            x if residual is None else residual,
            x if weight is None else weight,
            out,
            total,
            width,
            eps,
            offset,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            IN_FLOAT=in_float,
            BLOCK=triton.next_power_of_2(width),
            **pdl.launch(),
        )
    return out, total


def rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch_rmsnorm``: input [..., D] -> [..., D]."""
    out: Tensor = _launch(input.contiguous(), None, weight, eps, weight_offset, weight_in_float, out_dtype)[0]
    return out


def fused_add_rmsnorm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch_fused_add_rmsnorm``: input and residual [..., D] -> normed and sum [..., D]."""
    x, other = (t.contiguous() for t in torch.broadcast_tensors(input, residual))
    found: tuple[Tensor, Tensor] = _launch(x, other, weight, eps, weight_offset, weight_in_float, out_dtype)
    return found
