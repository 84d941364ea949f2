"""Counters of finished programs, with which the last one of a group finds out that it is the last.

Every launch leaves them zero for the next one of its stream. Launches on two streams may overlap: they share none.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Groups that one launch may count.
MOST_COUNTERS = 1 << 16

_of: dict[tuple[str, torch.device, int], Tensor] = {}


def counters(kernel: str, device: torch.device) -> Tensor:
    """Zeros int32 [MOST_COUNTERS] for a kernel on the current stream; kept, since CUDA graphs hold them."""
    if device.type != "cuda":
        return torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
    key = (kernel, device, torch.cuda.current_stream(device).cuda_stream)
    found = _of.get(key)
    if found is None:
        found = torch.zeros(MOST_COUNTERS, dtype=torch.int32, device=device)
        if not torch.cuda.is_current_stream_capturing():  # a graph's zeros are zero only while it runs
            _of[key] = found
    return found
