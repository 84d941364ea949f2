"""Gated activation over a fused gate-up projection: one read of [..., 2F], one write of [..., F]."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton import pdl

_BLOCK = 1024


@triton.jit
def _act(x, ACT: tl.constexpr):
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # 0.5 x (1 + tanh u) = x sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "sigmoid")
        return tl.sigmoid(x)


@triton.jit
def _swiglu_packed(x_ptr, out_ptr, width, ACT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl.release(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = cols < width
    pdl.wait(PDL)
    gate = tl.load(x_ptr + row * 2 * width + cols, live, 0.0)
    up = tl.load(x_ptr + row * 2 * width + width + cols, live, 0.0)
    kind = out_ptr.dtype.element_ty
    gated = _act(gate.to(tl.float32), ACT).to(kind).to(tl.float32)  # the reference rounds the gate too
    tl.store(out_ptr + row * width + cols, (gated * up.to(tl.float32)).to(kind), live)


def swiglu_packed(gate_up: Tensor, act: str = "silu") -> Tensor:
    """``torch_swiglu_packed``: [..., 2F] -> [..., F]."""
    x = gate_up.contiguous()
    width = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(width))
        _swiglu_packed[(out.numel() // width, triton.cdiv(width, block))](
            x, out, width, ACT=act, BLOCK=block, **pdl.launch()
        )
    return out
