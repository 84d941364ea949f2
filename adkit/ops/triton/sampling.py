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

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Vocabulary entries a program.
_SLICE = 4096
#: Upper bits of a float32 that tell values of a dtype apart.
_KEY_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}
#: What a pass hands to the next, float64 a row: where its interval begins, the sum before that, the sum
#: looked for, the last key in the top k, and the share of that key's tokens that top-k takes.
_STATE = 5


@triton.jit
def _slice_peak(x_ptr, top_ptr, at_ptr, row_stride, vocab, slices, SLICE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    col = part * SLICE + tl.arange(0, SLICE)
    x = tl.load(x_ptr + row * row_stride + col, col < vocab, float("-inf")).to(tl.float32)
    top, at = tl.max(tl.where(x != x, float("inf"), x), 0, return_indices=True)
    tl.store(top_ptr + row * slices + part, top)
    tl.store(at_ptr + row * slices + part, part * SLICE + at)


@triton.jit
def _row_peak(top_ptr, at_ptr, peak_ptr, token_ptr, slices, SLICES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SLICES)
    tops = tl.load(top_ptr + row * slices + part, part < slices, float("-inf"))
    peak, first = tl.max(tops, 0, return_indices=True)
    token = tl.load(at_ptr + row * slices + first).to(tl.int64)
    tl.store(peak_ptr + row, peak)
    tl.store(token_ptr + row, tl.where(tl.abs(peak) < float("inf"), token, -1))


@triton.jit
def _scores(x_ptr, row, part, row_stride, vocab, peak, temperature, DROP: tl.constexpr, SLICE: tl.constexpr):
    """A slice's scores (0 is the row's best), their keys in ascending order of rank, and what is inside."""
    col = part * SLICE + tl.arange(0, SLICE)
    x = tl.load(x_ptr + row * row_stride + col, col < vocab, float("-inf")).to(tl.float32)
    x = tl.where(x == 0.0, 0.0, x)  # one zero, not two
    bits = x.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits, 0x7FFFFFFF - bits) >> DROP
    return tl.div_rn(x - peak, temperature), key, col < vocab


@triton.jit
def _descend(sums_ptr, slices, low, below, target, SHIFT: tl.constexpr, SLICES: tl.constexpr):
    """The last of sixteen intervals before which less than ``target`` lies: start, sum before, sum within."""
    part = tl.arange(0, SLICES)[:, None]
    digit = tl.arange(0, 16)
    sums = tl.sum(tl.load(sums_ptr + part * 16 + digit[None, :], part < slices, 0.0), 0)
    before = below + tl.cumsum(sums, 0) - sums
    chosen = tl.maximum(tl.sum((before < target).to(tl.int32), 0) - 1, 0)
    low += chosen.to(tl.int64) << SHIFT
    below = tl.sum(tl.where(digit == chosen, before, 0.0), 0)
    return low, below, tl.sum(tl.where(digit == chosen, sums, 0.0), 0)


@triton.jit
def _state(
    state_ptr,
    sums_ptr,
    setting_ptr,
    row,
    rows,
    slices,
    AFTER: tl.constexpr,
    SHIFT: tl.constexpr,
    SLICES: tl.constexpr,
):
    """What is known once the pass before is summed up; ``AFTER`` says which that was.

    "nothing": none; "counts", "masses": one of several; "first masses": whose total is that of the top k;
    "last counts", "last masses": the search is over.
    """
    low = tl.zeros((), tl.int64)
    limit = tl.full((), 0xFFFFFFFF, tl.int64)
    below = tl.zeros((), tl.float64)
    share = tl.full((), 1.0, tl.float64)
    target = tl.load(setting_ptr + rows + row)
    if AFTER != "nothing":
        here = state_ptr + row * 5
        low = tl.load(here).to(tl.int64)
        below = tl.load(here + 1)
        target = tl.load(here + 2)
        limit = tl.load(here + 3).to(tl.int64)
        share = tl.load(here + 4)
        sums = sums_ptr + row * slices * 16
        if AFTER == "first masses":
            part = tl.arange(0, SLICES)[:, None]
            digit = tl.arange(0, 16)[None, :]
            total = tl.sum(tl.sum(tl.load(sums + part * 16 + digit, part < slices, 0.0), 0), 0)
            target = tl.load(setting_ptr + 2 * rows + row) * total
        low, below, within = _descend(sums, slices, low, below, target, SHIFT, SLICES)
        if AFTER == "last counts":
            share = tl.minimum((target - below) / tl.maximum(within, 1.0), 1.0)
            limit = low
            low = tl.zeros((), tl.int64)
            below = tl.zeros((), tl.float64)
        elif AFTER == "last masses":
            limit = tl.minimum(limit, low)
    return low, below, target, limit, share


