"""How sums over ranks are made: a strategy a name, and which one stands in where a strategy cannot be had.

| name | what it does | where it cannot |
| --- | --- | --- |
| AUTO | by size: ONESHOT, TWOSHOT, NCCL (:func:`automatic`) | NCCL |
| NCCL | torch.distributed: NCCL, or gloo on CPUs | takes everything |
| ONESHOT | every rank sends to all in one kernel, which adds the residual and normalises as well | NCCL |
| TWOSHOT | every rank adds up a share and sends it around | NCCL |
| MIN_LATENCY | ONESHOT, TWOSHOT where the message does not fit that | NCCL |
| LOWPRECISION | float32 travels as bfloat16, otherwise AUTO | AUTO |
| UB, MNNVL, NCCL_SYMMETRIC | user buffers, multi-node NVLink, registered windows: not there | AUTO, with a warning |

A strategy is made once a world, when first asked for. Whether it can be had, and whether it takes a tensor (its size
and dtype), depends on nothing that differs between ranks, so that all choose the same. Whatever the strategy, all
ranks get the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as torch_dist
from torch import Tensor

from adkit.runtime.ranks import peers
from adkit.runtime.ranks.peers import Unavailable

if TYPE_CHECKING:
    from adkit.ops.triton.collectives import Inboxes

#: Words of 4 bytes that a program of a one-shot sum has, and how many programs there are: 1 MiB at most.
_ONESHOT = (512, 512)
#: Programs of a two-shot sum and their words: 64 MiB at most.
_TWOSHOT = (128, 131072)
#: Rows that are added up and normalised in one kernel, and the words of the longest.
_ROWS, _ROW_WORDS = 64, 8192
#: Bytes up to which AUTO takes ONESHOT, then TWOSHOT, by the number of ranks: measured for 2, guessed for more.
_AUTO = {2: (1 << 20, 64 << 20), 4: (256 << 10, 4 << 20), 8: (128 << 10, 8 << 20)}
#: The strategies that a name stands for, in order; NCCL after them.
_MEANS = {"NCCL": (), "ONESHOT": ("ONESHOT",), "TWOSHOT": ("TWOSHOT",), "MIN_LATENCY": ("ONESHOT", "TWOSHOT")}
_NOT_THERE = {
    "UB": "buffers registered with the network library",
    "MNNVL": "NVLink between hosts",
    "NCCL_SYMMETRIC": "memory windows registered with NCCL",
}


@dataclass(frozen=True)
class Site:
    """The ranks that a strategy serves, and this one's device."""

    group: torch_dist.ProcessGroup
    rank: int
    size: int
    device: torch.device


class Strategy(Protocol):
    """One way to add up a tensor over the ranks."""

    def refuses(self, x: Tensor) -> str:
        """Why not this tensor; empty when it can."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum, in memory of its own. Enqueued on the current stream, and allowed in a CUDA graph."""
        ...


class Library:
    """What torch.distributed does: NCCL on GPUs, gloo on CPUs."""

    def __init__(self, site: Site) -> None:
        self._group = site.group

    def refuses(self, x: Tensor) -> str:
        """Nothing."""
        return ""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The library adds up in place, in a copy."""
        x = x.clone(memory_format=torch.contiguous_format)
        torch_dist.all_reduce(x, group=self._group)
        return x


class OneShot:
    """Every rank writes into all others' memory and adds up what lies in its own; see ``ops/triton/collectives``."""

    def __init__(self, site: Site) -> None:
        peers.check(site)
        self._site = site
        self._inboxes = peers.inboxes(site, *_ONESHOT)
        self._rows: dict[int, Inboxes] = {}

    def refuses(self, x: Tensor) -> str:
        """What is too long or odd."""
        from adkit.ops.triton import collectives

        return collectives.refused(x, self._inboxes.capacity)

    def all_reduce(self, x: Tensor) -> Tensor:
        """One kernel."""
        from adkit.ops.triton import collectives

        return collectives.oneshot_all_reduce(x, self._inboxes)

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's ``x`` [...] -> [size, ...]; one kernel."""
        from adkit.ops.triton import collectives

        return collectives.oneshot_all_gather(x, self._inboxes)

    def residual_rmsnorm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        offset: float,
        in_float: bool,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor] | None:
        """The sum over ranks, plus the residual, and that normalised; None where the kernel does not serve.

        It takes a residual of x's dtype or in float32, and normalises to x's dtype.
        """
        from adkit.ops.triton import collectives

        words = x.shape[-1] * x.element_size() // 4
        plain = x.shape == residual.shape and residual.dtype in (x.dtype, torch.float32)
        if out_dtype is None:
            out_dtype = residual.dtype
            if weight is not None and not in_float:
                out_dtype = torch.promote_types(out_dtype, weight.dtype)
        if not plain or out_dtype != x.dtype or not 0 < words <= _ROW_WORDS or words % 4 or self.refuses(x):
            return None
        if x.numel() // x.shape[-1] > _ROWS:
            return None
        if words not in self._rows:
            if torch.cuda.is_current_stream_capturing():
                return None
            self._rows[words] = peers.inboxes(self._site, _ROWS, words)
        return collectives.oneshot_all_reduce_residual_rmsnorm(
            x, residual, weight, eps, offset, in_float, self._rows[words]
        )


