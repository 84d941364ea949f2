"""Decisions that were written down: by hand (``manual_config``), or by Hugging Face (a config's tensor-parallel
plan).

Both are tables from module paths, ``*`` standing for any text, to the name of a style. What they say is followed
through the graph as the heuristic's own decisions are.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch.fx import Node

from adkit.contract import ShardingError, nearest
from adkit.graph.placement import Decision
from adkit.passes.sharding.batches import kind_of_product
from adkit.passes.sharding.op_kinds import EMBEDDING, LINEAR, MOE, stored
from adkit.passes.sharding.regions import Choice, Layout, closest_linears, kind_of_rest, layer_type, module_of
from adkit.passes.sharding.stacks import stack_of

#: Styles of transformers and AutoDeploy, and our own words, as decisions for a linear.
STYLES: dict[str, Decision] = {
    "colwise": "colwise", "packed_colwise": "colwise", "local_colwise": "colwise", "local_packed_colwise": "colwise",
    "rowwise": "rowwise", "packed_rowwise": "rowwise", "local_rowwise": "rowwise", "rowwise_split_input": "rowwise",
    "rowwise_rep": "rowwise", "local_packed_rowwise": "rowwise",
    "colwise_rep": "gather", "colwise_gather_output": "gather", "gather": "gather",
    "vocab": "vocab", "embedding_rowwise": "vocab", "embedding_colwise": "whole",
    "batch": "batch",
    "experts": "experts", "moe_tp_experts": "experts", "ep_dispatch_experts": "experts", "grouped_gemm": "experts",
    "moe_experts_allreduce": "experts", "moe_identity_expert": "experts",
    "whole": "whole", "none": "whole", "replicate": "whole", "replicated": "whole", "mla_kv_a_proj": "whole",
    "ep_router": "whole", "replicated_with_grad_allreduce": "whole", "keep_full_weight": "whole",
    "free_full_weight": "whole", "local_params": "whole", "local": "whole", "all_reduce": "whole",
    "sequence_parallel": "whole", "mla": "whole",
}  # fmt: skip
_WORDS = {"tp_plan", "head_dim"}


def manual(layout: Layout, config: Mapping[str, Any]) -> dict[Node, Choice]:
    """Decisions of ``manual_config``: a plan, or AutoDeploy's form ``{"tp_plan": plan, "head_dim": elements}``.

    Raises ShardingError for a pattern that names nothing, a style that does not exist or does not fit what it names,
    and two patterns that disagree.
    """
    plan = plan_of(config, "manual_config")
    return _choices(layout, plan, "manual", must_match=True)


def factory(layout: Layout, plan: Mapping[str, str]) -> dict[Node, Choice]:
    """Decisions of Hugging Face's plan; what it says of modules that are not there is passed over."""
    return _choices(layout, plan, "factory", must_match=False)


