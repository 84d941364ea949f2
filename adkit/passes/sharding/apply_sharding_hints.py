"""``apply_sharding_hints``: a graph with hints becomes one rank's part."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from adkit.contract import DistConfig, ShardingError
from adkit.graph.edit import clean
from adkit.graph.placement import PLAN, ShardingPlan
from adkit.graph.step import PassInfo
from adkit.models.loading import LOCAL
from adkit.ops.hints import is_hint
from adkit.ops.registry import info_of
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.pipeline import propagate_values
from adkit.passes.registry import register
from adkit.passes.sharding.local_calls import LOCAL_CALLS, Hint, Strategies, bind, ops
from adkit.passes.sharding.local_weights import Rewriter, Wanted, make_local
from adkit.passes.sharding.op_kinds import stored
from adkit.passes.sharding.settings import ShardingConfig, agreed_world

_WHOLE = DistConfig.of()
#: What ``simple_shard_filter`` makes of a linear.
_SIMPLE = {"tp_mode": "gather", "output_sizes": None, "tp_min_local_shape": 1}


@register
class ApplyShardingHints(Pass):
    """Cut the graph for one rank, as the hints in it say.

    Each hint is read by itself, with the world's sizes and nothing else: no value is followed, nothing is
    inferred. Linears, embeddings and experts get their part of the weights (``gm.meta["adkit_local"]`` says which, and
    loading reads no more than that), views and splits count local heads, and sums over ranks become collectives. In a
    world of one every hint becomes the plain op.

        before: y = all_reduce(linear(x, W, tp_mode="rowwise"))                # W [D, F]
        after:  y = torch_dist_all_reduce(linear(x, W))                        # W [D, F / ranks]
    """

    key = "apply_sharding_hints"
    stage = Stage.SHARDING
    Config: ClassVar[type[PassConfig]] = ShardingConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every hint; ShardingError for sizes that do not divide, leaving the graph to the caller."""
        dist = agreed_world(self.config, ctx.dist)
        found = self._hints(gm, dist)
        if not found and dist.pools == 1:
            return PassInfo()
        wanted = Wanted()
        for hint, world in found:
            wanted.reader = hint.node
            LOCAL_CALLS[hint.node.target](hint, world, wanted)
        names = make_local(gm, wanted, dist.rank)
        counts: Counter[str] = Counter()
        cut_values: dict[Node, Any] = {}
        shapes: dict[Any, Any] = {}
        for hint, world in sorted(found, key=lambda f: f[0].node.target is ops.shard.default):
            node = hint.node
            now = bind(node, hint.strategies, hint.overrides)  # arguments may have been replaced by now
            with self.site(gm, [node], label=_label(node), before=node) as s:
                writer = Rewriter(s, dist.rank, names, cut_values, shapes)
                s.replace(node, LOCAL_CALLS[node.target](now, world, writer))
            counts[_label(node)] += 1
        for node, value in cut_values.items():
            node.meta["val"] = value
        clean(gm)
        try:
            propagate_values(gm)
        except ShardingError:
            raise
        except Exception as error:
            raise ShardingError(
                f"after cutting for rank {dist.rank} of {dist.world_size} the graph's shapes do not fit each other: "
                f"{error}. A hint is missing or wrong (a view with a literal head count needs tp_scaled_dim)"
            ) from error
        if dist.pools > 1:
            self._join_logits(gm, dist)
        ctx.report(f"{len(found)} nodes processed")
        how = self._strategies(gm, dist)
        details = {
            "strategies": {"all_reduce": how.all_reduce, "all_gather": how.all_gather},
            "nodes processed": len(found), "rank": dist.rank, "world_size": dist.world_size,
            "by hint": dict(counts), "local weights": len(gm.meta.get(LOCAL, {})),
        }  # fmt: skip
        return PassInfo(num_matches=len(found), details=details)

    def _hints(self, gm: GraphModule, dist: DistConfig) -> list[tuple[Hint, DistConfig]]:
        """Every hint in the graph, with the world that counts for it."""
        plan, how = gm.meta.get(PLAN), self._strategies(gm, dist)
        gathers = not dist.enable_attention_dp or (isinstance(plan, ShardingPlan) and plan.attention_dp)
        found = []
        for node in gm.graph.nodes:
            if node.target not in LOCAL_CALLS:
                continue
            linear = node.target is ops.torch_linear_simple.default
            moe = node.target is ops.torch_moe.default
            hinted = is_hint(node.target, node.kwargs)
            hint = bind(node, how)
            # A model's own hints gather no tokens of ranks that have their own: only experts do so by themselves.
            active = hinted and self.config.cuts(hint["layer_type"]) and (moe or gathers)
            if linear and (not active or hint["tp_mode"] == "none") and not dist.enable_attention_dp:
                weight = stored(hint["weight"])
                if dist.world_size > 1 and self.config.simple(node.name, str(getattr(weight, "target", ""))):
                    hint, hinted, active = bind(node, how, _SIMPLE), True, True
            if hinted:
                found.append((hint, dist if active else _WHOLE))
        return found

    def _strategies(self, gm: GraphModule, dist: DistConfig) -> Strategies:
        """How ranks talk: as this pass was told, else as the plan says, else the world."""
        plan = gm.meta.get(PLAN)
        planned = plan if isinstance(plan, ShardingPlan) else ShardingPlan()
        reduces = (self.config.reduce, planned.allreduce_strategy, dist.allreduce_strategy)
        gathers = (self.config.allgather_strategy, planned.allgather_strategy)
        return Strategies(*(next((s for s in told if s != "AUTO"), "AUTO") for told in (reduces, gathers)))

    def _join_logits(self, gm: GraphModule, dist: DistConfig) -> None:
        """Each rank has the logits of its own tokens: whoever samples needs those of all. A vocabulary that is cut has
        gathered them already."""
        output = gm.graph.output_node()
        (logits,) = output.all_input_nodes
        inputs = {n.target: n for n in gm.graph.nodes if n.op == "placeholder"}
        ids = inputs.get("input_ids")
        if ids is None or str(logits.meta["val"].shape[0]) != str(ids.meta["val"].shape[0]):
            return
        with self.site(gm, [logits], label="join logits", before=output) as s:
            target = ops.torch_dist_all_gather.default
            joined = s.call(target, (logits, 0, dist.world_size, self._strategies(gm, dist).all_gather))
        output.replace_input_with(logits, joined)


def _label(node: Node) -> str:
    """The hint's own word: ``linear colwise``, ``view``."""
    info = info_of(node.target)
    assert info is not None
    mode = node.kwargs.get("tp_mode")
    name = info.name.removeprefix("torch_").removesuffix("_simple")
    return f"{name} {mode}" if mode else name
