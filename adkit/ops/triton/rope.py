"""Rotary position embedding of q and k: one program a token and tensor, every head at once, in float32."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotate(
    x_ptr,
    out_ptr,
    cos_ptr,
    sin_ptr,
    seq_len,
    heads,
    head_dim,
    rotary,
    x_batch,
    x_token,
    x_head,
    x_dim,
    out_batch,
    out_token,
    out_head,
    cos_batch,
    cos_token,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    batch = (tl.program_id(0) // seq_len).to(tl.int64)
    token = (tl.program_id(0) % seq_len).to(tl.int64)
    x_ptr += batch * x_batch + token * x_token
    out_ptr += batch * out_batch + token * out_token
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * cos_batch + token * cos_token
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)
    turns = pair < rotary // 2
    if INTERLEAVED:
        first = pair * 2
        second = pair * 2 + 1
    else:
        first = pair
        second = pair + rotary // 2
    live = (head < heads) & turns[None, :]
    a = tl.load(x_ptr + head * x_head + first[None, :] * x_dim, live, 0.0).to(tl.float32)
    b = tl.load(x_ptr + head * x_head + second[None, :] * x_dim, live, 0.0).to(tl.float32)
    cos_a = tl.load(cos_ptr + first, turns, 0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + second, turns, 0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + first, turns, 0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + second, turns, 0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    tl.store(
        out_ptr + head * out_head + first[None, :], (a * cos_a[None, :] - b * sin_a[None, :]).to(kind), live
    )
    tl.store(
        out_ptr + head * out_head + second[None, :], (b * cos_b[None, :] + a * sin_b[None, :]).to(kind), live
    )
    if REST > 0:
        col = rotary + tl.arange(0, REST)[None, :]
        live = (head < heads) & (col < head_dim)
        tl.store(out_ptr + head * out_head + col, tl.load(x_ptr + head * x_head + col * x_dim, live), live)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, interleaved: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads_at = unsqueeze_dim % x.dim()
    token_at = 3 - heads_at
    batch, seq_len, heads, head_dim = x.shape[0], x.shape[token_at], x.shape[heads_at], x.shape[3]
    rotary = cos.shape[-1]
    cos, sin = (t.expand(batch, seq_len, rotary).contiguous() for t in (cos, sin))
    if out.numel():
        rest = head_dim - rotary
        _rotate[(batch * seq_len,)](
            x,
            out,
            cos,
            sin,
            seq_len,
            heads,
            head_dim,
            rotary,
            x.stride(0),
            x.stride(token_at),
            x.stride(heads_at),
            x.stride(3),
            out.stride(0),
            out.stride(token_at),
            out.stride(heads_at),
            cos.stride(0),
            cos.stride(1),
            INTERLEAVED=interleaved,
            HEADS=triton.next_power_of_2(heads),
            PAIRS=triton.next_power_of_2(max(rotary // 2, 1)),
            REST=triton.next_power_of_2(rest) if rest else 0,
        )
    return out


def rope_with_explicit_cos_sin(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """``torch_rope_with_explicit_cos_sin``: q and k [B, S, N, H] or [B, N, S, H], cos and sin [B, S, R]."""
    return _launch(q, cos, sin, unsqueeze_dim, False), _launch(k, cos, sin, unsqueeze_dim, False)


def rope_with_qk_interleaving(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """``torch_rope_with_qk_interleaving``: shapes as in ``rope_with_explicit_cos_sin``."""
    return _launch(q, cos, sin, unsqueeze_dim, True), _launch(k, cos, sin, unsqueeze_dim, True)
