"""From scheduled sequences to the packed batch a compiled graph takes."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from adkit.contract import SequenceBatch
from adkit.runtime.sequence import Sequence

_ALIGNMENT = 16  # bytes; what vector loads in kernels like


def build_batch(sequences: Seq[Sequence], page_size: int, device: torch.device) -> SequenceBatch:
    """Pack the scheduled tokens of R sequences into one row of T, with one copy to the device.

    Logits are asked for only of the last token of each sequence that samples in this step; when none does, of
    one token all the same, because a graph need not be able to run with no rows.
    """
    starts = np.array([s.num_cached for s in sequences], dtype=np.int64)
    counts = np.array([s.num_scheduled for s in sequences], dtype=np.int64)
    prompt_lens = np.array([s.prompt_len for s in sequences], dtype=np.int64)
    samples = np.array([s.samples for s in sequences])
    samples[-1] |= not samples.any()
    cu_seqlens = np.concatenate(([0], np.cumsum(counts)))

    page_table = np.zeros((len(sequences), max(len(s.pages) for s in sequences)), dtype=np.int32)
    for row, seq in enumerate(sequences):
        page_table[row, : len(seq.pages)] = seq.pages

    input_ids = np.concatenate([s.tokens[s.num_cached : s.num_cached + s.num_scheduled] for s in sequences])
    row_of_token = np.repeat(np.arange(len(sequences)), counts)
    positions = np.arange(len(input_ids)) + (starts - cu_seqlens[:-1])[row_of_token]
    pages = page_table[row_of_token, positions // page_size].astype(np.int64)
    return _to_device(
        {
            "input_ids": input_ids[None],
            "position_ids": positions[None],
            # A prompt token sees the whole prompt's length, a generated one its own; never less than position
            # + 1.
            "rope_lengths": np.maximum(positions + 1, prompt_lens[row_of_token])[None],
            "cu_seqlens": cu_seqlens.astype(np.int32),
            "cache_lens": starts.astype(np.int32),
            "page_table": page_table,
            "slot_mapping": pages * page_size + positions % page_size,
            "logits_indices": cu_seqlens[1:][samples] - 1,
        },
        device,
    )


def _to_device(fields: dict[str, np.ndarray], device: torch.device) -> SequenceBatch:
    """Lay the fields out in one buffer: one transfer instead of eight, asynchronous on a GPU."""
    offsets = np.cumsum([0] + [-(-a.nbytes // _ALIGNMENT) * _ALIGNMENT for a in fields.values()]).tolist()
    buffer = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    raw = buffer.numpy()
    for at, array in zip(offsets, fields.values(), strict=False):
        raw[at : at + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    buffer = buffer.to(device, non_blocking=True)
    return SequenceBatch(
        **{
            name: buffer[at : at + array.nbytes].view(_TORCH_DTYPE[array.dtype]).view(array.shape)
            for at, (name, array) in zip(offsets, fields.items(), strict=False)
        }
    )


_TORCH_DTYPE = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}
