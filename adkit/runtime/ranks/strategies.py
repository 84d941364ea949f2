"""How sums over ranks are made: a strategy a name, and which one stands in where a strategy cannot be had.

A strategy is made once a world, by a function registered here under the name that graphs and configurations use
(``AllReduceStrategy``). It may raise :class:`Unavailable` when it is made (hardware, a library), and refuse single
tensors (their size or dtype). Whether it does must depend on nothing that differs between ranks.

The rule: the strategy asked for; where it is not there or refuses, ``NCCL``, which takes everything. ``AUTO`` asks for
what :func:`automatic` names for that many bytes. (On a CPU the library under the name ``NCCL`` is gloo.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as torch_dist
from torch import Tensor


class Unavailable(Exception):
    """A strategy cannot be had here; says why."""


class Strategy(Protocol):
    """One way to add up a tensor over the ranks."""

    def refuses(self, x: Tensor) -> str:
        """Why not this tensor; empty when it can."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum; ``x`` may be overwritten. Enqueued on the current stream, and allowed in a CUDA graph."""
        ...


@dataclass(frozen=True)
class Site:
    """The ranks that a strategy serves, and this one's device."""

    group: torch_dist.ProcessGroup
    rank: int
    size: int
    device: torch.device


class Library:
    """What torch.distributed does: NCCL on GPUs, gloo on CPUs."""

    def __init__(self, site: Site) -> None:
        self._group = site.group

    def refuses(self, x: Tensor) -> str:
        """Nothing."""
        return ""

    def all_reduce(self, x: Tensor) -> Tensor:
        """In place."""
        x = x.contiguous()
        torch_dist.all_reduce(x, group=self._group)
        return x


#: Strategies by name; those of ``AllReduceStrategy`` that are missing fall back.
MAKERS: dict[str, Callable[[Site], Strategy]] = {"NCCL": Library}


def automatic(nbytes: int, site: Site) -> str:
    """The strategy that AUTO means for a sum of so many bytes."""
    return "NCCL"


@dataclass
class Strategies:
    """The strategies of one world, made when first asked for; ``fallen`` says what was not to be had, and why."""

    site: Site
    fallen: dict[str, str] = field(default_factory=dict)
    _made: dict[str, Strategy] = field(default_factory=dict)

    def all_reduce(self, x: Tensor, name: str) -> Tensor:
        """The sum over ranks by the strategy ``name``, or by what stands in for it."""
        if name == "AUTO":
            name = automatic(x.numel() * x.element_size(), self.site)
        strategy = self._get(name)
        if name != "NCCL" and strategy.refuses(x):
            strategy = self._get("NCCL")
        return strategy.all_reduce(x)

    def _get(self, name: str) -> Strategy:
        if name not in self._made:
            try:
                maker = MAKERS.get(name)
                if maker is None:
                    raise Unavailable("there is no such strategy yet")
                self._made[name] = maker(self.site)
            except Unavailable as why:
                self.fallen[name] = f"{name}: {why}; NCCL instead"
                self._made[name] = self._get("NCCL")
        return self._made[name]
