"""``detect_sharding``: which tensor is cut where, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch.fx import GraphModule, Node

from adkit.contract import DistConfig, ShardingError
from adkit.graph.placement import PLAN, Decision, ShardingPlan
from adkit.graph.step import PassInfo
from adkit.ops.hints import is_hint
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register
from adkit.passes.sharding import sources
from adkit.passes.sharding.batches import choose_batches
from adkit.passes.sharding.op_kinds import BATCHED, EMBEDDING, LINEAR, MOE, stored
from adkit.passes.sharding.planning import check_sizes, make_plan, settled
from adkit.passes.sharding.regions import Choice, Layout, choose, kind_of_rest, module_of
from adkit.passes.sharding.settings import ShardingConfig, agreed_world
from adkit.passes.sharding.spread import Propagation, shape_of
from adkit.passes.sharding.stacks import stack_of

Source = Literal["manual", "factory", "heuristic"]
Dim = Literal["tp", "ep", "bmm"]
Choices = dict[Node, Choice]


class DetectShardingConfig(ShardingConfig):
    """What may be cut, and where decisions come from."""

    sharding_source: list[Source] = Field(
        ["manual", "factory", "heuristic"],
        description="Sources of decisions; an earlier one wins",
    )
    sharding_dims: list[Dim] = Field(
        ["tp", "ep", "bmm"],
        description="What may be cut: features and heads of dense layers (tp), experts (ep), the batch of products "
        "with stacked matrices that are no experts' op (bmm)",
    )
    factory_source: Literal["huggingface", "unknown"] = Field(
        "unknown",
        description="Whose plan the factory source is where factory_config gives none: huggingface, the model "
        "config's base_model_tp_plan and its causal LM's; unknown: none",
    )
    factory_config: dict[str, Any] = Field(
        default_factory=dict,
        description="A plan in Hugging Face's words, module path -> style, also as {'tp_plan': ...}",
    )
    manual_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Decisions by hand: module path, * for any text -> colwise, rowwise, gather, vocab, experts or "
        "whole; also as {'tp_plan': ..., 'head_dim': elements of a head}",
    )
    simple_shard_only: bool = Field(
        False, description="Cut every linear's outputs and join them at once; no regions, no experts"
    )
    support_partial_config: bool = Field(
        True,
        description="What a manual or factory plan leaves open goes to the next source; false: stays whole",
    )
    shard_all_unprocessed: bool = Field(
        False, description="Linears that stay whole get their outputs cut and joined at once"
    )
    simple_shard_filter: str | None = Field(
        None,
        description="Comma-separated parts of names: only these linears are cut so by shard_all_unprocessed",
    )
    enable_attention_dp: bool = Field(
        False,
        description="Attention data parallelism: sequences are shared out; experts are cut, and layers other than "
        "attention that shard_layers names; must agree with the world that runs",
    )


@register
class DetectSharding(Pass):
    """Decide what each rank will hold: a plan, a row a node. Nothing is changed yet.

    Why: what is cut wrongly computes something else. So a cut is followed through every node from the first to the
    last linear of a region, and a region is cut only if a rule accounts for each; else it stays whole, and its rows
    say which node is in the way. Decisions come by hand, from Hugging Face's own plan, or from the graph, in that
    order.

        before: q, k, v, o, gate, up, down: whole
        after:  the same graph; gm.meta["adkit_plan"]: q, k, v, gate, up colwise; o, down rowwise, summed
    """

    key = "detect_sharding"
    stage = Stage.SHARDING
    Config: ClassVar[type[ShardingConfig]] = DetectShardingConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Leave a ShardingPlan in ``gm.meta``; the graph stays as it is.

        Raises ShardingError for a plan that names nothing or contradicts itself, and for sizes that do not divide.
        """
        gm.meta.pop(PLAN, None)
        dist = agreed_world(self.config, ctx.dist)
        if self.config.enable_attention_dp and not dist.enable_attention_dp:
            raise ShardingError(
                "enable_attention_dp=True, but the world that runs has it off: set it there "
                "(wb.shard or wb.llm(tp=..., attention_dp=True), --attention-dp, or "
                "Workbench(dist=DistConfig.of(tp=..., enable_attention_dp=True)))"
            )
        if dist.world_size == 1:
            return PassInfo(skipped=True, reason="one rank: nothing to cut")
        if any(n.op == "call_function" and is_hint(n.target, n.kwargs) for n in gm.graph.nodes):
            told = {self.config.reduce, self.config.allgather_strategy} != {"AUTO"}
            lost = "; strategies of exchanges count in apply_sharding_hints alone" if told else ""
            return PassInfo(skipped=True, reason=f"the model brings its own hints{lost}")
        plan = plan_sharding(gm, dist, self.config, getattr(ctx.factory, "config", None))
        gm.meta[PLAN] = replace(
            plan, allreduce_strategy=self.config.reduce, allgather_strategy=self.config.allgather_strategy
        )
        ctx.report(plan.summary)
        if all(r.decision == "whole" and not r.source for r in plan):
            ctx.report(f"nothing is cut: {next(iter(plan)).why}")
        decided = [r for r in plan if r.decision not in ("whole", "follow")]
        sums = sum(r.reduce for r in plan)
        return PassInfo(num_matches=len(decided), details={"plan": plan.summary, "sums over ranks": sums})


