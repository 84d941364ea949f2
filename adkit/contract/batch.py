"""The packed batch: the inputs of a compiled graph, by name.

Sequences lie one after another in a single row of T tokens; a sequence may bring its whole prompt, a
chunk of it, or one decode token. R sequences, T tokens, L rows of logits asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

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


#: Inputs that only a packed, cached graph has.
CACHE_INPUTS = ("cu_seqlens", "cache_lens", "page_table", "slot_mapping")
