"""Choosing tokens from logits [L, V] on the device: the best one, or one drawn after top-k, top-p and min-p.

The vocabulary is cut into slices of ``_SLICE`` entries, a program each, so that one row keeps many
multiprocessors busy. Nothing is sorted. Every filter comes down to a lowest score that is still allowed, found
digit by digit as in radix selection: the bits of a float, flipped where needed, order as the numbers do, so
a score has a key (0 is the highest score there can be), and each pass sums what the sixteen values of the next
four bits hold: tokens for top-k, probability for top-p. What a pass found is worked out at the head of
the next one, by every program for itself, because a launch of its own would cost more. Sums within a slice
are float32, between slices float64, always in the same order and cut: a row does not depend on its batch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton import pdl

#: Vocabulary entries a program.
_SLICE = 4096
#: Columns that a pass looks at together: one a thread.
_LANES = 256
#: Upper bits of a float32 that tell values of a dtype apart.
_KEY_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}
#: What a pass hands to the next, float64 a row: where its interval begins, the sum before that, the sum
#: looked for, the last key in the top k, and the share of that key's tokens that top-k takes.
_STATE = tl.constexpr(5)


@triton.jit
def _slice_peak(x_ptr, top_ptr, at_ptr, row_stride, vocab, slices, SLICE: tl.constexpr, PDL: tl.constexpr):
    pdl.release(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    col = part * SLICE + tl.arange(0, SLICE)
    x = tl.load(x_ptr + row * row_stride + col, col < vocab, float("-inf")).to(tl.float32)
    top, at = tl.max(tl.where(x != x, float("inf"), x), 0, return_indices=True)
    tl.store(top_ptr + row * slices + part, top)
    tl.store(at_ptr + row * slices + part, part * SLICE + at)


@triton.jit
def _row_peak(top_ptr, at_ptr, peak_ptr, token_ptr, slices, SLICES: tl.constexpr, PDL: tl.constexpr):
    pdl.release(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SLICES)
    tops = tl.load(top_ptr + row * slices + part, part < slices, float("-inf"))
    peak, first = tl.max(tops, 0, return_indices=True)
    token = tl.load(at_ptr + row * slices + first).to(tl.int64)
    tl.store(peak_ptr + row, peak)
    tl.store(token_ptr + row, tl.where(tl.abs(peak) < float("inf"), token, -1))


@triton.jit
def _scores(x_ptr, col, vocab, peak, temperature, DROP: tl.constexpr):
    """Scores of a row's columns (0 is the row's best), their keys, and which columns there are."""
    x = tl.load(x_ptr + col, col < vocab, float("-inf")).to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)  # one zero, not two
    bits = x.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits, 0x7FFFFFFF - bits) >> DROP
    return tl.div_rn(x - peak, temperature), key, col < vocab


@triton.jit
def _state(
    state_ptr,
    sums_ptr,
    setting_ptr,
    row,
    part,
    rows,
    slices,
    number,
    shift,
    AFTER: tl.constexpr,
    SLICES: tl.constexpr,
):
    """What pass ``number`` starts from: the state of the one before, and what that one summed up.

    ``AFTER`` says which that was: "nothing"; "counts" or "masses", one of several; "first masses", whose total
    is that of the top k; "last counts" or "last masses", with which the search is over. ``shift`` was that one's.
    """
    low = tl.zeros((), tl.int64)
    limit = tl.full((), 0xFFFFFFFF, tl.int64)
    below = tl.zeros((), tl.float64)
    share = tl.full((), 1.0, tl.float64)
    target = tl.load(setting_ptr + rows + row)
    if AFTER != "nothing":
        here = state_ptr + ((number - 1) * rows + row) * _STATE
        low = tl.load(here).to(tl.int64)
        below = tl.load(here + 1)
        target = tl.load(here + 2)
        limit = tl.load(here + 3).to(tl.int64)
        share = tl.load(here + 4)
        at = tl.arange(0, SLICES)[:, None]
        digit = tl.arange(0, 16)
        sums_ptr += ((number - 1) * rows + row) * slices * 16
        sums = tl.sum(tl.load(sums_ptr + at * 16 + digit[None, :], at < slices, 0.0), 0)
        if AFTER == "first masses":
            target = tl.load(setting_ptr + 2 * rows + row) * tl.sum(sums, 0)
        # On to the last of the sixteen intervals before which less than the target lies.
        before = below + tl.cumsum(sums, 0) - sums
        chosen = tl.maximum(tl.sum((before < target).to(tl.int32), 0) - 1, 0)
        low += chosen.to(tl.int64) << shift
        below = tl.sum(tl.where(digit == chosen, before, 0.0), 0)
        if AFTER == "last counts":
            within = tl.sum(tl.where(digit == chosen, sums, 0.0), 0)
            share = tl.minimum((target - below) / tl.maximum(within, 1.0), 1.0)
            limit = low
            low = tl.zeros((), tl.int64)
            below = tl.zeros((), tl.float64)
        elif AFTER == "last masses":
            limit = tl.minimum(limit, low)
    if part == 0:
        here = state_ptr + (number * rows + row) * _STATE
        tl.store(here, low.to(tl.float64))
        tl.store(here + 1, below)
        tl.store(here + 2, target)
        tl.store(here + 3, limit.to(tl.float64))
        tl.store(here + 4, share)
    return low, limit, share


@triton.jit(do_not_specialize=["rows", "number", "after_shift", "shift"])
def _sum_digits(
    x_ptr,
    peak_ptr,
    setting_ptr,
    state_ptr,
    sums_ptr,
    row_stride,
    vocab,
    rows,
    slices,
    number,
    after_shift,
    shift,
    AFTER: tl.constexpr,
    MASS: tl.constexpr,
    DROP: tl.constexpr,
    SLICE: tl.constexpr,
    LANES: tl.constexpr,
    SLICES: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.release(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(setting_ptr + row).to(tl.float32)
    peak = tl.load(peak_ptr + row)
    if (temperature == 0) | (tl.abs(peak) == float("inf")):
        return
    low, limit, share = _state(
        state_ptr, sums_ptr, setting_ptr, row, part, rows, slices, number, after_shift, AFTER, SLICES
    )
    start, last = low.to(tl.uint32), limit.to(tl.uint32)
    digits = tl.arange(0, 16)
    # A lane adds up its own columns digit by digit; only at the end do lanes meet.
    totals = tl.zeros((16, LANES), tl.float32)
    for at in range(0, SLICE, LANES):
        col = part * SLICE + at + tl.arange(0, LANES)
        score, key, inside = _scores(x_ptr + row * row_stride, col, vocab, peak, temperature, DROP)
        digit = (key - start) >> shift
        amount = tl.where(inside & (key >= start), 1.0, 0.0)
        if MASS:
            taken = tl.where(key < last, 1.0, tl.where(key == last, share.to(tl.float32), 0.0))
            amount = tl.where(amount > 0, tl.exp(score) * taken, 0.0)
        totals += tl.where(digit[None, :] == digits[:, None], amount[None, :], 0.0)
    sums_ptr += ((number * rows + row) * slices + part) * 16
    tl.store(sums_ptr + digits, tl.sum(totals, 1).to(tl.float64))


@triton.jit
def _allowed(score, key, inside, limit, lowest):
    """exp(score) of what passes every filter, 0 of the others."""
    inside &= (key <= limit.to(tl.uint32)) & (score >= lowest)
    return tl.where(inside, tl.exp(score), 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["rows", "number", "after_shift"])
def _slice_mass(
    x_ptr,
    peak_ptr,
    setting_ptr,
    state_ptr,
    sums_ptr,
    mass_ptr,
    row_stride,
    vocab,
    rows,
    slices,
    number,
    after_shift,
    AFTER: tl.constexpr,
    DROP: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.release(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(setting_ptr + row).to(tl.float32)
    peak = tl.load(peak_ptr + row)
    if (temperature == 0) | (tl.abs(peak) == float("inf")):
        return
    _, limit, _ = _state(
        state_ptr, sums_ptr, setting_ptr, row, part, rows, slices, number, after_shift, AFTER, SLICES
    )
    col = part * SLICE + tl.arange(0, SLICE)
    score, key, inside = _scores(x_ptr + row * row_stride, col, vocab, peak, temperature, DROP)
    lowest = tl.load(setting_ptr + 3 * rows + row).to(tl.float32)
    tl.store(mass_ptr + row * slices + part, tl.sum(_allowed(score, key, inside, limit, lowest), 0))


@triton.jit(do_not_specialize=["rows", "number"])
def _draw(
    x_ptr,
    peak_ptr,
    setting_ptr,
    state_ptr,
    mass_ptr,
    token_ptr,
    row_stride,
    vocab,
    rows,
    slices,
    number,
    DROP: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Invert the row's distribution function, in vocabulary order: first to the slice, then within it."""
    pdl.release(PDL)
    pdl.wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(setting_ptr + row).to(tl.float32)
    peak = tl.load(peak_ptr + row)
    if (temperature == 0) | (tl.abs(peak) == float("inf")):
        return
    parts = tl.arange(0, SLICES)
    mass = tl.load(mass_ptr + row * slices + parts, parts < slices, 0.0)
    upto = tl.cumsum(mass, 0)
    at = tl.load(setting_ptr + 4 * rows + row) * tl.sum(mass, 0)
    last = tl.max(tl.where(mass > 0, parts, 0), 0)
    part = tl.minimum(tl.min(tl.where((upto > at) & (mass > 0), parts, SLICES), 0), last)
    before = tl.sum(tl.where(parts == part, upto - mass, 0.0), 0)
    col = tl.arange(0, SLICE)
    score, key, inside = _scores(x_ptr + row * row_stride, part * SLICE + col, vocab, peak, temperature, DROP)
    limit = tl.load(state_ptr + (number * rows + row) * _STATE + 3).to(tl.int64)
    lowest = tl.load(setting_ptr + 3 * rows + row).to(tl.float32)
    mass = _allowed(score, key, inside, limit, lowest)
    upto = before + tl.cumsum(mass, 0)
    # Rounding may leave nothing beyond ``at``: then it is the last token that can be drawn at all.
    last = tl.max(tl.where(mass > 0, col, 0), 0)
    chosen = tl.minimum(tl.min(tl.where((upto > at) & (mass > 0), col, SLICE), 0), last)
    tl.store(token_ptr + row, (part * SLICE + chosen).to(tl.int64))


