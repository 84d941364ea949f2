"""Inputs of ``rope_kv_cache`` as models give them: strided pieces of one projection, caches that hold something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class RopeCase:
    """Sizes, norms and layout of one call."""

    tokens: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    rotary: int = 16
    page_size: int = 4
    q_norm: str = "none"
    k_norm: str = "none"
    in_float: bool = False
    offset: float = 0.0
    interleaved: bool = False
    dtype: torch.dtype = torch.float32
    cos_dtype: torch.dtype | None = None
    cache_dtype: torch.dtype | None = None
    device: str = "cpu"
    seed: int = 0

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments; query, key and value are views of one tensor."""
        g = torch.Generator("cpu").manual_seed(self.seed)

        def make(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
            return torch.randn(*shape, generator=g, device="cpu").to(self.device, dtype or self.dtype)

        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.value_dim]
        packed = make(1, self.tokens, sum(sizes))
        q, k, v = packed.split(sizes, -1)
        pages = 2 + -(-self.tokens // self.page_size)
        slots = torch.randperm((pages - 1) * self.page_size, generator=g, device="cpu")[: self.tokens]
        angle = torch.randn(1, self.tokens, self.rotary, generator=g, device="cpu")
        cos_dtype = self.cos_dtype or self.dtype
        cache = {"dtype": self.cache_dtype or self.dtype, "device": self.device}
        weights = [make(self.head_dim) if n == "weight" else None for n in (self.q_norm, self.k_norm)]
        eps = {name: 1e-5 for name, n in (("q_eps", self.q_norm), ("k_eps", self.k_norm)) if n != "none"}
        return [
            q.view(1, self.tokens, self.heads, self.head_dim),
            k.view(1, self.tokens, self.kv_heads, self.head_dim),
            v.view(1, self.tokens, self.kv_heads, self.value_dim),
            *weights,
            angle.cos().to(self.device, cos_dtype),
            angle.sin().to(self.device, cos_dtype),
            (slots + self.page_size).to(self.device),
            torch.full((pages, self.page_size, self.kv_heads, self.head_dim), -7.0, **cache),
            torch.full((pages, self.page_size, self.kv_heads, self.value_dim), -7.0, **cache),
        ], {
            "interleaved": self.interleaved,
            "weight_offset": self.offset,
            "weight_in_float": self.in_float,
            **eps,
        }
