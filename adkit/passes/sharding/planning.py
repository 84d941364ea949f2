"""Decisions as a plan: a row a node, and whether the world's sizes divide what is cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch.fx import GraphModule, Node

from adkit.contract import DistConfig, ShardingError
from adkit.graph.identity import tag_of
from adkit.graph.placement import PARTIAL, REPLICATED, Decision, PlanRow, ShardingPlan, cut
from adkit.graph.provenance import layer_of
from adkit.ops.registry import info_of
from adkit.passes.sharding.op_kinds import BATCHED, EMBEDDING, LINEAR, MOE, aten, stored
from adkit.passes.sharding.regions import WEIGHT_DIM, Choice, module_of, parameter
from adkit.passes.sharding.rules import Unaccounted, propagate
from adkit.passes.sharding.spread import Propagation, Share, rank_of, shape_of
from adkit.passes.sharding.stacks import stack_of

_PRODUCTS = BATCHED | {aten.addmm.default, aten.mm.default, aten.linear.default, aten.conv1d.default}
DECISIONS: dict[object, tuple[Decision, ...]] = {
    LINEAR: ("colwise", "rowwise", "gather", "whole"),
    EMBEDDING: ("vocab", "whole"),
    MOE: ("experts", "whole"),
    **dict.fromkeys(BATCHED, ("batch", "gather", "whole")),
}


def follow(gm: GraphModule, decisions: Mapping[Node, Decision], dist: DistConfig, source: str) -> Propagation:
    """:func:`propagate`, its failure as a ShardingError that says what to do."""
    for node, decision in decisions.items():
        if decision not in DECISIONS.get(node.target, ("follow", "whole")):
            raise ShardingError(
                f"{source}: {module_of(node)} ({node.name}) cannot be {decision!r}, only "
                f"{' or '.join(repr(d) for d in DECISIONS.get(node.target, ('follow',)))}"
            )
    try:
        found = propagate(gm, decisions, attention_dp=dist.enable_attention_dp)
    except Unaccounted as problem:
        raise ShardingError(_contradiction(problem, source)) from problem
    _one_cut_a_weight(decisions, source)
    return found


def settled(
    gm: GraphModule, choices: Mapping[Node, Choice], dist: DistConfig
) -> tuple[dict[Node, Choice], Propagation]:
    """Choices that hold for the whole graph, and what they come to.

    Regions that the heuristic tried by themselves and that fail beside the others stay whole; a written plan that
    fails is a ShardingError.
    """
    kept = dict(choices)
    while True:
        try:
            found = propagate(
                gm, {n: c.decision for n, c in kept.items()}, attention_dp=dist.enable_attention_dp
            )
            break
        except Unaccounted as problem:
            guessed = {n for n in problem.owners if n in kept and kept[n].source == "heuristic"}
            if not guessed or len(guessed) < len(problem.owners):
                written = sorted({kept[n].source for n in problem.owners if n in kept} - {"heuristic", ""})
                source = f"the {written[0] if written else 'manual'} plan"
                raise ShardingError(_contradiction(problem, source)) from problem
            regions = {kept[n].region for n in guessed}
            why = f"{problem.node.name} is in the way: {problem.why}"
            for node, choice in kept.items():
                if choice.region in regions and choice.source == "heuristic":
                    kept[node] = replace(choice, decision="whole", why=why)
    _one_cut_a_weight({n: c.decision for n, c in kept.items()}, "the plan")
    return kept, found


def _contradiction(problem: Unaccounted, source: str) -> str:
    node = problem.node
    where = "" if node.op == "output" else f" ({module_of(node)})"
    owners = sorted({module_of(n) for n in problem.owners})
    told = f"What is cut there comes from {', '.join(owners[:4])}: " if owners else ""
    return (
        f"{source} contradicts itself at {node.name}{where}: {problem.why}. {told}leave these whole, or decide "
        "for this node so that it fits"
    )


def _one_cut_a_weight(decisions: Mapping[Node, Decision], source: str) -> None:
    """A weight that several nodes read is cut along one dimension for all."""
    said: dict[str, tuple[Node, int | None]] = {}
    for node, decision in decisions.items():
        names, dim = _weights(node, decision)
        for name in names[:1]:
            before = said.setdefault(name, (node, dim))
            if before[1] != dim:
                raise ShardingError(
                    f"{source} contradicts itself: {name} is read by {before[0].name} (cut on {before[1]}) and by "
                    f"{node.name} (cut on {dim}), but it is one weight: decide the same for both"
                )


def min_local(node: Node, found: Propagation) -> int:
    """Smallest piece of a linear's cut features, in elements: a head where they are heads."""
    if node in found.rows:
        return found.least([(int(shape_of(node.args[1])[1]), found.rows[node])])
    return found.least(found.cuts.get(node, ()))


def sizes_of(node: Node, found: Propagation) -> tuple[int, ...]:
    """Block sizes of a linear's cut outputs; empty when they are one block."""
    blocks = tuple(size for size, _ in found.cuts.get(node, ()))
    return blocks if len(blocks) > 1 else ()