def greedy(logits: Tensor) -> Tensor:
    """The best token of each row, the first of several, int64 [L]; -1 where the row is not finite.

    logits [L, V] in bfloat16, float16 or float32. A row is not finite when it holds NaN or +inf, or nothing
    but -inf.
    """
    return _best(_rows(logits))[0]


def draw(logits: Tensor, settings: Tensor, top_k: bool, top_p: bool) -> Tensor:
    """A token of each row drawn from what its filters leave, int64 [L]; -1 where the row is not finite.

    logits [L, V] as in :func:`greedy`; settings float64 [5, L]: temperature (0 takes the best token), k (inf:
    no top-k), p (inf: no top-p), the log of min-p (-inf: none), and a number in [0, 1) at which the
    distribution function, in vocabulary order, is inverted. Order of filters and ties as in
    ``adkit.runtime.sampler``. ``top_k``, ``top_p``: whether any row has such a filter. Waits for nothing.
    """
    logits = _rows(logits)
    tokens, peak = _best(logits)
    rows, vocab = logits.shape
    slices = triton.cdiv(vocab, _SLICE)
    if not rows:
        return tokens
    bits = _KEY_BITS[logits.dtype]
    shifts = range(bits - 4, -1, -4)
    passes = [(kind, shift) for kind, on in (("counts", top_k), ("masses", top_p)) if on for shift in shifts]
    state = logits.new_empty((len(passes) + 1, rows, _STATE.value), dtype=torch.float64)
    sums = logits.new_empty((len(passes), rows, slices, 16), dtype=torch.float64)
    mass = logits.new_empty((rows, slices), dtype=torch.float64)
    sizes = (logits.stride(0), vocab, rows, slices)
    constants: dict[str, Any] = {
        "DROP": 32 - bits,
        "SLICE": _SLICE,
        "SLICES": triton.next_power_of_2(slices),
        "num_warps": 8,
    }
    constants |= pdl.launch()
    after, after_shift = "nothing", 0
    for i, (kind, shift) in enumerate(passes):
        _sum_digits[(rows, slices)](
            logits, peak, settings, state, sums, *sizes, i, after_shift, shift,
            AFTER=after, MASS=kind == "masses", LANES=min(_SLICE, _LANES), **constants,
        )  # fmt: skip
        first = kind == "masses" and shift == shifts[0]
        after, after_shift = ("last " if shift == 0 else "first " if first else "") + kind, shift
    _slice_mass[(rows, slices)](
        logits, peak, settings, state, sums, mass, *sizes, len(passes), after_shift, AFTER=after, **constants
    )
    _draw[(rows,)](logits, peak, settings, state, mass, tokens, *sizes, len(passes), **constants)
    return tokens


def _rows(logits: Tensor) -> Tensor:
    """Logits in a dtype that has keys, the entries of a row one after another."""
    logits = logits if logits.dtype in _KEY_BITS else logits.float()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 [L] as :func:`greedy` gives them, and each row's highest logit float32 [L]."""
    rows, vocab = logits.shape
    slices = triton.cdiv(vocab, _SLICE)
    top = logits.new_empty((rows, slices), dtype=torch.float32)
    at = logits.new_empty((rows, slices), dtype=torch.int32)
    peak = logits.new_empty(rows, dtype=torch.float32)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    if rows:
        _slice_peak[(rows, slices)](
            logits, top, at, logits.stride(0), vocab, slices, SLICE=_SLICE, num_warps=8, **pdl.launch()
        )
        _row_peak[(rows,)](
            top, at, peak, tokens, slices, SLICES=triton.next_power_of_2(slices), num_warps=1, **pdl.launch()
        )
    return tokens, peak
