"""One step's attention as its kernels take it: tensors without the batch axis, and what is compiled in."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor

from adkit.ops.triton.flash import LOG2E


@dataclass(frozen=True)
class Step:
    """What decode and prefill kernels are launched with.

    ``q`` [T, N, H], ``key`` [T, K, H], ``value`` [T, K, Hv] and ``out`` [T, N, Hv].
    """

    q: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    cu_seqlens: Tensor
    cache_lens: Tensor
    page_table: Tensor
    k_cache: Tensor
    v_cache: Tensor
    scale: float
    softcap: float | None
    window: int | None
    chunk: int | None

    @property
    def group(self) -> int:
        """Query heads a kv head."""
        return self.q.shape[1] // self.k_cache.shape[2]

    @property
    def sequences(self) -> int:
        """R."""
        return self.cache_lens.shape[0]

    def numbers(self) -> dict[str, float]:
        """Factors of scores; scores count in units of log 2."""
        return {"scale": self.scale * LOG2E.value, "softcap": (self.softcap or 1.0) * LOG2E.value}

    @cached_property
    def constants(self) -> dict[str, Any]:
        """What kernels are compiled for."""
        kv_heads, value_dim = self.v_cache.shape[2:]
        return {
            "HEAD_DIM": self.q.shape[2],
            "VALUE_DIM": value_dim,
            "KV_HEADS": kv_heads,
            "HEADS_PER_KV": self.group,
            "PAGE_SIZE": self.k_cache.shape[1],
            "WINDOW": self.window or 0,
            "CHUNK": self.chunk or 0,
            "HAS_SOFTCAP": self.softcap is not None,
            "HAS_SINKS": self.sinks is not None,
            "HAS_ALIBI": self.alibi_slopes is not None,
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
            # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
            "WIDE_DOT": triton.knobs.runtime.interpret and self.q.dtype == torch.bfloat16,
            **widths(self.q.shape[2], value_dim),
        }

    def kind(self) -> tuple[Hashable, ...]:
        """What the best settings depend on, batch aside."""
        constants = self.constants
        options = [n for n in ("HAS_SOFTCAP", "HAS_SINKS", "HAS_ALIBI") if constants[n]]
        local = constants["WINDOW"] or constants["CHUNK"]
        sizes = [constants[n] for n in ("KV_HEADS", "HEADS_PER_KV", "HEAD_DIM", "VALUE_DIM", "PAGE_SIZE")]
        return (str(self.q.dtype), *sizes, *options, *(["local", local] if local else []))


def widths(head_dim: int, value_dim: int) -> dict[str, int]:
    """Head sizes as blocks: powers of two that ``tl.dot`` takes."""
    return {
        "BLOCK_H": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
    }
