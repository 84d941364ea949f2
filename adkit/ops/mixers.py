"""What the cache passes need to know of each kind of token mixer: one descriptor a kind, by source op."""

from __future__ import annotations

from typing import Any

import torch

from adkit.contract import CACHE_INPUTS, CacheSpec, MixerDescriptor
from adkit.ops import cached_attention, triton  # noqa: F401  (they define the cached ops)

_CONSTANTS = ("scale", "is_causal", "softcap", "window", "chunk")


def _specs(values: dict[str, Any], page_size: int, dtype: torch.dtype, prefix: str) -> tuple[CacheSpec, ...]:
    """Two caches, pages [page_size, K, H] and [page_size, K, Hv]."""
    return tuple(
        CacheSpec(f"{prefix}_{letter}_cache", (page_size, *(int(d) for d in values[name].shape[2:])), dtype)
        for letter, name in (("k", "key"), ("v", "value"))
    )


def _constants(values: dict[str, Any]) -> dict[str, Any]:
    defaults = {"scale": None, "is_causal": True, "softcap": None, "window": None, "chunk": None}
    return {name: values.get(name, defaults[name]) for name in _CONSTANTS}


def _refuse(values: dict[str, Any]) -> str | None:
    layout = values.get("layout", "bsnd")
    if layout != "bsnd":
        return f"its layout is {layout!r}; cached attention takes 'bsnd' (match_attention_layout converts)"
    if not values.get("is_causal", True):
        return "it is not causal: later tokens change what earlier ones attend to, which no cache can serve"
    if values.get("attn_bias") is not None:
        return (
            "it takes a general attn_bias [B, N, S, S], which has no meaning for a packed batch; "
            "express it as window, chunk, sinks or alibi_slopes"
        )
    return None


ATTENTION = MixerDescriptor(
    name="attention",
    source_op=torch.ops.adkit.torch_attention.default,
    cached_ops={
        "torch": torch.ops.adkit.torch_attention_with_paged_cache.default,
        "triton": torch.ops.adkit.triton_attention_with_paged_cache.default,
    },
    tensor_args=("query", "key", "value", "attn_bias", "sinks", "alibi_slopes"),
    metadata=CACHE_INPUTS,
    cache_specs=_specs,
    constants=_constants,
    refuse=_refuse,
)

#: Descriptors by the canonical op they cache.
MIXERS: dict[Any, MixerDescriptor] = {d.source_op: d for d in (ATTENTION,)}
