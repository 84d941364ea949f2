"""One block of keys folded into a running softmax: the arithmetic that decode and prefill kernels share.

Scores are kept in units of log 2, so that ``exp2`` needs no multiplication of its own (arXiv 2307.08691);
the running maximum and sum are those of arXiv 1805.02867.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def start_rows(sinks_ptr, head, live, first, BLOCK_M: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Maximum and sum of the softmax before any key; a sink is a key with a known score and no value.

    The sink is counted where ``first`` is true: by one of the programs that share a row.
    """
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, live, 0.0).to(tl.float32) * LOG2E
        top = tl.where(first, sink, top)
        total = tl.where(first, 1.0, total)
    return top, total


@triton.jit
def fold_block(
    acc,
    top,
    total,
    q,
    k,
    v,
    seen,
    distance,
    slope,
    scale,
    softcap,
    MASKED: tl.constexpr,
    BLIND_ROWS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE_DOT: tl.constexpr,
):
    """Fold keys and values [L, dim] into the rows' acc [M, dim], top [M] and total [M].

    ``seen`` [M or 1, L] counts if MASKED; ``distance`` [M, L] (key - query, negative) and ``slope`` [M] if
    HAS_ALIBI. BLIND_ROWS: a row may have seen no key yet. ``scale`` and ``softcap`` hold the factor log2(e),
    softcap's inverse aside; ``scale`` is positive.
    """
    kind = q.dtype
    if WIDE_DOT:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_SOFTCAP:
        # tanh x = 2 sigmoid(2x) - 1, and x = scores * scale / softcap has no log2(e) left in it.
        scores = softcap * (2 * tl.sigmoid(2 * scores * (scale / softcap)) - 1)
    if HAS_ALIBI:
        if HAS_SOFTCAP:
            scores += slope[:, None] * distance
        else:
            scores = scores * scale + slope[:, None] * distance
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    if HAS_SOFTCAP or HAS_ALIBI:
        new_top = tl.maximum(top, tl.max(scores, 1))
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    base = new_top
    if BLIND_ROWS:
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    if HAS_SOFTCAP or HAS_ALIBI:
        probs = tl.exp2(scores - base[:, None])
    else:
        probs = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(probs, 1)
    probs = probs.to(kind)
    if WIDE_DOT:
        probs = probs.to(tl.float32)
    acc = tl.dot(probs, v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def load_rows(pointers, dims, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [L, BLOCK] of DIM elements each, zeros beyond; every pointer [L, 1] is valid."""
    if DIM == BLOCK:
        return tl.load(pointers + dims[None, :])
    else:
        return tl.load(pointers + dims[None, :], (dims < DIM)[None, :], 0.0)
