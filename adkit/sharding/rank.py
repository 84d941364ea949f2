"""One rank of a virtual world, and all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from adkit.contract import DistConfig, LocalWeight
from adkit.graph.display import mimebundle
from adkit.graph.placement import PLAN, ShardingPlan
from adkit.graph.snapshot import Snapshot
from adkit.models.loading import LOCAL
from adkit.passes import Stage
from adkit.sharding.forks import fork, graph_module, states
from adkit.sharding.memory import RankMemory, rank_memory

if TYPE_CHECKING:
    from adkit.workbench import Workbench


class Rank:
    """One rank: ``wb`` is its own Workbench, at the end of the sharding stage (run it on to see later steps)."""

    def __init__(self, wb: Workbench, whole: Snapshot, plan: ShardingPlan) -> None:
        self.wb, self._whole, self._plan = wb, whole, plan

    @property
    def dist(self) -> DistConfig:
        """Its place in the world."""
        return self.wb._context.dist

    @property
    def graph(self) -> Snapshot:
        """Its graph when the sharding stage is done."""
        return states(self.wb)[end_of(self.wb)].snapshot

    @property
    def module(self) -> GraphModule:
        """Its graph as a module, on shapes; each access builds one of its own."""
        return graph_module(fork(self.wb, end_of(self.wb)))

    @property
    def local(self) -> dict[str, LocalWeight]:
        """Which part of which weight it holds, by the name that its graph reads."""
        end = end_of(self.wb)
        here = self.wb.position == end
        found = graph_module(self.wb).meta if here else states(self.wb)[end].records
        return dict(found.get(LOCAL, {}))

    @property
    def memory(self) -> RankMemory:
        """What it keeps in memory."""
        engine = self.wb._context.engine.share(self.dist.pools)
        return rank_memory(
            self.graph, self._whole, self._plan, engine, self.dist, self.local, self.wb.factory.tied
        )

    def __repr__(self) -> str:
        d = self.dist
        dealt = d.moe_ep_size > 1 and any(row.decision == "experts" for row in self._plan)
        experts = f", share {d.moe_ep_rank} of {d.moe_ep_size} of the experts" if dealt else ""
        return f"Rank {d.rank} of {d.world_size}{experts}: {self.graph!r}\n  {self.memory!r}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


class Ranks(Sequence[Rank]):
    """The ranks of a world; each is cut when it is first asked for."""

    def __init__(self, whole: Snapshot, hinted: Workbench) -> None:
        self._whole, self._hinted = whole, hinted
        self._made: dict[int, Rank] = {}

    def __len__(self) -> int:
        return self._hinted._context.dist.world_size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"no rank {index}: there are {len(self)}")
        r = index % len(self)
        if r not in self._made:
            base = self._hinted
            own = fork(base, base.position, dist=base._context.dist.at(r))
            while own.position < end_of(own):
                own.step()
            self._made[r] = Rank(own, self._whole, plan_of(base))
        return self._made[r]

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


def end_of(wb: Workbench) -> int:
    """How many steps there are to the end of the sharding stage."""
    return sum(p.config.stage.position <= Stage.SHARDING.position for p in wb._passes)


def start_of(wb: Workbench) -> int:
    """How many steps there are before the sharding stage."""
    return sum(p.config.stage.position < Stage.SHARDING.position for p in wb._passes)


def plan_of(wb: Workbench) -> ShardingPlan:
    """The plan that detection left with the graph."""
    plan = graph_module(wb).meta.get(PLAN)
    return plan if isinstance(plan, ShardingPlan) else ShardingPlan()
