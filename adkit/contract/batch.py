"""The packed batch: the inputs of a compiled graph, by name.

Sequences lie one after another in a single row of T tokens; a sequence may bring its whole prompt, a
chunk of it, or one decode token. R sequences, T tokens, L rows of logits asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class SequenceBatch:
    """One step's inputs. Every field is a possible placeholder of a compiled graph, by this name.

    - ``input_ids`` int64 [1, T], ``position_ids`` int64 [1, T]
    - ``rope_lengths`` int64 [1, T]: length that length-dependent RoPE scalings see for each token: the prompt
      length for a prompt token, position + 1 for a generated one (what HF sees running the sequence alone)
    - ``cu_seqlens`` int32 [R + 1]: where each sequence's tokens start in T
    - ``cache_lens`` int32 [R]: tokens of the sequence already in the cache before this step
    - ``page_table`` int32 [R, M]: pages of each sequence in order (rows padded with 0)
    - ``slot_mapping`` int64 [T]: page * page_size + offset where each token's keys and values go
    - ``logits_indices`` int64 [L]: the tokens of T whose logits are wanted
    """

    input_ids: Tensor
    position_ids: Tensor
    rope_lengths: Tensor
    cu_seqlens: Tensor
    cache_lens: Tensor
    page_table: Tensor
    slot_mapping: Tensor
    logits_indices: Tensor

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Field names, which are the placeholder names."""
        return tuple(f.name for f in fields(cls))

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The batch on another device."""
        return SequenceBatch(**{n: getattr(self, n).to(device, non_blocking=True) for n in self.names()})


@dataclass(frozen=True)
class BatchLayout:
    """Where the fields of a packed batch lie in one buffer, so that one copy moves all of them.

    For T ``tokens`` of R ``sequences``, a page table M ``pages`` wide and ``logits`` L rows asked for. ``input_ids``
    comes first. One more field than :class:`SequenceBatch` has: ``sources`` int64 [T], where each token's id
    stands among the tokens of the step before followed by ``input_ids``.
    """

    tokens: int
    sequences: int
    pages: int
    logits: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer."""
        return _places(self)[1]

    def arrays(self, buffer: Tensor) -> dict[str, np.ndarray]:
        """Each field as a view of a buffer on the host (uint8)."""
        raw = buffer.numpy()
        return {
            name: raw[at : at + size].view(_NUMPY[dtype]).reshape(shape)
            for name, at, size, dtype, shape in _places(self)[0]
        }

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """Each field as a view of a buffer on any device (uint8)."""
        return {
            name: buffer[at : at + size].view(dtype).view(shape)
            for name, at, size, dtype, shape in _places(self)[0]
        }

    def _fields(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        t, r = self.tokens, self.sequences
        yield "input_ids", torch.int64, (1, t)
        yield "sources", torch.int64, (t,)
        yield "position_ids", torch.int64, (1, t)
        yield "rope_lengths", torch.int64, (1, t)
        yield "slot_mapping", torch.int64, (t,)
        yield "logits_indices", torch.int64, (self.logits,)
        yield "cu_seqlens", torch.int32, (r + 1,)
        yield "cache_lens", torch.int32, (r,)
        yield "page_table", torch.int32, (r, self.pages)


_ALIGNMENT = 16  # bytes; what vector loads in kernels like
_NUMPY = {torch.int64: np.int64, torch.int32: np.int32}

Place = tuple[str, int, int, torch.dtype, tuple[int, ...]]


@lru_cache(maxsize=4096)
def _places(layout: BatchLayout) -> tuple[list[Place], int]:
    """(name, first byte, bytes, dtype, shape) of each field, and the bytes of all."""
    places, at = [], 0
    for name, dtype, shape in layout._fields():
        size = math.prod(shape) * dtype.itemsize
        places.append((name, at, size, dtype, shape))
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return places, at


def fitting_layout(layouts: Iterable[BatchLayout], tokens: int, sequences: int) -> BatchLayout | None:
    """The first of ``layouts`` that holds a step of T tokens in R sequences; with T = R one for decode steps."""
    decode = tokens == sequences
    fits = (
        x
        for x in layouts
        if tokens <= x.tokens and sequences <= x.sequences and decode == (x.tokens == x.sequences)
    )
    return next(fits, None)


@dataclass(slots=True)
class HostBatch:
    """A step's inputs as they leave the host: one buffer (uint8; pinned for a GPU), laid out by ``layout``.

    ``logits``: L without rows that only pad the batch. ``continues``: some ids are not known on the host
    yet, because the step before is still running. Its tokens [L'] are needed to complete the batch on the
    device. ``shares``: where ranks have sequences of their own, how many rows of each rank get a token. The
    logits of all ranks lie rank by rank, ``layout.logits`` each, of which the first so many count.
    """

    layout: BatchLayout
    buffer: Tensor
    logits: int
    continues: bool = False
    shares: tuple[int, ...] = ()

    def to(self, device: torch.device | str, previous: Tensor | None = None) -> SequenceBatch:
        """The batch on a device, without waiting for the copy; ids not known here come from ``previous`` [L'].

        A row of ``previous`` that is negative (its logits were not finite) counts as token 0.
        """
        given = self.layout.tensors(self.buffer.to(device, non_blocking=True))
        sources = given.pop("sources")
        if self.continues:
            assert previous is not None, "the batch continues a step whose tokens were not given"
            ids = given["input_ids"]
            given["input_ids"] = torch.cat([previous.clamp_min(0), ids[0]])[sources][None]
        return SequenceBatch(**given)


@dataclass(slots=True)
class SplitBatch:
    """A step of ranks that have sequences of their own: a batch a rank, all of one layout."""

    parts: tuple[HostBatch, ...]


#: Inputs that only a packed, cached graph has.
CACHE_INPUTS = ("cu_seqlens", "cache_lens", "page_table", "slot_mapping")