@triton.jit
def _sum_digits(
    x_ptr,
    peak_ptr,
    setting_ptr,
    before_ptr,
    before_sums_ptr,
    state_ptr,
    sums_ptr,
    row_stride,
    vocab,
    rows,
    slices,
    MASS: tl.constexpr,
    AFTER: tl.constexpr,
    AFTER_SHIFT: tl.constexpr,
    SHIFT: tl.constexpr,
    DROP: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(setting_ptr + row).to(tl.float32)
    peak = tl.load(peak_ptr + row)
    if (temperature == 0) | (tl.abs(peak) == float("inf")):
        return
    low, below, target, limit, share = _state(
        before_ptr, before_sums_ptr, setting_ptr, row, rows, slices, AFTER, AFTER_SHIFT, SLICES
    )
    if part == 0:
        here = state_ptr + row * 5
        tl.store(here, low.to(tl.float64))
        tl.store(here + 1, below)
        tl.store(here + 2, target)
        tl.store(here + 3, limit.to(tl.float64))
        tl.store(here + 4, share)
    score, key, inside = _scores(x_ptr, row, part, row_stride, vocab, peak, temperature, DROP, SLICE)
    start = low.to(tl.uint32)
    inside &= key >= start
    digit = (key - start) >> SHIFT
    inside &= digit < 16
    digits = tl.arange(0, 16)
    sums = tl.zeros((16,), tl.float32)
    if tl.max(inside.to(tl.int32), 0) > 0:
        amount = tl.full((SLICE,), 1.0, tl.float32)
        if MASS:
            last = limit.to(tl.uint32)
            amount = tl.exp(score) * tl.where(
                key < last, 1.0, tl.where(key == last, share.to(tl.float32), 0.0)
            )
        amount = tl.where(inside, amount, 0.0)
        for d in tl.static_range(16):
            sums = tl.where(digits == d, tl.sum(tl.where(digit == d, amount, 0.0), 0), sums)
    tl.store(sums_ptr + (row * slices + part) * 16 + digits, sums.to(tl.float64))


@triton.jit
def _allowed(score, key, inside, limit, lowest):
    """exp(score) of what passes every filter, 0 of the others."""
    inside &= (key <= limit.to(tl.uint32)) & (score >= lowest)
    return tl.where(inside, tl.exp(score), 0.0).to(tl.float64)


@triton.jit
def _slice_mass(
    x_ptr,
    peak_ptr,
    setting_ptr,
    before_ptr,
    before_sums_ptr,
    limit_ptr,
    mass_ptr,
    row_stride,
    vocab,
    rows,
    slices,
    AFTER: tl.constexpr,
    AFTER_SHIFT: tl.constexpr,
    DROP: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    temperature = tl.load(setting_ptr + row).to(tl.float32)
    peak = tl.load(peak_ptr + row)
    if (temperature == 0) | (tl.abs(peak) == float("inf")):
        return
    _, _, _, limit, _ = _state(
        before_ptr, before_sums_ptr, setting_ptr, row, rows, slices, AFTER, AFTER_SHIFT, SLICES
    )
    if part == 0:
        tl.store(limit_ptr + row, limit)
    score, key, inside = _scores(x_ptr, row, part, row_stride, vocab, peak, temperature, DROP, SLICE)
    lowest = tl.load(setting_ptr + 3 * rows + row).to(tl.float32)
    tl.store(mass_ptr + row * slices + part, tl.sum(_allowed(score, key, inside, limit, lowest), 0))


@triton.jit
def _draw(
    x_ptr,
    peak_ptr,
    setting_ptr,
    limit_ptr,
    mass_ptr,
    token_ptr,
    row_stride,
    vocab,
    rows,
    slices,
    DROP: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Invert the row's distribution function, in vocabulary order: first to the slice, then within it."""
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
    score, key, inside = _scores(x_ptr, row, part, row_stride, vocab, peak, temperature, DROP, SLICE)
    lowest = tl.load(setting_ptr + 3 * rows + row).to(tl.float32)
    mass = _allowed(score, key, inside, tl.load(limit_ptr + row), lowest)
    upto = before + tl.cumsum(mass, 0)
    col = tl.arange(0, SLICE)
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
    new = logits.new_empty
    state = new((len(passes) + 1, rows, _STATE), dtype=torch.float64)
    sums = new((len(passes) + 1, rows, slices, 16), dtype=torch.float64)
    constants = {"DROP": 32 - bits, "SLICE": _SLICE, "SLICES": triton.next_power_of_2(slices), "num_warps": 8}
    sizes = (logits.stride(0), vocab, rows, slices)
    after, after_shift = "nothing", 0
    for i, (kind, shift) in enumerate(passes):
        _sum_digits[(rows, slices)](
            logits,
            peak,
            settings,
            state[max(i - 1, 0)],
            sums[max(i - 1, 0)],
            state[i],
            sums[i],
            *sizes,
            MASS=kind == "masses",
            AFTER=after,
            AFTER_SHIFT=after_shift,
            SHIFT=shift,
            **constants,
        )
        after = f"last {kind}" if shift == 0 else kind
        if kind == "masses" and shift == shifts[0]:
            after = f"first {kind}"
        after_shift = shift
    limit, mass = new(rows, dtype=torch.int64), new((rows, slices), dtype=torch.float64)
    found = (state[len(passes) - 1], sums[len(passes) - 1]) if passes else (state[0], sums[0])
    _slice_mass[(rows, slices)](
        logits,
        peak,
        settings,
        *found,
        limit,
        mass,
        *sizes,
        AFTER=after,
        AFTER_SHIFT=after_shift,
        **constants,
    )
    _draw[(rows,)](logits, peak, settings, limit, mass, tokens, *sizes, **constants)
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
            logits, top, at, logits.stride(0), vocab, slices, SLICE=_SLICE, num_warps=8
        )
        _row_peak[(rows,)](top, at, peak, tokens, slices, SLICES=triton.next_power_of_2(slices), num_warps=1)
    return tokens, peak
