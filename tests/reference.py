"""Hugging Face as the reference: greedy generation of one prompt at a time, with logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def hf_greedy(model: Any, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(tokens [P + steps], logits [P + steps, V]) of HF running ``prompt`` [P] alone, with its own cache."""
    out = model(input_ids=prompt[None], use_cache=True)
    tokens, rows, cache = [*prompt.tolist()], [out.logits[0]], out.past_key_values
    for _ in range(steps):
        tokens.append(int(rows[-1][-1].argmax()))
        out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
        rows.append(out.logits[0])
        cache = out.past_key_values
    return torch.tensor(tokens), torch.cat(rows)


def rmse_ratio(actual: Tensor, expected: Tensor) -> float:
    """rmse(actual - expected) / rms(expected), in float64."""
    a, e = actual.double(), expected.double()
    return float((a - e).square().mean().sqrt() / e.square().mean().sqrt())
