"""Helpers: whole sequences cut into packed steps over a scattered page table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adkit.ops.cached_attention import write_slots


@dataclass
class Case:
    """Whole sequences and how they are served; ``chunks[r]``: tokens of sequence r that each step brings."""

    chunks: list[list[int]]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    page_size: int = 4
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    sinks: bool = False
    alibi: bool = False
    padding: int = 0
    table_width: int = 0  # pages that a row of the page table has room for, at least
    written: bool = False  # an op before this one has written the step's keys and values
    seed: int = 0
    device: str = field(default_factory=lambda: str(torch.get_default_device()))

    def tensors(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
        """Queries, keys and values a sequence [1, S, heads, dim], then sinks and slopes."""
        g = torch.Generator("cpu").manual_seed(self.seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu").to(
                self.device, self.dtype
            )

        lengths = [sum(c) for c in self.chunks]
        q = [make(1, n, self.heads, self.head_dim) for n in lengths]
        k = [make(1, n, self.kv_heads, self.head_dim) for n in lengths]
        v = [make(1, n, self.kv_heads, self.value_dim) for n in lengths]
        return (
            q,
            k,
            v,
            make(self.heads) if self.sinks else None,
            make(self.heads).abs() if self.alibi else None,
        )


@dataclass
class Served:
    """What serving gave: outputs a sequence [1, S, N, Hv], the caches and which slots were written."""

    outputs: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor


def whole(case: Case, op: Any, dtype: torch.dtype) -> list[Tensor]:
    """``op`` (torch_attention) over each whole sequence, in ``dtype``."""
    q, k, v, sinks, slopes = case.tensors()
    wide = [None if t is None else t.to(dtype) for t in (sinks, slopes)]
    return [
        op(a.to(dtype), b.to(dtype), c.to(dtype), None, *wide, **case.options)
        for a, b, c in zip(q, k, v, strict=True)
    ]


def serve(case: Case, op: Any, poison: float = 1e4) -> Served:
    """Run ``op`` (cached) step by step; unwritten cache memory holds ``poison``, so a stray read shows."""
    q, k, v, sinks, slopes = case.tensors()
    size = case.page_size
    need = [-(-sum(c) // size) for c in case.chunks]
    num_pages = 1 + sum(need) + 2
    g = torch.Generator("cpu").manual_seed(case.seed + 1)
    free = (torch.randperm(num_pages - 1, generator=g, device="cpu") + 1).tolist()
    table = torch.zeros(len(need), max(max(need) + 1, case.table_width), dtype=torch.int32)
    for r, n in enumerate(need):
        table[r, :n] = torch.tensor([free.pop() for _ in range(n)])
    k_cache = torch.full(
        (num_pages, size, case.kv_heads, case.head_dim), poison, dtype=case.dtype, device=case.device
    )
    v_cache = torch.full(
        (num_pages, size, case.kv_heads, case.value_dim), poison, dtype=case.dtype, device=case.device
    )
    outputs: list[list[Tensor]] = [[] for _ in need]
    written: list[Tensor] = []
    done = [0] * len(need)
    for step in range(max(len(c) for c in case.chunks)):
        live = [r for r, c in enumerate(case.chunks) if step < len(c)]
        spans = [(r, done[r], done[r] + case.chunks[r][step]) for r in live]
        slots = torch.cat(
            [
                torch.tensor([int(table[r, i // size]) * size + i % size for i in range(a, b)])
                for r, a, b in spans
            ]
        )
        packed = [torch.cat([x[r][:, a:b] for r, a, b in spans], 1) for x in (q, k, v)]
        if case.padding:
            pad = [x.new_ones(1, case.padding, *x.shape[2:]) for x in packed]
            packed = [torch.cat((x, p), 1) for x, p in zip(packed, pad, strict=True)]
            slots = torch.cat((slots, torch.zeros(case.padding, dtype=slots.dtype)))
        if case.written:
            for cache, new in zip((k_cache, v_cache), packed[1:], strict=True):
                write_slots(cache, slots.to(case.device), new[0])
        ends = torch.tensor([0] + [b - a for _, a, b in spans]).cumsum(0).int()
        out = op(
            *packed,
            None,
            sinks,
            slopes,
            ends.to(case.device),
            torch.tensor([a for _, a, _ in spans], dtype=torch.int32, device=case.device),
            table[live].to(case.device),
            None if case.written else slots.to(case.device),
            k_cache,
            v_cache,
            **case.options,
        )
        at = 0
        for r, a, b in spans:
            outputs[r].append(out[:, at : at + b - a])
            at += b - a
            done[r] = b
        written.append(slots)
    return Served([torch.cat(o, 1) for o in outputs], k_cache, v_cache, torch.cat(written).unique())
