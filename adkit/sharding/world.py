"""Making a virtual world: the sharding stage run once, on a fork of a Workbench, up to where ranks part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adkit.contract import ConfigError, DistConfig, ShardingError, nearest
from adkit.graph.placement import PLAN, ShardingPlan
from adkit.graph.snapshot import Snapshot
from adkit.passes import PassConfig
from adkit.sharding.forks import fork, graph_module
from adkit.sharding.rank import start_of
from adkit.sharding.virtual import VirtualRanks

if TYPE_CHECKING:
    from adkit.workbench import Workbench

DETECT, WRITE, APPLY = "detect_sharding", "sharding_transform_executor", "apply_sharding_hints"


def shard(
    wb: Workbench,
    tp: int,
    moe_ep: int | None = None,
    attention_dp: bool | None = None,
    plan: ShardingPlan | None = None,
    **config: Any,
) -> VirtualRanks:
    """Cut a Workbench's model over ``tp`` virtual ranks of this process; the Workbench stays as it is.

    Experts are dealt to ``moe_ep`` of the ranks (default: all) and cut over the rest; with ``attention_dp`` attention
    stays whole and each rank has sequences of its own. ``plan``: an edited one in place of detection. Other keywords
    are fields of the sharding stage's transforms (``shard_layers=["mlp"]``). Raises ShardingError for what cannot be
    cut so, ConfigError for unknown fields.
    """
    dist = _world(tp, moe_ep, attention_dp, plan)
    base = fork(wb, start_of(wb), dist=dist)
    for key in (DETECT, WRITE, APPLY):
        base._index(key)  # a KeyError names what the pipeline lacks
    whole = base.graph
    if plan is not None:
        _refuse_foreign(plan, whole, wb)
        graph_module(base).meta[PLAN] = plan
        base._state.records[PLAN] = plan
    _configure(base, plan is None, config)
    while base.position < base._index(APPLY):
        base.step()
    v = VirtualRanks(wb, whole, base)
    v.ranks[0]  # what cannot be cut is said now
    return v


def _world(tp: Any, moe_ep: Any, attention_dp: bool | None, plan: ShardingPlan | None) -> DistConfig:
    for name, value in (("tp", tp), ("moe_ep", moe_ep)):
        if value is None and name == "moe_ep":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ShardingError(f"shard({name}={value!r}): expected a number of ranks, 1 or more")
    if plan is None:
        return DistConfig.of(tp, moe_ep, enable_attention_dp=bool(attention_dp))
    if not isinstance(plan, ShardingPlan):
        raise ShardingError(
            f"shard(plan={plan!r}): expected a ShardingPlan, as wb.shard(tp=...).plan gives one"
        )
    asked = {
        "tp": (tp, plan.tp),
        "moe_ep": (moe_ep, plan.moe_ep),
        "attention_dp": (attention_dp, plan.attention_dp),
    }
    for name, (given, made) in asked.items():
        if given is not None and given != made:
            raise ShardingError(
                f"the plan was made for {name}={made}, not {given}: its pieces would not fit; make one with "
                f"wb.shard({name}={given}).plan, or shard with {name}={made}"
            )
    return DistConfig.of(tp, plan.moe_ep, enable_attention_dp=plan.attention_dp)


def _configure(base: Workbench, detects: bool, config: dict[str, Any]) -> None:
    """Give each field to the passes of the stage that have it; ConfigError for one that none has."""
    base.configure(DETECT, enabled=detects)
    keys = [*([DETECT] if detects else []), WRITE, APPLY]
    known = {key: type(base._passes[base._index(key)].config).model_fields for key in keys}
    for name in config:
        if not any(name in fields for fields in known.values()):
            names = {n for fields in known.values() for n in fields} - set(PassConfig.model_fields)
            why = "" if detects else "; with a plan nothing is detected"
            raise ConfigError(f"shard() has no option {name!r}{nearest(name, names)}{why}")
    for key, fields in known.items():
        base.configure(key, enabled=True, **{n: v for n, v in config.items() if n in fields})


def _refuse_foreign(plan: ShardingPlan, whole: Snapshot, wb: Workbench) -> None:
    """ShardingError for a plan whose rows are not of this graph."""
    for row in plan:
        node = whole.by_id.get(row.node)
        lacking = [w for w in row.weights if w not in wb.factory.tensors]
        if node is None or node.name != row.name or lacking:
            what = f"weight {lacking[0]!r}" if lacking else f"node {row.name!r} (id {row.node})"
            raise ShardingError(
                f"the plan is of another model or another pipeline: {what} is not in the graph of {wb.name!r}; make a "
                "plan of this one with wb.shard(...).plan and edit that"
            )
