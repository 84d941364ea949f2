"""From scheduled sequences to the packed batch a compiled graph takes."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from adkit.contract import BatchLayout, HostBatch
from adkit.runtime.sequence import Sequence

#: The page table's width is a multiple of this, so that its stride seldom makes a kernel compile anew.
_WIDTH = 16


def build_batch(
    sequences: Seq[Sequence],
    page_size: int,
    *,
    num_previous: int = 0,
    padded: BatchLayout | None = None,
    pinned: bool = False,
) -> HostBatch:
    """Pack the scheduled tokens of R sequences into one row of T, in one buffer.

    Logits are asked for only of the last token of each sequence that samples in this step; when none does, of
    one token all the same, because a graph need not be able to run with no rows. A sequence whose last token
    is still being sampled takes it from its row of the step before, which sampled ``num_previous`` tokens.
    ``padded`` is the layout of a larger step to fill, as :meth:`adkit.contract.Replay.layout` gives it: whatever pads
    the batch writes to page 0. ``pinned`` memory comes from torch's cache of it, which does not hand a buffer out
    again before the copies from it are done.
    """
    r = len(sequences)
    starts = np.array([s.num_cached for s in sequences], dtype=np.int64)
    prompt_lens = np.array([s.prompt_len for s in sequences], dtype=np.int64)
    if padded is not None and padded.tokens == padded.sequences:  # a decode step
        layout, positions, logits = padded, starts, r
        wanted = np.arange(layout.logits)
        row_of_token, ends = wanted[:r], wanted + 1
    else:
        counts = np.array([s.num_scheduled for s in sequences], dtype=np.int64)
        samples = np.array([s.samples for s in sequences])
        samples[-1] |= not samples.any()
        ends = np.cumsum(counts)
        wanted = ends[samples] - 1
        tokens, logits = int(ends[-1]), len(wanted)
        if padded is None:
            layout = BatchLayout(tokens, r, table_width(sequences), logits)
        else:
            layout = padded
        row_of_token = np.repeat(np.arange(r), counts)
        positions = np.arange(tokens) + (starts - ends + counts)[row_of_token]
        prompt_lens = prompt_lens[row_of_token]

    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, pin_memory=pinned)
    fields = layout.arrays(buffer)
    fields["cu_seqlens"][1:] = ends[-1]  # of sequences without tokens
    fields["cu_seqlens"][1 : len(ends) + 1] = ends
    fields["cache_lens"][:r] = starts
    fields["logits_indices"][: len(wanted)] = wanted
    _fill_ids(fields["input_ids"][0], fields["sources"], sequences, ends, num_previous)
    t = len(positions)
    fields["position_ids"][0, :t] = positions
    # A prompt token sees the whole prompt's length, a generated one its own; never less than position + 1.
    fields["rope_lengths"][0, t:] = 1
    np.maximum(positions + 1, prompt_lens, out=fields["rope_lengths"][0, :t])
    table = fields["page_table"]
    for row, seq in enumerate(sequences):
        table[row, : len(seq.pages)] = seq.pages
    pages = table[row_of_token, positions // page_size].astype(np.int64)
    fields["slot_mapping"][:t] = pages * page_size + positions % page_size
    return HostBatch(layout, buffer, logits, continues=any(s.num_pending for s in sequences))


def table_width(sequences: Seq[Sequence]) -> int:
    """How wide a page table must be for these."""
    return -(-max(len(s.pages) for s in sequences) // _WIDTH) * _WIDTH


class DecodeRows:
    """A decode step as it was packed, from which the next one of the same ``sequences`` is made by counting on.

    ``first``: the row of the first of them among those that the step samples for.

    That step must be in flight when :meth:`advance` is called, and the one after it scheduled: each sequence brings the
    token that its row is sampling.
    """

    def __init__(self, sequences: list[Sequence], host: HostBatch, page_size: int, first: int = 0) -> None:
        self.sequences = sequences
        self._page_size = page_size
        self._layout = host.layout
        self._buffer = host.buffer.clone()
        fields = host.layout.arrays(self._buffer)
        r = len(sequences)
        fields["sources"][:r] = np.arange(first, first + r)
        self._table = fields["page_table"]
        self._positions, self._slots = fields["position_ids"][0, :r], fields["slot_mapping"][:r]
        lengths = fields["rope_lengths"][0, :r], fields["cache_lens"][:r]
        self._counters = (self._positions, self._slots, *lengths)

    def advance(self, pinned: bool) -> HostBatch:
        """The next step."""
        for counter in self._counters:
            counter += 1
        for row in np.flatnonzero(self._positions % self._page_size == 0).tolist():
            pages = self.sequences[row].pages
            self._table[row, len(pages) - 1] = pages[-1]
            self._slots[row] = pages[-1] * self._page_size
        buffer = torch.empty(self._layout.nbytes, dtype=torch.uint8, pin_memory=pinned)
        return HostBatch(self._layout, buffer.copy_(self._buffer), len(self.sequences), continues=True)


def _fill_ids(
    ids: np.ndarray, sources: np.ndarray, sequences: Seq[Sequence], ends: np.ndarray, num_previous: int
) -> None:
    """Write the ids that the host knows, and for each token where its id is to be found.

    A sequence with a pending token brings that one and no other: all before it are cached.
    """
    sources[:] = np.arange(num_previous, num_previous + len(sources))
    last = (ends - 1).tolist()
    for seq, at in zip(sequences, last, strict=False):  # rows that pad the batch come after
        if seq.num_pending:
            sources[at] = seq.row
        elif seq.num_scheduled == 1:
            ids[at] = seq.tokens[seq.num_cached]
        else:
            first = at + 1 - seq.num_scheduled
            ids[first : at + 1] = seq.tokens[seq.num_cached : seq.num_cached + seq.num_scheduled]