def plan_sharding(
    gm: GraphModule, dist: DistConfig, config: DetectShardingConfig | None = None, hf_config: Any = None
) -> ShardingPlan:
    """The plan for a canonical graph and a world, without changing either; raises as the pass does."""
    config = config or DetectShardingConfig.model_validate({"stage": Stage.SHARDING})
    layout = Layout.of(gm)
    choices = _decide(layout, config, hf_config, dist)
    choices = {n: _allowed(n, c, config, dist) for n, c in choices.items()}
    if config.shard_all_unprocessed or config.simple_shard_only:
        choices |= _simple(choices, config, dist)
    choices, found = settled(gm, choices, dist)
    decisions: dict[Node, Decision] = {n: c.decision for n, c in choices.items()}
    check_sizes(found, decisions, dist)
    _check_head_dim(config.manual_config.get("head_dim"), choices, found)
    return make_plan(gm, choices, found, dist)


def _decide(layout: Layout, config: DetectShardingConfig, hf_config: Any, dist: DistConfig) -> Choices:
    """Choices of the sources in order; each linear, table, op of experts and product with stacked matrices gets one."""
    makers: dict[str, Callable[[Choices], Choices]] = {
        "manual": lambda taken: sources.manual(layout, config.manual_config),
        "factory": lambda taken: sources.factory(layout, _factory_plan(config, hf_config)),
        "heuristic": lambda taken: _heuristic(layout, taken, config, dist),
    }
    choices: Choices = {}
    for source in config.sharding_source:
        if config.simple_shard_only and source == "heuristic":
            continue
        if choices and not config.support_partial_config:
            break
        choices |= {n: c for n, c in makers[source](choices).items() if n not in choices}
    why = "no plan names it" if choices else _nothing_said(config, hf_config)
    for node in layout.nodes:
        if node not in choices and (node.target in (LINEAR, EMBEDDING, MOE) or stack_of(node) is not None):
            choices[node] = Choice("whole", why, *kind_of_rest(layout, node), source="")
    return choices


def _nothing_said(config: DetectShardingConfig, hf_config: Any) -> str:
    """Why no source decides anything, and what to give."""
    why = []
    for source in config.sharding_source:
        if source == "manual" and not config.manual_config:
            why.append("manual_config is empty")
        elif source == "factory" and not _factory_plan(config, hf_config):
            if config.factory_source == "unknown":
                why.append(
                    "factory_config is empty and factory_source is unknown ('huggingface': the model's own plan)"
                )
            else:
                why.append("the model's config has no plan and factory_config is empty")
    return "no source of decisions names it" + (f": {'; '.join(why)}" if why else "")


