"""From scheduled sequences to the packed batch a compiled graph takes."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from adkit.contract import BatchLayout, HostBatch
from adkit.runtime.sequence import Sequence


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
    ``padded`` is the layout of a larger decode step to fill (every sequence brings one token and samples):
    rows beyond R are sequences of one token in page 0. ``pinned`` memory comes from torch's cache of it,
    which does not hand a buffer out again before the copies from it are done.
    """
    starts = np.array([s.num_cached for s in sequences], dtype=np.int64)
    prompt_lens = np.array([s.prompt_len for s in sequences], dtype=np.int64)
    if padded is None:
        counts = np.array([s.num_scheduled for s in sequences], dtype=np.int64)
        samples = np.array([s.samples for s in sequences])
        samples[-1] |= not samples.any()
        ends = np.cumsum(counts)
        layout = BatchLayout(
            int(ends[-1]), len(sequences), max(len(s.pages) for s in sequences), int(samples.sum())
        )
        row_of_token = np.repeat(np.arange(len(sequences)), counts)
        positions = np.arange(layout.tokens) + (starts - ends + counts)[row_of_token]
        prompt_lens = prompt_lens[row_of_token]
    else:
        layout, positions = padded, starts
        ends = row_of_token = np.arange(layout.sequences)
        row_of_token, ends, samples = row_of_token[: len(sequences)], ends + 1, slice(None)

    buffer = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pinned)
    fields = layout.arrays(buffer)
    t = len(positions)
    if t < layout.tokens:
        buffer.zero_()
        fields["rope_lengths"][:, t:] = 1

    ids, sources = fields["input_ids"][0], fields["sources"]
    sources[:] = np.arange(num_previous, num_previous + layout.tokens)
    continues, last = False, ends.tolist()
    for row, seq in enumerate(sequences):
        end = last[row]
        known = end - seq.num_scheduled
        if seq.num_pending and seq.samples:
            sources[end - 1] = seq.row
            ids[end - 1] = 0
            continues = True
            end -= 1
        ids[known:end] = seq.tokens[seq.num_cached : seq.num_cached + end - known]

    table = fields["page_table"]
    for row, seq in enumerate(sequences):
        held = len(seq.pages)
        table[row, :held] = seq.pages
        table[row, held:] = 0

    pages = table[row_of_token, positions // page_size].astype(np.int64)
    fields["position_ids"][0, :t] = positions
    # A prompt token sees the whole prompt's length, a generated one its own; never less than position + 1.
    np.maximum(positions + 1, prompt_lens, out=fields["rope_lengths"][0, :t])
    fields["slot_mapping"][:t] = pages * page_size + positions % page_size
    fields["cache_lens"][: len(sequences)] = starts
    fields["cu_seqlens"][0] = 0
    fields["cu_seqlens"][1:] = ends
    fields["logits_indices"][:] = ends[samples] - 1
    return HostBatch(layout, buffer, continues)
