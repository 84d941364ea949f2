"""Tokens from logits where kernels choose them: for the sampler, and for decode steps captured with it."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from adkit.ops.triton.ops import attempt, kernels_can_run


def best_tokens(logits: Tensor) -> Tensor:
    """The best token of each row of logits [L, V], the first of several, int64 [L]; -1 where the row is not finite.

    A row is not finite when it holds NaN or +inf, or nothing but -inf. One pass over the logits where Triton kernels
    run; waits for nothing.
    """
    if kernels_can_run(logits.is_cuda):
        tokens = attempt("greedy", "sampling", (logits,), {})
        if tokens is not NotImplemented:
            return cast(Tensor, tokens)
    best = logits.float().max(dim=-1)  # NaN anywhere in a row makes its maximum NaN
    return torch.where(best.values.isfinite(), best.indices, -1)


def drawn_tokens(logits: Tensor, settings: Tensor, top_k: bool, top_p: bool) -> Any:
    """A token of each row of logits [L, V], drawn by kernels; NotImplemented where they do not compile.

    Arguments and result are those of :func:`adkit.ops.triton.sampling.draw`.
    """
    return attempt("draw", "sampling", (logits, settings, top_k, top_p), {})


def compile_draws(vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    """Draw from logits of nothing with every combination of filters: their kernels compile now, not when a request
    waits for its first token."""
    if not kernels_can_run(device.type == "cuda"):
        return
    logits = torch.zeros(1, vocab, dtype=dtype, device=device)
    settings = torch.tensor([[1.0], [1.0], [0.5], [-math.inf], [0.5]], dtype=torch.float64, device=device)
    for top_k in (False, True):
        for top_p in (False, True):
            drawn_tokens(logits, settings, top_k, top_p)
