"""Experts without a look at the host: ``torch_moe`` for few pairs of token and expert, and for many.

A *pair* is one token and one of its k experts, numbered token * k + slot; P = T k pairs. Few of them (decode)
read each pair's weights as they are, vector by vector: two launches. Many are grouped by expert first
(:mod:`adkit.ops.triton.moe_grouped`). Sums are in float32; nothing is added atomically, so that the same
batch gives the same bits again.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton import pdl
from adkit.ops.triton.mlp import _act
from adkit.ops.triton.tuning import Settings, best

#: Up to so many pairs an expert few of them share one, and the weights are read pair by pair (measured).
_FEW = 0.5

# Of fifteen tried on an H100 (E 8 and 128, 2 to 256 pairs), one of these is always within 3% of the best.
_UP: tuple[Settings, ...] = (
    {"BLOCK_N": 2, "BLOCK_K": 2048, "num_warps": 4},
    {"BLOCK_N": 8, "BLOCK_K": 512, "num_warps": 4},
    {"BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4},
)
_DOWN: tuple[Settings, ...] = (
    {"BLOCK_N": 4, "BLOCK_K": 512, "num_warps": 4},
    {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4},
    {"BLOCK_N": 8, "BLOCK_K": 256, "num_warps": 4},
)


@dataclass(frozen=True)
class Gating:
    """What happens between an expert's projections, as the kernels take it."""

    act: str
    gated: bool
    interleaved: bool
    alpha: float | None
    limit: float | None
    up_offset: float

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the kernels of the first projection."""
        return {
            "alpha": float(self.alpha or 0.0),
            "limit": float(self.limit or 0.0),
            "up_offset": float(self.up_offset),
            "ACT": self.act,
            "GATED": self.gated,
            "INTERLEAVED": self.gated and self.interleaved,
            "HAS_ALPHA": self.alpha is not None,
            "HAS_LIMIT": self.limit is not None,
        }


@triton.jit
def gate_values(
    gate, up, alpha, limit, up_offset,
    ACT: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr,
):  # fmt: skip
    """``gate_fn`` of the reference on float32 values."""
    if HAS_LIMIT:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    if HAS_ALPHA:
        gated = gate * tl.sigmoid(alpha * gate)
    else:
        gated = _act(gate, ACT)
    return gated * (up + up_offset)


@triton.jit
def _up_pairs(
    x_ptr, ids_ptr, w_ptr, bias_ptr, h_ptr, experts, w_expert, w_row, w_col, alpha, limit, up_offset,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_LIMIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One pair and BLOCK_N of its F values. Pairs run fastest: those of one expert meet in the cache."""
    pdl.release(PDL)
    pair = tl.program_id(0)
    pdl.wait(PDL)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    if expert < experts:
        EVEN: tl.constexpr = D % BLOCK_K == 0 and F % BLOCK_N == 0
        ROWS: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
        TOTAL: tl.constexpr = 2 * F if INTERLEAVED else F
        rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        live = rows < TOTAL
        x_row = x_ptr + (pair // K).to(tl.int64) * D
        w_rows = w_ptr + expert * w_expert + rows[:, None] * w_row
        first = tl.zeros([ROWS, BLOCK_K], tl.float32)
        second = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for at in range(0, D, BLOCK_K):
            cols = at + tl.arange(0, BLOCK_K)
            here = w_rows + cols[None, :] * w_col
            if EVEN:
                w = tl.load(here)
                if GATED and not INTERLEAVED:
                    second_w = tl.load(here + F * w_row)
                x = tl.load(x_row + cols)
            else:
                mask = live[:, None] & (cols < D)[None, :]
                w = tl.load(here, mask, 0.0)
                if GATED and not INTERLEAVED:
                    second_w = tl.load(here + F * w_row, mask, 0.0)
                x = tl.load(x_row + cols, cols < D, 0.0)
            x = x.to(tl.float32)[None, :]
            first += w.to(tl.float32) * x
            if GATED and not INTERLEAVED:
                second += second_w.to(tl.float32) * x
        value = tl.sum(first, 1)
        if HAS_BIAS:
            biases = bias_ptr + expert * (2 * F if GATED else F)
            value += tl.load(biases + rows, live, 0.0).to(tl.float32)
        if GATED:
            if INTERLEAVED:
                value, up = tl.split(tl.reshape(value, [BLOCK_N, 2]))
            else:
                up = tl.sum(second, 1)
                if HAS_BIAS:
                    up += tl.load(biases + F + rows, live, 0.0).to(tl.float32)
            value = gate_values(value, up, alpha, limit, up_offset, ACT, HAS_ALPHA, HAS_LIMIT)
        else:
            value = _act(value, ACT)
        out = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(h_ptr + pair.to(tl.int64) * F + out, value.to(h_ptr.dtype.element_ty), out < F)


@triton.jit
def _down_tokens(
    h_ptr, ids_ptr, weights_ptr, w_ptr, bias_ptr, out_ptr, experts, w_expert, w_row, w_col,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token and BLOCK_N of its D values: the weighted sum over its experts."""
    pdl.release(PDL)
    token = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < D
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    biases = tl.zeros([BLOCK_N], tl.float32)
    pdl.wait(PDL)
    for slot in tl.static_range(K):
        expert = tl.load(ids_ptr + token * K + slot).to(tl.int64)
        there = (expert < experts).to(tl.int32)
        weight = tl.load(weights_ptr + token * K + slot).to(tl.float32)
        w_rows = w_ptr + expert * w_expert + rows[:, None] * w_row
        for at in range(0, F, BLOCK_K):
            cols = at + tl.arange(0, BLOCK_K)
            inside = cols < F * there
            w = tl.load(w_rows + cols[None, :] * w_col, live[:, None] & inside[None, :], 0.0)
            h = tl.load(h_ptr + (token * K + slot) * F + cols, inside, 0.0).to(tl.float32) * weight
            acc += w.to(tl.float32) * h[None, :]
        if HAS_BIAS:
            biases += tl.load(bias_ptr + expert * D + rows, rows < D * there, 0.0).to(tl.float32) * weight
    value = tl.sum(acc, 1) + biases
    tl.store(out_ptr + token * D + rows, value.to(out_ptr.dtype.element_ty), live)


def moe(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    act: str = "silu",
    transposed: bool = False,
    interleaved: bool = False,
    gated: bool = True,
    alpha: float | None = None,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> Tensor:
    """``torch_moe``: [T, D] -> [T, D]."""
    from adkit.ops.triton.moe_grouped import grouped

    if not hidden.numel():
        return torch.zeros_like(hidden)
    few = len(hidden) == 1 or topk_ids.numel() <= _FEW * gate_up.shape[0]
    # Kernels see [E, out, in] whichever way it lies in memory.
    return (pairwise if few else grouped)(
        hidden.contiguous(),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        gate_up.transpose(1, 2) if transposed else gate_up,
        down.transpose(1, 2) if transposed else down,
        None if gate_up_bias is None else gate_up_bias.contiguous(),
        None if down_bias is None else down_bias.contiguous(),
        Gating(act, gated, interleaved, alpha, limit, up_offset),
    )


def pairwise(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    up_w: Tensor,
    down_w: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gating: Gating,
) -> Tensor:
    """Each pair for itself; up_w [E, 2F, D] and down_w [E, D, F], of any strides."""
    tokens, d = hidden.shape
    k, (experts, _, f) = ids.shape[1], down_w.shape
    pairs = ids.numel()
    h, out = hidden.new_empty(pairs, f), torch.empty_like(hidden)

    def up(ids: Tensor, s: Settings) -> None:
        _up_pairs[(pairs, triton.cdiv(f, s["BLOCK_N"]))](
            hidden, ids, up_w, up_bias, h, experts, *up_w.stride(),
            D=d, F=f, K=k, HAS_BIAS=up_bias is not None, **gating.arguments, **s, **pdl.launch(),
        )  # fmt: skip

    def down(ids: Tensor, s: Settings) -> None:
        _down_tokens[(tokens, triton.cdiv(d, s["BLOCK_N"]))](
            h, ids, weights, down_w, down_bias, out, experts, *down_w.stride(),
            D=d, F=f, K=k, HAS_BIAS=down_bias is not None, **s, **pdl.launch(),
        )  # fmt: skip

    key = (experts, d, f, k, _layout(up_w), str(hidden.dtype), triton.next_power_of_2(pairs))
    up(ids, best("moe_up", key, _narrowed(_UP, d), lambda s: up(spread(ids, experts), s)))
    down(ids, best("moe_down", key, _narrowed(_DOWN, f), lambda s: down(spread(ids, experts), s)))
    return out


def spread(ids: Tensor, experts: int) -> Tensor:
    """Ids to measure with: warm-up tokens are all the same, and would all ask for the same experts."""
    return torch.arange(ids.numel(), device=ids.device).view_as(ids) % experts


def _narrowed(candidates: tuple[Settings, ...], width: int) -> list[Settings]:
    """The candidates with no block wider than the vectors."""
    widest = max(16, triton.next_power_of_2(width))
    narrow = [s | {"BLOCK_K": min(s["BLOCK_K"], widest)} for s in candidates]
    return [s for i, s in enumerate(narrow) if s not in narrow[:i]]


def _layout(w: Tensor) -> str:
    return "rows" if w.stride(2) == 1 else "columns"