class TwoShot:
    """Every rank adds up a share and sends it around."""

    def __init__(self, site: Site) -> None:
        peers.check(site)
        self._size = site.size
        self._inboxes = peers.inboxes(site, *_TWOSHOT, two_shots=True)

    def refuses(self, x: Tensor) -> str:
        """What is too long, or does not fall into equal shares."""
        from adkit.ops.triton import collectives

        return collectives.refused(x, self._inboxes.capacity, shares=self._size)

    def all_reduce(self, x: Tensor) -> Tensor:
        """One kernel."""
        from adkit.ops.triton import collectives

        return collectives.twoshot_all_reduce(x, self._inboxes)


MAKERS: dict[str, Callable[[Site], Strategy]] = {"NCCL": Library, "ONESHOT": OneShot, "TWOSHOT": TwoShot}


def automatic(nbytes: int, ranks: int) -> tuple[str, ...]:
    """The strategies that AUTO tries for a sum of so many bytes, in order; NCCL after them."""
    once, twice = _AUTO.get(max((n for n in _AUTO if n <= ranks), default=2), (0, 0))
    if nbytes <= once:
        return ("ONESHOT",)
    return ("TWOSHOT",) if nbytes <= twice else ()


@dataclass
class Strategies:
    """The strategies of one world; ``fallen`` says what was not to be had, and why."""

    site: Site
    fallen: dict[str, str] = field(default_factory=dict)
    _made: dict[str, Strategy] = field(default_factory=dict)

    def all_reduce(self, x: Tensor, name: str = "AUTO") -> Tensor:
        """The sum over ranks of ``x`` by the strategy ``name``, or by what stands in for it; ``x`` stays as it is."""
        if name == "LOWPRECISION" and x.dtype == torch.float32:
            return self.choose(half := x.bfloat16(), "AUTO").all_reduce(half).float()
        return self.choose(x, name).all_reduce(x)

    def all_reduce_residual_rmsnorm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        eps: float,
        offset: float,
        in_float: bool,
        out_dtype: torch.dtype | None = None,
        name: str = "AUTO",
    ) -> tuple[Tensor, Tensor] | None:
        """``torch_fused_add_rmsnorm`` of the sum, in the same kernel; None where no strategy does both at once."""
        one_shot = self.choose(x, name)
        if not isinstance(one_shot, OneShot):
            return None
        return one_shot.residual_rmsnorm(x, residual, weight, eps, offset, in_float, out_dtype)

    def all_gather(self, x: Tensor, name: str = "AUTO") -> Tensor | None:
        """Every rank's ``x`` [...] -> [size, ...] in peers' memory (SYMM_MEM, and what AUTO finds small); else None."""
        if name == "AUTO" and x.nbytes > _AUTO[2][0]:
            return None
        one_shot = self.get("ONESHOT") if name in ("AUTO", "SYMM_MEM") and self._peers() else None
        return one_shot.all_gather(x) if isinstance(one_shot, OneShot) and not one_shot.refuses(x) else None

    def choose(self, x: Tensor, name: str) -> Strategy:
        """What will add up ``x`` when ``name`` is asked for."""
        if name in _NOT_THERE:
            self._fall(name, f"{_NOT_THERE[name]} are not used by adkit; AUTO instead")
            name = "AUTO"
        names = _MEANS.get(name)
        if names is None:  # AUTO, and LOWPRECISION of what is no longer than 16 bits
            names = automatic(x.nbytes, self.site.size) if self._peers() else ()
        for one in names:
            strategy = self.get(one)
            if strategy is not None and not strategy.refuses(x):
                return strategy
        library = self.get("NCCL")
        assert library is not None
        return library

    def _peers(self) -> bool:
        """False where AUTO need not even try."""
        return self.site.device.type == "cuda" and self.site.size <= peers.MOST_RANKS

    def get(self, name: str) -> Strategy | None:
        """The strategy of exactly this name; None where it cannot be had."""
        if name not in self._made and name not in self.fallen:
            try:
                self._made[name] = MAKERS[name](self.site)
            except Unavailable as why:
                self._fall(name, f"{why}; NCCL instead")
        return self._made.get(name)

    def _fall(self, name: str, why: str) -> None:
        if name not in self.fallen:
            self.fallen[name] = f"{name}: {why}"
            if self.site.rank == 0:
                warnings.warn(f"all-reduce strategy {self.fallen[name]}", RuntimeWarning, stacklevel=4)
