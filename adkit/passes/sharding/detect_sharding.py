"""``detect_sharding``: which tensor is cut where, and why."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch.fx import GraphModule

from adkit.contract import AllGatherStrategy, AllReduceStrategy, DistConfig
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.registry import register
from adkit.passes.sharding.planning import check_sizes, follow, make_plan
from adkit.passes.sharding.regions import Layout, choose


class DetectShardingConfig(PassConfig):
    """What may be cut, and where the decisions come from."""

    allreduce_strategy: AllReduceStrategy = Field("AUTO", description="How sums over ranks are made")
    allgather_strategy: AllGatherStrategy = Field("AUTO", description="How pieces of ranks are joined")
    dist_backend: Literal["auto", "torch", "trtllm"] = Field("auto", description="Library of the collectives")
    manual_config: dict[str, Any] = Field(default_factory=dict, description="Decisions by hand")


@register
class DetectSharding(Pass):
    """Decide what each rank will hold: a plan, a row a node. Nothing is changed yet.

    Why: what is cut wrongly computes something else. So a cut is followed through every node from the first to the last
    linear of a region, and a region is cut only if a rule accounts for each; else it stays whole, and its rows say which node
    is in the way.

        before: q, k, v, o, gate, up, down: whole
        after:  the same graph; gm.meta["adkit_plan"]: q, k, v, gate, up colwise; o, down rowwise, summed
    """

    key = "detect_sharding"
    stage = Stage.SHARDING
    Config: ClassVar[type[PassConfig]] = DetectShardingConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Leave a ShardingPlan in ``gm.meta``; the graph stays as it is."""
        dist: DistConfig = ctx.dist
        if dist.world_size == 1:
            return PassInfo(skipped=True, reason="one rank: nothing to cut")
        layout = Layout.of(gm)
        choices = choose(layout, {})
        decisions = {n: c.decision for n, c in choices.items()}
        found = follow(gm, decisions, "the heuristic's plan")
        check_sizes(found, decisions, dist)
        plan = make_plan(gm, choices, found, dist)
        gm.meta["adkit_plan"] = plan
        ctx.report(repr(plan))
        cut = sum(r.decision != "whole" for r in plan)
        return PassInfo(num_matches=cut, details={"plan": repr(plan), "tp": dist.tp_size})
