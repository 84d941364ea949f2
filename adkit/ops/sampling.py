"""The best token of each row of logits, for the sampler and for decode steps captured with it."""

from __future__ import annotations

from typing import cast

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