def make_plan(
    gm: GraphModule, choices: Mapping[Node, Choice], found: Propagation, dist: DistConfig
) -> ShardingPlan:
    """A row for each node that has a weight to cut, or talks to other ranks, in graph order."""
    rows = [row for node in gm.graph.nodes for row in _row(node, choices, found)]
    if dist.enable_attention_dp:
        rows = _with_tokens(gm, rows, found)
    return ShardingPlan(
        tuple(rows), dist.tp_size, dist.moe_ep_size, dist.moe_tp_size, dist.enable_attention_dp
    )


def _row(node: Node, choices: Mapping[Node, Choice], found: Propagation) -> Iterator[PlanRow]:
    choice = choices.get(node)
    extra = tuple(str(a.target) for a in node.all_input_nodes if parameter(a) and (node, a) in found.sliced)
    summed = node in found.sums or node in found.merged
    if choice is None:
        begins = _begins_term(node, found)
        if not (extra or summed or begins or node in found.norms):
            if node.target in _PRODUCTS and any(
                parameter(a) and rank_of(a) > 1 for a in node.all_input_nodes
            ):
                yield _unreadable(node)
            return
        kind, region, source = _beside(node, choices)
        why = "its weight goes with what it works on" if extra else "norm over features that are cut"
        why = "each rank adds up its own part" if begins else "terms of ranks add up here" if summed else why
        choice = Choice("follow", why, kind, region, source)
    weights, dim = _weights(node, choice.decision)
    if choice.decision in ("batch", "gather"):
        weights += extra  # a bias that is added with the product
    if choice.decision == "follow" and extra:
        weights, dim = extra, next(c.dim for (n, a), c in found.sliced.items() if n is node and parameter(a))
    tag, info = tag_of(node), info_of(node.target)
    module = module_of(node)
    yield PlanRow(
        node=tag.id if tag is not None else -1,
        name=node.name,
        module=module,
        op=info.name if info is not None else str(node.target).removeprefix("aten."),
        decision=choice.decision,
        region=choice.region,
        layer_type=choice.layer_type,
        layer=layer_of(module),
        weights=weights,
        dim=dim,
        min_local=_least(node, choice.decision, found),
        sizes=sizes_of(node, found),
        reduce=summed,
        placement=PARTIAL if node in found.sums else found.of(node).placement,
        source=choice.source,
        why=choice.why,
    )


def _begins_term(node: Node, found: Propagation) -> bool:
    """True where pieces become a term of a sum over ranks: a product or a sum along what is cut."""
    term = node in found.sums or found.of(node).kind == "partial"
    return term and any(found.of(a).kind == "cut" for a in node.all_input_nodes)


def _with_tokens(gm: GraphModule, rows: list[PlanRow], found: Propagation) -> list[PlanRow]:
    """The rows of ranks that have sequences of their own: whole values are pieces of the batch, and tokens are gathered
    where weights are cut."""
    reads = {reader.name for readers in found.gathered.values() for reader in readers}
    head = joined_after(gm, found)
    told = []
    for row in rows:
        if row.decision == "experts":  # gathers and scatters by itself
            told.append(replace(row, tokens="gathered", reduce=True, placement=PARTIAL))
        elif row.name in reads:
            told.append(replace(row, tokens="gathered"))
        elif row.placement == REPLICATED:
            told.append(replace(row, placement=cut(0), tokens="joined" if row.name == head else ""))
        else:
            told.append(row)
    return told


def joined_after(gm: GraphModule, found: Propagation) -> str:
    """The name of the linear whose logits ranks join, each having those of its own sequences; empty without one."""
    node = next(iter(gm.graph.output_node().all_input_nodes), None)
    while node is not None and node.target is not LINEAR:
        sources = [a for a in node.all_input_nodes if a.op == "call_function"]
        node = sources[0] if len(sources) == 1 else None
    return node.name if node is not None and found.of(node).kind != "gathered" else ""


def _unreadable(node: Node) -> PlanRow:
    """A product with a weight that is no ``torch_linear_simple``: it stays whole."""
    op = str(node.target).removeprefix("aten.").removesuffix(".default")
    weights = tuple(str(a.target) for a in node.all_input_nodes if parameter(a))
    module, tag = module_of(node), tag_of(node)
    return PlanRow(
        node=tag.id if tag is not None else -1, name=node.name, module=module, op=op, decision="whole", region=module,
        layer=layer_of(module), weights=weights,
        why=f"{op} is no torch_linear_simple, so nothing is known about its weight",
    )  # fmt: skip


def _least(node: Node, decision: Decision, found: Propagation) -> int:
    if decision != "follow":
        return min_local(node, found)
    blocks = [
        c.blocks or ((c.size, c.share),) for (n, a), c in found.sliced.items() if n is node and parameter(a)
    ]
    return found.least(blocks[0]) if blocks else 1


