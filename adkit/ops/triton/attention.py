"""Attention over the paged cache: what to launch for a packed batch, and the kernel that writes the cache.

Tokens that are their sequence's only one go to :mod:`flash_decoding`, longer ones to :mod:`flash_prefill`. A
batch may hold both, and only the device knows which are which: then both kernels run over the whole batch
and each leaves out the other's sequences, so nothing waits for the host. The decode kernel alone serves any
batch of as many tokens as sequences, and a CUDA graph can capture it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton import flash_decoding, flash_prefill
from adkit.ops.triton.attention_step import Step


@triton.jit
def _write_kv(
    key_ptr,
    value_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slot_ptr,
    k_width,
    v_width,
    key_token,
    value_token,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    k = tl.load(key_ptr + token * key_token + cols, cols < k_width)
    tl.store(k_cache_ptr + slot * k_width + cols, k.to(k_cache_ptr.dtype.element_ty), cols < k_width)
    v = tl.load(value_ptr + token * value_token + cols, cols < v_width)
    tl.store(v_cache_ptr + slot * v_width + cols, v.to(v_cache_ptr.dtype.element_ty), cols < v_width)


def _packed(x: Tensor) -> Tensor:
    """[1, T, heads, dim] -> [T, heads, dim] whose heads of a token lie together."""
    x = x[0]
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def write_kv(key: Tensor, value: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Put key [1, T, K, H] and value [1, T, K, Hv] into their slots of the caches, in place."""
    key, value = _packed(key), _packed(value)
    k_width, v_width = key.shape[1] * key.shape[2], value.shape[1] * value.shape[2]
    if key.shape[0]:
        _write_kv[(key.shape[0],)](
            key,
            value,
            k_cache,
            v_cache,
            slot_mapping,
            k_width,
            v_width,
            key.stride(0),
            value.stride(0),
            BLOCK=triton.next_power_of_2(max(k_width, v_width)),
        )


def attention_with_paged_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_seqlens: Tensor,
    cache_lens: Tensor,
    page_table: Tensor,
    slot_mapping: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = True,
    softcap: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """``torch_attention_with_paged_cache``, scores and sums in float32; raises ValueError as it does."""
    if attn_bias is not None or not is_causal:
        given = "attn_bias" if attn_bias is not None else "is_causal=False"
        raise ValueError(
            f"cached attention was given {given}; it serves causal attention without a general bias"
        )
    if slot_mapping is not None:
        write_kv(key, value, slot_mapping, k_cache, v_cache)
    q = query[0] if query.stride(3) == 1 else query[0].contiguous()
    tokens, heads, head_dim = q.shape
    if scale is None:
        scale = head_dim**-0.5
    elif scale <= 0:  # the kernels take the largest score before they scale
        q, scale = q * scale, 1.0
    step = Step(
        q=q,
        key=_packed(key),
        value=_packed(value),
        out=q.new_empty((tokens, heads, value.shape[3])),
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        cu_seqlens=cu_seqlens,
        cache_lens=cache_lens,
        page_table=page_table,
        k_cache=k_cache,
        v_cache=v_cache,
        scale=scale,
        softcap=softcap,
        window=window,
        chunk=chunk,
    )
    if not step.sequences:
        step.out.zero_()
    elif tokens == step.sequences:
        flash_decoding.launch(step, alone=True)
    elif tokens:
        flash_prefill.launch(step)
        if step.sequences > 1:
            flash_decoding.launch(step, alone=False)
    return step.out.unsqueeze(0)
