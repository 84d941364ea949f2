"""The ranks' exchange over torch.distributed: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from adkit.runtime.ranks.strategies import Site, Strategies

# torch 2.13 has new names for these two, and warns of the old ones.
_all_gather: Any = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(torch_dist, "reduce_scatter_single", None) or torch_dist.reduce_scatter_tensor


class PeersLost(Exception):
    """An exchange failed because of other ranks: one of them ended, or did not come in time."""


class TorchCommunicator:
    """A :class:`~adkit.contract.Communicator` of a process group: ``rank`` of ``size``, on ``device``.

    Everything is enqueued on the current stream and may be captured in a CUDA graph. Raises PeersLost when the library
    says that an exchange failed.
    """

    def __init__(self, group: torch_dist.ProcessGroup, device: torch.device) -> None:
        self.rank: int = group.rank()
        self.size: int = group.size()
        self.device = device
        self.strategies = Strategies(Site(group, self.rank, self.size, device))
        self._group = group

    def all_reduce(self, x: Tensor, strategy: str = "AUTO") -> Tensor:
        """The sum over ranks, on each, in memory of its own."""
        with _lost("all_reduce", x):
            return self.strategies.all_reduce(x, strategy)

    def allreduce_residual_rmsnorm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        weight_offset: float = 0.0,
        weight_in_float: bool = False,
        out_dtype: torch.dtype | None = None,
        *,
        strategy: str = "AUTO",
    ) -> tuple[Tensor, Tensor] | None:
        """``torch_fused_add_rmsnorm`` of the sum over ranks, where one kernel does it all; else None."""
        with _lost("allreduce_residual_rmsnorm", x):
            return self.strategies.all_reduce_residual_rmsnorm(
                x, residual, weight, eps, weight_offset, weight_in_float, out_dtype, strategy
            )

    def all_gather(self, x: Tensor, dim: int, strategy: str = "AUTO") -> Tensor:
        """Every rank's ``x`` [..., n, ...] joined on ``dim`` -> [..., size * n, ...]."""
        x = x.contiguous()
        with _lost("all_gather", x):
            whole = self.strategies.all_gather(x, strategy)
            if whole is None:
                whole = x.new_empty(self.size * x.numel())
                _all_gather(whole, x.view(-1), group=self._group)
        # Rank by rank in memory: [size, ...]. The ranks move next to the dimension that they share.
        parts = whole.view(self.size, *x.shape).movedim(0, dim)
        return parts.reshape(*x.shape[:dim], self.size * x.shape[dim], *x.shape[dim + 1 :])

    def reduce_scatter(self, x: Tensor, dim: int, strategy: str = "AUTO") -> Tensor:
        """The sum over ranks of ``x`` [..., size * n, ...], of which each keeps its share -> [..., n, ...]."""
        n = x.shape[dim] // self.size
        # The ranks' shares one after another in memory, as the library wants them.
        parts = x.unflatten(dim, (self.size, n)).movedim(dim, 0).contiguous()
        mine = torch.empty_like(parts[0])
        with _lost("reduce_scatter", x):
            _reduce_scatter(mine.view(-1), parts.view(-1), group=self._group)
        return mine

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's ``x``, on each, in place."""
        with _lost("broadcast", x):
            torch_dist.broadcast(x, 0, group=self._group)
        return x


@contextmanager
def _lost(what: str, x: Tensor) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PeersLost(
            f"{what} of {x.dtype} {list(x.shape)} did not come about: {type(error).__name__}: {error}"
        ) from error
