"""Kernels by which ranks add up and gather tensors in each other's memory; ``collectives`` launches them.

Messages are counted in words of 32 bits, one float32 or two numbers of 16 bits, and in quarters of 16 bytes, so that
the compiler knows that it may read and write so much at once. Beside a word with two numbers of 16 bits stand two
float32 numbers of a wider residual, one value of 64 bits. Every rank adds the same numbers in the same order, rank 0's
first, so that all have the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from adkit.ops.triton import pdl


@triton.jit
def _numbers(words, KIND: tl.constexpr, PAIRED: tl.constexpr):
    """The lower and the upper number of each word, in float32; twice the same where it holds one."""
    if PAIRED:
        low = words.to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(KIND, bitcast=True).to(tl.float32)
    else:
        low = words.to(tl.float32, bitcast=True)
        high = low
    return low, high


@triton.jit
def _rounded(numbers, KIND: tl.constexpr):
    return numbers.to(KIND).to(tl.float32)


@triton.jit
def _words(low, high, KIND: tl.constexpr, PAIRED: tl.constexpr):
    """The inverse of ``_numbers``, rounding to KIND."""
    if PAIRED:
        lower = low.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        upper = high.to(KIND).to(tl.int16, bitcast=True).to(tl.int32) << 16
        return lower | upper
    else:
        return low.to(tl.int32, bitcast=True)


@triton.jit
def _floats(pairs):
    """The lower and the upper float32 number of each 64 bits."""
    low = pairs.to(tl.int32).to(tl.float32, bitcast=True)
    high = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def _pairs(low, high):
    """The inverse of ``_floats``."""
    lower = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return lower | (high.to(tl.int32, bitcast=True).to(tl.int64) << 32)


@triton.jit
def _memory(addresses_ptr, rank, KIND: tl.constexpr):
    """Where the memory of ``rank`` begins, as this rank sees it."""
    return tl.multiple_of(tl.load(addresses_ptr + rank).to(tl.pointer_type(KIND)), 16)


@triton.jit
def _give_up(waiting, TRAPS: tl.constexpr):
    """End the program with an error that the host sees: the other ranks do not come any more."""
    if TRAPS:
        tl.inline_asm_elementwise("trap; mov.u32 $0, $1;", "=r,r", [waiting], tl.int32, is_pure=False, pack=1)


@triton.jit
def _arrived(at, live, epoch, patience, TRAPS: tl.constexpr):
    """The words that a rank sends for ``epoch``: waits until each has come."""
    sent = tl.load(at, live, 0, volatile=True)
    waiting = tl.max((live & ((sent >> 32).to(tl.int32) != epoch)).to(tl.int32), 0)
    tries = 0
    while (waiting > 0) & (tries < patience):
        sent = tl.load(at, live, 0, volatile=True)
        waiting = tl.max((live & ((sent >> 32).to(tl.int32) != epoch)).to(tl.int32), 0)
        tries += 1
    if waiting > 0:
        _give_up(waiting, TRAPS)
    return sent.to(tl.int32)


@triton.jit(do_not_specialize=["quarters"])
def oneshot_kernel(
    x_ptr,
    out_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    inboxes_ptr,
    counts_ptr,
    quarters,
    width,
    capacity,
    eps,
    offset,
    patience,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IN_FLOAT: tl.constexpr,
    BLOCK: tl.constexpr,
    TRAPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every rank writes its words into all others' inboxes, and adds up (or gathers) what lies in its own.

    A word travels together with the number of the call, as 64 bits that are written and read in one piece: when the
    number is right the word is there, and no flag or fence is needed. Inboxes [2][WORLD][capacity] are used
    in turn. A rank writes for call n only when it has read everybody's words of call n - 1, which they sent after
    reading those of call n - 2, so nothing is overwritten that somebody has yet to read.

    A program has ``width`` words of the message (a row, where there is a norm), always the same places in the inbox,
    and a counter of its own, so programs need not know of each other.

    WIDE: the residual and its sum are float32 where the message has numbers of 16 bits. The sum over ranks is rounded
    to KIND all the same, as when it is made by itself; the normed row has KIND.
    """
    pdl.release(PDL)
    words = quarters * 4
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    at = program.to(tl.int64) * width + cols
    live = (cols < width) & (at < words)
    mine_ptr = _memory(inboxes_ptr, RANK, tl.int64)
    if NORM and HAS_WEIGHT:
        low_weight = tl.load(weight_ptr + cols * (1 + PAIRED), cols < width, 0.0).to(tl.float32) + offset
        high_weight = tl.load(weight_ptr + cols * (1 + PAIRED) + PAIRED, cols < width, 0.0).to(tl.float32)
        high_weight += offset
        if not IN_FLOAT:
            low_weight = _rounded(low_weight, weight_ptr.dtype.element_ty)
            high_weight = _rounded(high_weight, weight_ptr.dtype.element_ty)
    pdl.wait(PDL)
    epoch = tl.load(counts_ptr + program) + 1
    turn = (epoch & 1).to(tl.int64) * WORLD * capacity
    mine = tl.load(x_ptr + at, live, 0)
    tagged = (epoch.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    for step in tl.static_range(1, WORLD):
        theirs = _memory(inboxes_ptr, (RANK + step) % WORLD, tl.int64)
        tl.store(theirs + turn + RANK * capacity + at, tagged, live)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, live, 0)
        if WIDE:
            low_residual, high_residual = _floats(residual)
        else:
            low_residual, high_residual = _numbers(residual, KIND, PAIRED)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for source in tl.static_range(WORLD):
        got = mine
        if source != RANK:
            got = _arrived(mine_ptr + turn + source * capacity + at, live, epoch, patience, TRAPS)
        if GATHER:
            tl.store(out_ptr + source * words.to(tl.int64) + at, got, live)
        else:
            low_part, high_part = _numbers(got, KIND, PAIRED)
            low += low_part
            high += high_part
    tl.debug_barrier()  # every thread has read the counter
    tl.store(counts_ptr + program, epoch)
    if not GATHER:
        if HAS_RESIDUAL:
            low = _rounded(low, KIND) + low_residual
            high = _rounded(high, KIND) + high_residual
        if WIDE:
            tl.store(out_ptr + at, _pairs(low, high), live)
        else:
            tl.store(out_ptr + at, _words(low, high, KIND, PAIRED), live)
        if NORM:
            if not WIDE:
                low = _rounded(low, KIND)
                high = _rounded(high, KIND)
            squares = low * low
            if PAIRED:
                squares += high * high
            rstd = tl.rsqrt(tl.sum(squares, 0) / (width * (1 + PAIRED)) + eps)
            low *= rstd
            high *= rstd
            if HAS_WEIGHT:
                if not IN_FLOAT and not WIDE:
                    low = _rounded(low, KIND)
                    high = _rounded(high, KIND)
                low *= low_weight
                high *= high_weight
            tl.store(normed_ptr + at, _words(low, high, KIND, PAIRED), live)


