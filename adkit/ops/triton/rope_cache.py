"""Norm of heads, RoPE and cache write in one launch: a program takes one token and a few heads of q, k or v.

Each head is read once where it stands in the fused projection, normalised and rotated in float32, and
written once to the output and, for keys and values, once to the cache. A warp has about 512 elements to
itself, so that every thread moves 16 bytes at a time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton import pdl


@triton.jit
def _load_pairs(
    ptr, live, HALF: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """What turns together, as two float32 tensors [ROWS, PAIRS]; ``ptr`` points at each row [ROWS, 1]."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(ptr + both, live & (both < 2 * HALF), 0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        inside = live & (pair < HALF)
        a = tl.load(ptr + pair, inside, 0.0).to(tl.float32)
        b = tl.load(ptr + HALF + pair, inside, 0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(
    ptr,
    a,
    b,
    live,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    kind = ptr.dtype.element_ty
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.reshape(tl.join(a, b), (ROWS, 2 * PAIRS))
        tl.store(ptr + both, x.to(kind), live & (both < 2 * HALF))
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        inside = live & (pair < HALF)
        tl.store(ptr + pair, a.to(kind), inside)
        tl.store(ptr + HALF + pair, b.to(kind), inside)


@triton.jit
def _scaled(x, scale, weight, kind: tl.constexpr, HAS_WEIGHT: tl.constexpr, IN_FLOAT: tl.constexpr):
    """x * scale * weight, rounded where ``torch_rmsnorm`` rounds."""
    y = x * scale
    if HAS_WEIGHT:
        if IN_FLOAT:
            y = y * weight
        else:
            y = y.to(kind).to(tl.float32) * weight
    return y.to(kind).to(tl.float32)


@triton.jit
def _turn(
    x_ptr,
    out_ptr,
    cache_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    live,
    eps,
    offset,
    NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    IN_FLOAT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    GROUP: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Normalise and rotate the heads at ``x_ptr`` [GROUP, 1]; write them to ``out_ptr`` and the cache."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    always = tl.full((1, 1), True, tl.int1)
    a, b = _load_pairs(x_ptr, live, HALF, PAIRS, GROUP, INTERLEAVED)
    cos_a, cos_b = _load_pairs(cos_ptr, always, HALF, PAIRS, 1, INTERLEAVED)
    sin_a, sin_b = _load_pairs(sin_ptr, always, HALF, PAIRS, 1, INTERLEAVED)
    if REST > 0:
        col = 2 * HALF + tl.arange(0, REST)[None, :]
        beyond = col < HEAD_DIM
        rest = tl.load(x_ptr + col, live & beyond, 0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        weight_a, weight_b = scale, scale
        if HAS_WEIGHT:
            weight_a, weight_b = _load_pairs(weight_ptr, always, HALF, PAIRS, 1, INTERLEAVED)
            weight_a, weight_b = weight_a + offset, weight_b + offset
            if not IN_FLOAT:
                weight_a = weight_a.to(weight_ptr.dtype.element_ty).to(tl.float32)
                weight_b = weight_b.to(weight_ptr.dtype.element_ty).to(tl.float32)
        a = _scaled(a, scale, weight_a, kind, HAS_WEIGHT, IN_FLOAT)
        b = _scaled(b, scale, weight_b, kind, HAS_WEIGHT, IN_FLOAT)
        if REST > 0:
            weight = scale
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + col, beyond, 0.0).to(tl.float32) + offset
                if not IN_FLOAT:
                    weight = weight.to(weight_ptr.dtype.element_ty).to(tl.float32)
            rest = _scaled(rest, scale, weight, kind, HAS_WEIGHT, IN_FLOAT)
    # Rounded once, so that the cache holds what the output says even where its dtype is wider.
    turned_a = (a * cos_a - b * sin_a).to(kind)
    turned_b = (b * cos_b + a * sin_b).to(kind)
    _store_pairs(out_ptr, turned_a, turned_b, live, HALF, PAIRS, GROUP, INTERLEAVED)
    if REST > 0:
        tl.store(out_ptr + col, rest.to(kind), live & beyond)
    if CACHE:
        _store_pairs(cache_ptr, turned_a, turned_b, live, HALF, PAIRS, GROUP, INTERLEAVED)
        if REST > 0:
            tl.store(cache_ptr + col, rest.to(kind).to(cache_ptr.dtype.element_ty), live & beyond)


@triton.jit
def _rope_kv_cache(
    q_ptr,
    k_ptr,
    v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    slot_ptr,
    q_out_ptr,
    k_out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    cos_token,
    sin_token,
    q_eps,
    k_eps,
    offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    Q_WEIGHT: tl.constexpr,
    K_WEIGHT: tl.constexpr,
    IN_FLOAT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    VALUES: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.release(PDL)
    Q_PARTS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    KV_PARTS: tl.constexpr = (KV_HEADS + GROUP - 1) // GROUP
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    nothing = tl.zeros((1, 1), tl.int32)
    cos_at = cos_ptr + token * cos_token + nothing
    sin_at = sin_ptr + token * sin_token + nothing
    pdl.wait(PDL)
    if part < Q_PARTS:
        head = part * GROUP + tl.arange(0, GROUP)[:, None]
        out = q_out_ptr + (token * HEADS + head) * HEAD_DIM
        _turn(
            q_ptr + token * q_token + head * q_head,
            out,
            out,
            q_weight_ptr + nothing,
            cos_at,
            sin_at,
            head < HEADS,
            q_eps,
            offset,
            Q_NORM,
            Q_WEIGHT,
            IN_FLOAT,
            INTERLEAVED,
            HEAD_DIM,
            HALF,
            PAIRS,
            REST,
            GROUP,
            False,
        )
    else:
        slot = tl.load(slot_ptr + token)
        part -= Q_PARTS
        if part < KV_PARTS:
            head = part * GROUP + tl.arange(0, GROUP)[:, None]
            _turn(
                k_ptr + token * k_token + head * k_head,
                k_out_ptr + (token * KV_HEADS + head) * HEAD_DIM,
                k_cache_ptr + (slot * KV_HEADS + head) * HEAD_DIM,
                k_weight_ptr + nothing,
                cos_at,
                sin_at,
                head < KV_HEADS,
                k_eps,
                offset,
                K_NORM,
                K_WEIGHT,
                IN_FLOAT,
                INTERLEAVED,
                HEAD_DIM,
                HALF,
                PAIRS,
                REST,
                GROUP,
                True,
            )
        else:
            head = (part - KV_PARTS) * GROUP + tl.arange(0, GROUP)[:, None]
            col = tl.arange(0, VALUES)[None, :]
            inside = (head < KV_HEADS) & (col < VALUE_DIM)
            value = tl.load(v_ptr + token * v_token + head * v_head + col, inside, 0.0)
            to = v_cache_ptr + (slot * KV_HEADS + head) * VALUE_DIM + col
            tl.store(to, value.to(v_cache_ptr.dtype.element_ty), inside)


def _rows(x: Tensor) -> Tensor:
    """[1, T, heads, dim] -> [T, heads, dim], the elements of a head one after another."""
    return x[0] if x.stride(3) == 1 else x[0].contiguous()


def rope_kv_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    interleaved: bool = False,
    q_eps: float | None = None,
    k_eps: float | None = None,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
) -> tuple[Tensor, Tensor]:
    """``torch_rope_kv_cache`` in one launch; nothing is copied but what the op says."""
    q, k, v = _rows(query), _rows(key), _rows(value)
    tokens, heads, head_dim = q.shape
    kv_heads, value_dim = v.shape[1:]
    rotary = cos.shape[-1]
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos, sin))
    q_out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    k_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    if tokens:
        width = triton.next_power_of_2(max(head_dim, value_dim))
        group = max(1, min(512 // width, triton.next_power_of_2(heads)))
        parts = triton.cdiv(heads, group) + 2 * triton.cdiv(kv_heads, group)
        _rope_kv_cache[(tokens, parts)](
            q,
            k,
            v,
            q if q_weight is None else q_weight,
            k if k_weight is None else k_weight,
            cos,
            sin,
            slot_mapping,
            q_out,
            k_out,
            k_cache,
            v_cache,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            cos.stride(1),
            sin.stride(1),
            0.0 if q_eps is None else q_eps,
            0.0 if k_eps is None else k_eps,
            weight_offset,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            VALUE_DIM=value_dim,
            Q_NORM=q_eps is not None,
            K_NORM=k_eps is not None,
            Q_WEIGHT=q_weight is not None,
            K_WEIGHT=k_weight is not None,
            IN_FLOAT=weight_in_float,
            INTERLEAVED=interleaved,
            HALF=rotary // 2,
            PAIRS=triton.next_power_of_2(max(1, rotary // 2)),
            REST=triton.next_power_of_2(head_dim - rotary) if rotary < head_dim else 0,
            VALUES=triton.next_power_of_2(value_dim),
            GROUP=group,
            num_warps=1,
            **pdl.launch(),
        )
    return q_out, k_out
