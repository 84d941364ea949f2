"""Steps of ranks that have sequences of their own: packed a rank at a time, all in one layout.

Ranks meet in collectives, so every rank brings as many tokens, sequences and rows as the one with the most, and one
without sequences brings padding. Tokens in flight are numbered through all ranks: rank by rank, in each the sequences
that sample.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch

from adkit.contract import BatchLayout, CompiledModel, HostBatch, SplitBatch
from adkit.runtime.batch import DecodeRows, table_width
from adkit.runtime.device import Device, Running
from adkit.runtime.launch import Launcher
from adkit.runtime.sequence import Sequence


class SplitLauncher(Launcher):
    """A :class:`Launcher` for a model whose ranks have sequences of their own (``CompiledModel.pools``).

    It is given those of one pool after another.
    """

    def __init__(self, model: CompiledModel, page_size: int, device: Device) -> None:
        super().__init__(model, page_size, device)
        self._pools = model.pools

    def _batch(
        self, sequences: list[Sequence], decode: bool, num_tokens: int, previous: Running | None
    ) -> tuple[Any, Any, bool]:
        ranks = [[s for s in sequences if s.pool == pool] for pool in range(self._pools)]
        seats = max(map(len, ranks))
        tokens = max(sum(s.num_scheduled for s in mine) for mine in ranks)
        if not decode:  # as many tokens as sequences would mean a token each
            tokens = max(tokens, seats + 1)
        shares = tuple(sum(s.samples for s in mine) for mine in ranks)
        layout = None if self._replays is None else self._replays.layout(tokens, seats)
        replayed = layout is not None
        if layout is None:
            rows = seats if decode else max(1, *shares)
            layout = BatchLayout(tokens, seats, table_width(sequences), rows)
            num_previous = 0 if previous is None else previous.count
        else:
            assert self._replays is not None
            num_previous = self._replays.num_previous
        parts = [self._part(mine, layout, num_previous) for mine in ranks]
        continues = any(p.continues for p in parts)
        for part in parts:
            part.shares, part.continues = shares, continues
        host = SplitBatch(tuple(parts))
        rows_of = SplitRows(sequences, ranks, host, self._page_size) if replayed and decode else None
        return host, rows_of, replayed

    def _part(self, mine: list[Sequence], layout: BatchLayout, num_previous: int) -> HostBatch:
        if mine:
            return self._pack(mine, num_previous=num_previous, padded=layout)
        return idle_batch(layout, num_previous, self._device.pinned)


class SplitRows:
    """:class:`DecodeRows` of every rank."""

    def __init__(
        self, sequences: list[Sequence], ranks: Seq[list[Sequence]], host: SplitBatch, page_size: int
    ) -> None:
        self.sequences = sequences
        first = np.cumsum([0, *map(len, ranks)]).tolist()
        self._ranks = [
            DecodeRows(mine, part, page_size, first=at)
            for mine, part, at in zip(ranks, host.parts, first, strict=False)
        ]
        self._shares = host.parts[0].shares

    def advance(self, pinned: bool) -> SplitBatch:
        """The next step."""
        parts = tuple(rows.advance(pinned) for rows in self._ranks)
        for part in parts:
            part.shares = self._shares
        return SplitBatch(parts)


def idle_batch(layout: BatchLayout, num_previous: int, pinned: bool = False) -> HostBatch:
    """A step of nobody in ``layout``: all of it is padding, as :func:`build_batch` pads."""
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, pin_memory=pinned)
    fields = layout.arrays(buffer)
    fields["rope_lengths"][:] = 1
    fields["sources"][:] = np.arange(num_previous, num_previous + layout.tokens)
    if layout.tokens == layout.sequences:
        fields["cu_seqlens"][:] = np.arange(layout.sequences + 1)
        fields["logits_indices"][:] = np.arange(layout.logits)
    return HostBatch(layout, buffer, 0)


__all__ = ["SplitLauncher", "idle_batch"]
