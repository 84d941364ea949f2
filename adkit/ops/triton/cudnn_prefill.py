"""A long prompt alone in its batch through cuDNN's attention, which is faster there than a Triton kernel.

It attends to this step's tokens only, and gives the softmax's sums too; :mod:`flash_prefill` then folds in what
earlier steps left in the pages, if anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adkit.ops.triton.attention_step import Step

#: cuDNN plans each length anew (a good part of a second), so it gets those that a token budget gives rise to.
MULTIPLE = 1024
SHORTEST = 2048


def serves(step: Step) -> bool:
    """True for plain causal attention of one sequence, of a length worth a plan."""
    tokens = step.q.shape[0]
    if step.sequences != 1 or tokens < SHORTEST or tokens % MULTIPLE or not step.q.is_cuda:
        return False
    options = (step.sinks, step.alibi_slopes, step.softcap, step.window, step.chunk)
    if any(option is not None for option in options):
        return False
    params: Any = torch.backends.cuda.SDPAParams
    return torch.backends.cuda.can_use_cudnn_attention(params(*_heads_first(step), None, 0.0, True, True))


def attend(step: Step) -> tuple[Tensor, Tensor]:
    """Attention within the step -> out [T, N, Hv] and log of the sum of exponentials [N, T], float32."""
    out, sums = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_heads_first(step), None, True, 0.0, True, False, scale=step.scale
    )[:2]
    return out[0].transpose(0, 1).contiguous(), sums.reshape(out.shape[1:3])


def _heads_first(step: Step) -> list[Tensor]:
    return [x.transpose(0, 1).unsqueeze(0) for x in (step.q, step.key, step.value)]
