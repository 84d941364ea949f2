"""Ranks: how many there are, what each holds of a weight, how they talk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from adkit.contract.errors import ShardingError

AllReduceStrategy = Literal[
    "AUTO", "NCCL", "ONESHOT", "TWOSHOT", "MIN_LATENCY", "LOWPRECISION", "UB", "MNNVL", "NCCL_SYMMETRIC"
]
AllGatherStrategy = Literal["AUTO", "SYMM_MEM"]


class DistConfig(BaseModel):
    """The world of one rank (AutoDeploy's names).

    Dense layers split over all ``tp_size`` ranks. The layers of experts split the same ranks as ``moe_ep_size`` x
    ``moe_tp_size``: experts first, then each expert's hidden features. Raises ShardingError for sizes that contradict.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    world_size: int = Field(1, ge=1, description="Ranks in all")
    rank: int = Field(0, ge=0, description="This one")
    tp_size: int = Field(1, ge=1, description="Ranks a dense layer is cut over")
    pp_size: int = Field(1, ge=1, description="Pipeline stages; only 1")
    moe_tp_size: int = Field(1, ge=1, description="Ranks an expert is cut over")
    moe_ep_size: int = Field(1, ge=1, description="Ranks the experts are dealt to")
    moe_cluster_size: int = Field(1, ge=1, description="Ranks of a cluster of experts; only 1")
    enable_attention_dp: bool = Field(
        False, description="Attention stays whole on every rank, each with sequences of its own"
    )
    allreduce_strategy: AllReduceStrategy = Field("AUTO", description="How sums over ranks are made")

    @model_validator(mode="after")
    def _consistent(self) -> DistConfig:
        if self.pp_size > 1:
            raise ShardingError(
                f"pp_size={self.pp_size}: pipeline parallelism is not there; use tp_size instead"
            )
        if self.moe_cluster_size > 1:
            raise ShardingError(
                f"moe_cluster_size={self.moe_cluster_size}: clusters of experts are not there; use 1"
            )
        if self.tp_size != self.world_size:
            raise ShardingError(
                f"tp_size={self.tp_size} but world_size={self.world_size}: all ranks split the dense layers, so the "
                "two must be equal (DistConfig.of(tp=...) fills in the rest)"
            )
        if self.moe_ep_size * self.moe_tp_size != self.world_size:
            raise ShardingError(
                f"moe_ep_size={self.moe_ep_size} x moe_tp_size={self.moe_tp_size} is not world_size="
                f"{self.world_size}: the experts' layers split the same ranks"
            )
        if self.rank >= self.world_size:
            raise ShardingError(f"rank={self.rank} is not below world_size={self.world_size}")
        return self

    @classmethod
    def of(cls, tp: int = 1, moe_ep: int | None = None, rank: int = 0, **fields: Any) -> DistConfig:
        """``tp`` ranks; experts dealt to ``moe_ep`` of them (default: all), each expert cut over the rest."""
        ep = tp if moe_ep is None else moe_ep
        if not isinstance(ep, int) or ep < 1 or tp % ep:
            raise ShardingError(
                f"moe_ep={ep!r} does not divide tp={tp}: experts are dealt to groups of equal size"
            )
        return cls(world_size=tp, tp_size=tp, rank=rank, moe_ep_size=ep, moe_tp_size=tp // ep, **fields)

    @property
    def pools(self) -> int:
        """How many ranks have sequences, and a cache, of their own: all with attention data parallelism, else one does
        for all."""
        return self.world_size if self.enable_attention_dp else 1

    @property
    def moe_ep_rank(self) -> int:
        """Which share of the experts this rank has."""
        return self.rank // self.moe_tp_size

    @property
    def moe_tp_rank(self) -> int:
        """Which share of each of its experts."""
        return self.rank % self.moe_tp_size

    def at(self, rank: int) -> DistConfig:
        """The same world seen from another rank."""
        return DistConfig(**{**self.model_dump(), "rank": rank})


@dataclass(frozen=True)
class Cut:
    """What one rank keeps along one dimension: half-open ranges [start, stop) of the whole, put side by side.

    Several ranges where a weight holds blocks that are each cut (Q|K|V, gate|up).
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Elements kept along ``dim``."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class LocalWeight:
    """One rank's part of a weight: the whole weight's name, and its cuts, one a dimension at most.

    ``zero``: this rank has zeros of that shape instead (a bias that is added once, by another rank).
    ``gm.meta["adkit_local"]`` maps the name that a graph reads to one. Loading needs nothing else.
    """

    name: str
    cuts: tuple[Cut, ...] = ()
    zero: bool = False

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part, for a weight of shape ``whole``."""
        local = list(whole)
        for cut in self.cuts:
            local[cut.dim] = cut.size
        return tuple(local)

    def take(self, whole: Tensor) -> Tensor:
        """The part of a tensor that is there as a whole; contiguous, memory of its own (``whole`` itself if uncut)."""
        if not self.cuts and not self.zero:
            return whole
        part = whole.new_empty(self.shape(whole.shape))
        self.copy(whole, part)
        return part

    def copy(self, whole: Tensor, part: Tensor) -> None:
        """Write the part of ``whole`` into ``part``, range by range; it may lie elsewhere and be of another dtype."""
        if self.zero:
            part.zero_()
        else:
            _copy(part, whole, self.cuts)


def _copy(part: Tensor, whole: Tensor, cuts: tuple[Cut, ...]) -> None:
    if not cuts:
        part.copy_(whole)
        return
    at = 0
    for start, stop in cuts[0].ranges:
        size = stop - start
        _copy(part.narrow(cuts[0].dim, at, size), whole.narrow(cuts[0].dim, start, size), cuts[1:])
        at += size


class Communicator(Protocol):
    """How the ranks of a world exchange tensors. Every call is made by all ranks, in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor, strategy: str) -> Tensor:
        """The sum over ranks, on each, in memory of its own."""
        ...

    def all_gather(self, x: Tensor, dim: int, strategy: str) -> Tensor:
        """Every rank's ``x`` in order of rank, joined on ``dim``."""
        ...

    def reduce_scatter(self, x: Tensor, dim: int, strategy: str) -> Tensor:
        """The sum over ranks, of which each keeps its equal share of ``dim``."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's ``x``, on each; the others' is overwritten."""
        ...