def _beside(node: Node, choices: Mapping[Node, Choice]) -> tuple[str, str, str]:
    """Layer type, region and source of the closest decided node that ``node`` reads."""
    pending, seen = list(node.all_input_nodes), set[Node]()
    while pending:
        a = pending.pop(0)
        if a in choices:
            return choices[a].layer_type, choices[a].region, choices[a].source
        if a not in seen and a.op == "call_function":
            seen.add(a)
            pending += a.all_input_nodes
    return "unknown", "", "heuristic"


def _weights(node: Node, decision: Decision) -> tuple[tuple[str, ...], int | None]:
    dim = WEIGHT_DIM.get(decision)
    if node.target is LINEAR:
        given = node.args[1:3] if dim != 1 else node.args[1:2]
    elif node.target is EMBEDDING:
        given = node.args[:1]
    elif node.target is MOE:
        given = node.args[3:7]
    elif (stack := stack_of(node)) is not None:
        return (stack.name,), None if decision == "whole" else stack.dim
    else:
        return (), None
    return tuple(str(w.target) for a in given if (w := stored(a)) is not None), dim


# --- does it divide ---------------------------------------------------------------------------------


def check_sizes(found: Propagation, decisions: Mapping[Node, Decision], dist: DistConfig) -> None:
    """ShardingError where ranks cannot share what is cut, with numbers, sizes that work and the way out."""
    if dist.world_size == 1:
        return
    shares: dict[Share, list[Node]] = {}
    for node, blocks in found.cuts.items():
        for _, share in blocks:
            shares.setdefault(share.top(), []).append(node)
    for node, share in found.rows.items():
        shares.setdefault(share.top(), []).append(node)
    for (reader, _), slices in found.sliced.items():
        if not slices.share.owners:  # computed values, of which each rank takes its share
            shares.setdefault(slices.share.top(), []).append(reader)
    unfit = {share: nodes for share, nodes in shares.items() if not _fits(share, dist.tp_size)}
    if unfit:
        raise ShardingError(_why_not(unfit, list(shares), dist.tp_size))
    for node, decision in decisions.items():
        if decision == "experts":
            _check_experts(node, dist)


def _fits(share: Share, tp: int) -> bool:
    return share.pieces % tp == 0 or (not share.exact and tp % share.pieces == 0)


def _why_not(unfit: Mapping[Share, Sequence[Node]], every: Sequence[Share], tp: int) -> str:
    """The first cut that does not fit, the sizes that would do, and a manual_config that leaves all such cuts whole."""
    share, nodes = next(iter(unfit.items()))
    what = share.heads or ("vocabulary rows" if nodes[0].target is EMBEDDING else "features")
    modules = sorted({module_of(n) for n in nodes})
    more = f" (and {len(modules) - 1} more)" if len(modules) > 1 else ""
    works = [n for n in range(2, 129) if all(_fits(s, n) for s in every)]
    some = [n for n in range(2, 129) if _fits(share, n)]
    rule = "divide their number" if share.exact else "divide their number or be a multiple of it"
    sizes = (
        f"tp {_list(works)} would work for the whole model" if works else "no tp works for the whole model"
    )
    if not works and some:
        sizes += f" (tp {_list(some)} for these)"
    config = {_pattern(module_of(n)): "whole" for found in unfit.values() for n in found}
    return (
        f"{share.pieces} {what} of {modules[0]}{more} cannot be shared by tp={tp} ranks: tp must {rule}. {sizes}; or "
        f"leave it whole: manual_config={config}"
    )


def _pattern(module: str) -> str:
    """A module path for all layers: its region's parent."""
    layer = layer_of(module)
    path = module if layer is None else module.replace(f".{layer}.", ".*.", 1)
    return f"{path.rpartition('.')[0]}.*" if layer is not None and "." in path else path


def _list(numbers: Sequence[int]) -> str:
    told = ", ".join(str(n) for n in numbers[:8])
    return told if len(numbers) <= 8 else f"{told}, ..."


def _check_experts(node: Node, dist: DistConfig) -> None:
    gate_up, down = shape_of(node.args[3]), shape_of(node.args[4])
    experts = int(down[0])
    features = int(down[1 if node.kwargs.get("transposed") else 2])
    assert rank_of(node.args[3]) == len(gate_up)
    for count, what, field, size in (
        (experts, "experts", "moe_ep_size", dist.moe_ep_size),
        (features, "hidden features of each expert", "moe_tp_size", dist.moe_tp_size),
    ):
        if count % size:
            works = [n for n in range(1, dist.world_size + 1) if count % n == 0 and dist.world_size % n == 0]
            raise ShardingError(
                f"{count} {what} of {module_of(node)} cannot be shared by {field}={size} ranks: it must divide their "
                f"number. Of {dist.world_size} ranks {field} {_list(works)} would work; or leave them whole: "
                f"manual_config={{{_pattern(module_of(node) + '.')!r}: 'whole'}}"
            )