@triton.jit
def _meet(
    flags_ptr,
    program,
    programs,
    epoch,
    patience,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    TRAPS: tl.constexpr,
):
    """Wait until this program has come here on every rank; then all that they wrote before can be read.

    Flags of a rank: [source][program].
    """
    tl.debug_barrier()
    for step in tl.static_range(1, WORLD):
        theirs = _memory(flags_ptr, (RANK + step) % WORLD, tl.int32)
        tl.atomic_xchg(theirs + RANK * programs + program, epoch, sem="release", scope="sys")
    here = _memory(flags_ptr, RANK, tl.int32)
    for step in tl.static_range(1, WORLD):
        flag = here + ((RANK + step) % WORLD) * programs + program
        tries = 0
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        # Counting goes around at 2^31, and the other rank may be one ahead.
        while (seen - epoch < 0) & (tries < patience):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            tries += 1
        if seen - epoch < 0:
            _give_up(seen, TRAPS)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["share_quarters"])
def twoshot_kernel(
    x_ptr,
    out_ptr,
    inboxes_ptr,
    flags_ptr,
    counts_ptr,
    share_quarters,
    capacity,
    patience,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    KIND: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
    TRAPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every rank adds up one share of the words and sends the sum to all.

    Share r is words [r * share, r * share + share). Inboxes [2][WORLD][capacity]: the parts to be added, then the sums.
    Programs take the blocks of every share in turn, the same on every rank, and meet twice a call, each with its
    namesakes on the other ranks only: parts are written when the sums of the call before have come, sums when the parts
    have, so nobody overwrites what another has yet to read.
    """
    pdl.release(PDL)
    share = share_quarters * 4
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    cols = tl.arange(0, BLOCK)
    mine_ptr = _memory(inboxes_ptr, RANK, tl.int32)
    pdl.wait(PDL)
    epoch = tl.load(counts_ptr + program) + 2  # this call's second meeting
    sums = WORLD * capacity
    for step in tl.static_range(1, WORLD):
        peer = (RANK + step) % WORLD
        theirs = _memory(inboxes_ptr, peer, tl.int32) + RANK * capacity
        for start in range(program * BLOCK, share, programs * BLOCK):
            here = start + cols
            live = here < share
            part = tl.load(x_ptr + peer * share + here, live, 0, eviction_policy="evict_first")
            tl.store(theirs + here, part, live)
    _meet(flags_ptr, program, programs, epoch - 1, patience, RANK, WORLD, TRAPS)
    for start in range(program * BLOCK, share, programs * BLOCK):
        here = start + cols
        live = here < share
        low = tl.zeros((BLOCK,), tl.float32)
        high = tl.zeros((BLOCK,), tl.float32)
        for source in tl.static_range(WORLD):
            if source == RANK:
                part = tl.load(x_ptr + RANK * share + here, live, 0)
            else:
                part = tl.load(mine_ptr + source * capacity + here, live, 0, cache_modifier=".cg")
            low_part, high_part = _numbers(part, KIND, PAIRED)
            low += low_part
            high += high_part
        total = _words(low, high, KIND, PAIRED)
        tl.store(out_ptr + RANK * share + here, total, live)
        for step in tl.static_range(1, WORLD):
            theirs = _memory(inboxes_ptr, (RANK + step) % WORLD, tl.int32)
            tl.store(theirs + sums + RANK * capacity + here, total, live)
    _meet(flags_ptr, program, programs, epoch, patience, RANK, WORLD, TRAPS)
    for step in tl.static_range(1, WORLD):
        peer = (RANK + step) % WORLD
        for start in range(program * BLOCK, share, programs * BLOCK):
            here = start + cols
            live = here < share
            part = tl.load(mine_ptr + sums + peer * capacity + here, live, 0, cache_modifier=".cg")
            tl.store(out_ptr + peer * share + here, part, live)
    tl.store(counts_ptr + program, epoch)
