"""What caches a graph needs, and the memory that backs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache tensor of one mixer: paged, shape a page ``page_shape`` = [page_size, ...].

    ``name`` is the graph placeholder that takes it.
    """

    name: str
    page_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_page(self) -> int:
        """Bytes one page of this cache takes."""
        return math.prod(self.page_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MixerDescriptor:
    """Everything the cache passes need to know of one kind of token mixer.

    ``source_op`` is the canonical op in the uncached graph; ``cached_ops`` the cached op by backend name.
    A cached op is called with the source op's tensor arguments (``tensor_args``, by schema name, None kept),
    then the batch inputs named in ``metadata``, then its caches (in the order ``cache_specs`` gives), then
    ``constants(node_args)`` as keyword arguments, and returns what the source op did, for the packed batch.
    ``cache_specs(values, page_size, dtype, prefix)`` names and sizes the caches from the source op's bound
    arguments (fake tensors and constants by schema name). ``refuse``: why a node cannot be cached, or None.
    """

    name: str
    source_op: Any
    cached_ops: dict[str, Any]
    tensor_args: tuple[str, ...]
    metadata: tuple[str, ...]
    cache_specs: Callable[[dict[str, Any], int, torch.dtype, str], tuple[CacheSpec, ...]]
    constants: Callable[[dict[str, Any]], dict[str, Any]]
    refuse: Callable[[dict[str, Any]], str | None] = lambda values: None


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU they are pages that the system fills in when they are first written: torch would write them all
    now, a minute for the cache of a small model at full length, of which a short answer uses next to nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


@dataclass
class CachePool:
    """The memory behind every cache of a graph: one tensor a spec, shape [P, *page_shape].

    Page 0 is never given to a sequence: padding writes there.
    """

    specs: tuple[CacheSpec, ...]
    page_size: int
    num_pages: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def bytes_per_page(self) -> int:
        """Bytes one page takes over all caches."""
        return sum(s.bytes_per_page for s in self.specs)

    @property
    def bytes_per_token(self) -> float:
        """Bytes one cached token takes over all caches."""
        return self.bytes_per_page / self.page_size

    def allocate(self, num_pages: int, device: torch.device | str) -> None:
        """(Re)allocate every cache with ``num_pages`` pages, zeroed; old tensors are freed first."""
        self.tensors = {}
        self.num_pages = num_pages
        self.tensors = {
            s.name: _zeros((num_pages, *s.page_shape), s.dtype, torch.device(device)) for s in self.specs
        }

    def wipe(self, pages: Sequence[int]) -> None:
        """Zero these pages of every cache, behind the work that the device has in hand."""
        for cache in self.tensors.values():
            index = torch.tensor(pages, dtype=torch.int64, pin_memory=cache.is_cuda)
            cache.index_fill_(0, index.to(cache.device, non_blocking=True), 0)