def _heuristic(layout: Layout, taken: Choices, config: DetectShardingConfig, dist: DistConfig) -> Choices:
    """What the graph itself says: regions of linears, then batched products beside them."""

    def refused(node: Node, choice: Choice) -> str:
        stack = stack_of(node)
        if stack is not None and stack.count % dist.tp_size:
            return f"{stack.count} stacked matrices are not shared equally by {dist.tp_size} ranks"
        return _refused(node, choice, config, dist)

    found = choose(layout, taken)
    return found | choose_batches(layout, taken, found, refused)


def _factory_plan(config: DetectShardingConfig, hf_config: Any) -> dict[str, str]:
    given = sources.plan_of(config.factory_config, "factory_config")
    if given or config.factory_source == "unknown" or hf_config is None:
        return given
    return sources.huggingface_plan(hf_config)


def _allowed(node: Node, choice: Choice, config: DetectShardingConfig, dist: DistConfig) -> Choice:
    """The choice, or whole where the settings keep such layers whole."""
    why = "" if choice.decision == "whole" else _refused(node, choice, config, dist)
    return replace(choice, decision="whole", why=why) if why else choice


def _refused(node: Node, choice: Choice, config: DetectShardingConfig, dist: DistConfig) -> str:
    """Why the settings keep such a layer whole; empty where they do not."""
    product = node.target in BATCHED
    dim = "ep" if choice.decision == "experts" else "bmm" if product else "tp"
    if dist.enable_attention_dp and (product or choice.layer_type in ("mha", "mla")):
        return "attention data parallelism: every rank has sequences of its own"
    if dist.enable_attention_dp and dim != "ep" and config.shard_layers is None:
        return "attention data parallelism: every rank has sequences of its own, and shard_layers names no such layers"
    if not config.cuts(choice.layer_type):
        return f"shard_layers leaves {choice.layer_type} layers whole"
    return "" if dim in config.sharding_dims else f"sharding_dims has no {dim}"


def _simple(choices: Choices, config: DetectShardingConfig, dist: DistConfig) -> Choices:
    """Linears that are whole, with outputs cut and joined, where ranks can share them equally."""
    found: Choices = {}
    whole = {
        w.target
        for n, c in choices.items()
        if c.decision == "whole" and n.target is not LINEAR
        for a in n.all_input_nodes
        if (w := stored(a)) is not None
    }
    for node, choice in choices.items():
        if node.target is not LINEAR or choice.decision != "whole" or dist.enable_attention_dp:
            continue
        if config.simple_shard_filter is not None and not config.simple(*sources.names_of(node)):
            continue
        if (weight := stored(node.args[1])) is not None and weight.target in whole:
            why = f"{weight.target} is read by a lookup, too, which stays whole"
            found[node] = replace(choice, why=why)
            continue
        outputs = shape_of(node.args[1])[0]
        if outputs % dist.tp_size:
            found[node] = replace(
                choice, why=f"{outputs} outputs are not shared equally by {dist.tp_size} ranks"
            )
        else:
            why = "every linear's outputs are cut and joined" if config.simple_shard_only else "left over"
            found[node] = replace(choice, decision="gather", why=why, source="heuristic")
    return found


def _check_head_dim(head_dim: Any, choices: Choices, found: Propagation) -> None:
    """``head_dim`` of a manual plan must be the size of the heads that the graph shows."""
    if head_dim is None:
        return
    for node, choice in choices.items():
        if choice.decision == "colwise" and choice.layer_type == "mha":
            for size, share in found.cuts.get(node, ()):
                if share.heads and size // share.pieces % int(head_dim):
                    raise ShardingError(
                        f"manual_config says head_dim={head_dim}, but a head of {module_of(node)} has "
                        f"{size // share.pieces} elements ({share.pieces} heads of {size}); leave head_dim out"
                    )