def huggingface_plan(hf_config: Any) -> dict[str, str]:
    """The tensor-parallel plan of a Hugging Face config, with what its causal LM adds (``lm_head``); empty when
    none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    inner = hf_config.get_text_config(decoder=True) if hasattr(hf_config, "get_text_config") else hf_config
    plan = dict(getattr(inner, "base_model_tp_plan", None) or {})
    if plan and type(inner) in MODEL_FOR_CAUSAL_LM_MAPPING:
        plan.update(getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(inner)], "_tp_plan", None) or {})
    return {k: v for k, v in plan.items() if isinstance(v, str)}


def plan_of(config: Mapping[str, Any], name: str) -> dict[str, str]:
    """The table in a config of either form; ShardingError for anything else."""
    plan = config.get("tp_plan", {k: v for k, v in config.items() if k not in _WORDS})
    wrong = [k for k in config if k not in _WORDS] if "tp_plan" in config else []
    if wrong:
        raise ShardingError(f"{name} has {wrong[0]!r} beside 'tp_plan'{nearest(wrong[0], _WORDS)}")
    if not isinstance(plan, Mapping) or not all(isinstance(v, str) for v in plan.values()):
        raise ShardingError(
            f"{name} must map module paths to styles, as {{'model.layers.*.mlp.down_proj': 'rowwise'}}, not {plan!r}"
        )
    return dict(plan)


def _choices(layout: Layout, plan: Mapping[str, str], source: str, must_match: bool) -> dict[Node, Choice]:
    targets = {
        n: names_of(n)
        for n in layout.nodes
        if n.target in (LINEAR, EMBEDDING, MOE) or stack_of(n) is not None
    }
    every = {name for names in targets.values() for name in names}
    said: dict[Node, tuple[str, Decision]] = {}
    for pattern, style in plan.items():
        decision = STYLES.get(style)
        if decision is None:
            raise ShardingError(f"{source} plan: {pattern!r} has the style {style!r}{nearest(style, STYLES)}")
        named = [n for n, names in targets.items() if any(matches(name, pattern) for name in names)]
        if not named and must_match and not (decision == "whole" and _is_there(layout, pattern)):
            raise ShardingError(
                f"{source} plan: {pattern!r} names no linear, embedding or op of experts{_like(pattern, every)}"
            )
        for node in named:
            fitting = _fitting(node, decision)
            if fitting is None and not must_match and stack_of(node) is not None:
                continue  # Hugging Face's words for such weights cut their features
            if fitting is None:
                raise ShardingError(
                    f"{source} plan: {pattern!r} makes {module_of(node)} {style!r}, which does not fit "
                    f"{_what(node)}"
                )
            before = said.get(node)
            if before is not None and before[1] != fitting:
                if _exact(before[0]) != _exact(pattern):  # a path without * is meant more than a pattern
                    if _exact(before[0]):
                        continue
                else:
                    raise ShardingError(
                        f"{source} plan contradicts itself: {before[0]!r} makes {module_of(node)} "
                        f"{before[1]!r}, {pattern!r} {fitting!r}"
                    )
            said[node] = (pattern, fitting)
    return {n: _choice(layout, n, d, f"{source} plan: {p}", source, said) for n, (p, d) in said.items()}


def _choice(
    layout: Layout, node: Node, decision: Decision, why: str, source: str, said: Mapping[Node, Any]
) -> Choice:
    kind, region = "vocab" if node is layout.head or node in layout.tokens else "", module_of(node)
    if node.target is MOE:
        kind = "moe"
    elif stack_of(node) is not None:
        kind = kind_of_product(layout, node)
    elif node.target is LINEAR and not kind:
        kind, region = _region(layout, node, said)
    return Choice(decision, why, kind or "unknown", region, source)


def _region(layout: Layout, node: Node, said: Mapping[Node, Any]) -> tuple[str, str]:
    """Layer type and end of the region that a linear belongs to: its own if it ends one, else its reader's."""
    first = closest_linears(layout, node)
    if first and not (node in said and said[node][1] == "colwise"):
        return layer_type(layout, node, first), module_of(node)
    for end in layout.ends_of(node):
        return layer_type(layout, end, closest_linears(layout, end)), module_of(end)
    return kind_of_rest(layout, node)


def _fitting(node: Node, decision: Decision) -> Decision | None:
    """The decision for this kind of node; None where the style makes no sense there."""
    if node.target is MOE:
        return "whole" if decision == "whole" else "experts"
    if node.target is EMBEDDING:
        return decision if decision in ("vocab", "whole") else None
    if node.target is not LINEAR:
        stacked: Decision = "batch" if decision == "experts" else decision
        return stacked if stacked in ("batch", "gather", "whole") else None
    return decision if decision in ("colwise", "rowwise", "gather", "whole") else None


def _what(node: Node) -> str:
    if node.target is EMBEDDING:
        return "an embedding: 'vocab' or 'whole'"
    if node.target is not LINEAR:
        return "a product with stacked matrices: 'batch', 'gather' or 'whole'"
    return "a linear: 'colwise', 'rowwise', 'gather' or 'whole'"


def names_of(node: Node) -> tuple[str, ...]:
    """What a pattern may call a node: its module, its weights, its own name."""
    weights = [str(w.target) for a in node.all_input_nodes if (w := stored(a)) is not None]
    if (stack := stack_of(node)) is not None:
        weights.append(stack.name)
    return tuple(dict.fromkeys((module_of(node), *weights, node.name)))


def matches(name: str, pattern: str) -> bool:
    """``layers.*.mlp`` names ``model.layers.3.mlp``: a pattern may leave out the first modules."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _is_there(layout: Layout, pattern: str) -> bool:
    """Whether a pattern names a node of any kind that reads a weight."""
    readers = (n for n in layout.nodes if any(a.op == "get_attr" for a in n.all_input_nodes))
    return any(matches(name, pattern) for n in readers for name in names_of(n))


def _exact(pattern: str) -> bool:
    return "*" not in pattern


def _like(pattern: str, names: Iterable[str]) -> str:
    from adkit.graph.provenance import without_layer

    return nearest(pattern, {without_layer(n) for n in names})
