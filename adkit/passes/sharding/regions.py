"""Which linears can be cut together: the heuristic source of a plan.

A *region* ends at a linear whose product returns to the residual stream, and begins at the linears closest before it.
All of these are tried colwise with the end rowwise; where the propagation meets a node without a rule, the linears
whose cut got there stay whole and the rest is tried again. What remains is accepted only if the end reads pieces.
Each trial walks its region alone, so a model of many layers costs as much as its layers together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from adkit.graph.matching import same_shape
from adkit.graph.placement import Decision
from adkit.graph.provenance import module_path_of
from adkit.passes.sharding.op_kinds import ATTENTION, EMBEDDING, LINEAR, MOE, TOPK, aten, carries, stored
from adkit.passes.sharding.rules import Unaccounted, Walk
from adkit.passes.sharding.spread import Propagation, shape_of
from adkit.passes.sharding.stacks import stack_of

_SAME_IDS = {aten.to.dtype, aten.clone.default, aten.view.default, aten.reshape.default, aten.clamp.default}
#: Which dimension of its weight a decision cuts.
WEIGHT_DIM: dict[Decision, int] = {"colwise": 0, "gather": 0, "vocab": 0, "rowwise": 1, "experts": 0}
_ADDS = {aten.add.Tensor, aten.add_.Tensor}


@dataclass(frozen=True)
class Choice:
    """What is done at one node, and why; ``region``: the module that the node's region ends at."""

    decision: Decision
    why: str
    layer_type: str = "unknown"
    region: str = ""
    source: str = "heuristic"


@dataclass
class Layout:
    """The graph as regions see it.

    ``tokens``: lookups of input ids; ``stream``: values of the residual stream, where no region goes through;
    ``block``: how many values that everything passes through lie before a node (nodes of one block have the same
    count); ``head``: the linear whose product the model gives.
    """

    gm: GraphModule
    nodes: list[Node]
    at: dict[Node, int]
    tokens: set[Node] = field(default_factory=set)
    stream: set[Node] = field(default_factory=set)
    block: dict[Node, int] = field(default_factory=dict)
    expert_blocks: set[int] = field(default_factory=set)
    head: Node | None = None

    def ends_of(self, node: Node) -> list[Node]:
        """The linears that read what ``node`` makes, through whatever lies between."""
        found, seen, pending = [], {node}, list(node.users)
        while pending:
            reader = pending.pop()
            if reader in seen or reader in self.stream or reader.op != "call_function":
                continue
            seen.add(reader)
            if reader.target is LINEAR:
                found.append(reader)
            elif reader.target is not MOE:
                pending += reader.users
        return sorted(found, key=self.at.__getitem__)

    @classmethod
    def of(cls, gm: GraphModule) -> Layout:
        """Read a graph once."""
        nodes = list(gm.graph.nodes)
        layout = cls(gm, nodes, {n: i for i, n in enumerate(nodes)})
        ids = {n for n in nodes if n.op == "placeholder" and n.target == "input_ids"}
        for node in nodes:
            if node.target in _SAME_IDS and node.all_input_nodes[:1] and node.all_input_nodes[0] in ids:
                ids.add(node)
        layout.head = _head(nodes[-1])
        tied = None if layout.head is None else weight_of(layout.head)
        tables = [n for n in nodes if n.target is EMBEDDING and parameter(n.args[0])]
        layout.tokens = {n for n in tables if n.args[1] in ids or weight_of(n) == tied}
        layout._follow_stream()
        layout.expert_blocks = {layout.block[n] for n in nodes if n.target is MOE}
        return layout

    def _follow_stream(self) -> None:
        live: set[Node] = set()
        for node in self.nodes:
            if node in self.tokens or any(a in live for a in node.all_input_nodes):
                live.add(node)
        width = shape_of(next(iter(self.tokens)))[-1:] if self.tokens else ()
        needed_until, passed = -1, 0
        for here, node in enumerate(self.nodes):
            self.block[node] = passed
            if node not in live:
                continue
            if needed_until <= here:  # nothing from before is read after: everything goes through this value
                self.stream.add(node)
                passed += 1
            elif _joins_branches(node) and shape_of(node)[-1:] == width:
                self.stream.add(node)  # parallel branches, or other values are carried along the whole model
            needed_until = max(needed_until, max((self.at[u] for u in node.users), default=here))


def _joins_branches(node: Node) -> bool:
    return node.target in _ADDS and len(node.all_input_nodes) == 2 and same_shape(*node.all_input_nodes)


def parameter(value: object) -> bool:
    """True for the read of a weight."""
    return isinstance(value, Node) and value.op == "get_attr"


def module_of(node: Node) -> str:
    """The module that a node belongs to, as far down as its weight says; its own name where there is none.

    The graph may call a tied weight by its other reader's name: then the module that called counts.
    """
    caller = module_path_of(node)[0]
    if (stack := stack_of(node)) is not None:
        owner = stack.name.rpartition(".")[0]
        return owner if owner.startswith(caller) else caller
    if node.target in (LINEAR, EMBEDDING, MOE):
        owners = [
            str(w.target).rpartition(".")[0] for a in node.all_input_nodes if (w := stored(a)) is not None
        ]
        if owners and owners[0].startswith(caller):
            return owners[0]
    return caller or node.name


def _head(output: Node) -> Node | None:
    """The linear that makes the logits, seen through what works element by element."""
    node = output.all_input_nodes[0] if output.all_input_nodes else None
    while node is not None and node.target is not LINEAR:
        sources = [a for a in node.all_input_nodes if a.op == "call_function"]
        node = sources[0] if len(sources) == 1 and carries(node.target) else None
    return node if node is not None and stored(node.args[1]) is not None else None


def closest_linears(layout: Layout, end: Node) -> list[Node]:
    """The linears that the input of ``end`` comes from, in graph order."""
    linears = (n for n in _behind(layout, end) if n.target is LINEAR)
    return sorted(linears, key=layout.at.__getitem__)


def _behind(layout: Layout, end: Node) -> set[Node]:
    """What the input of ``end`` is computed from, back to the closest linears and the residual stream."""
    seen: set[Node] = set()
    pending: list[object] = [end.args[0]] if end.target is LINEAR else list(end.all_input_nodes)
    while pending:
        node = pending.pop()
        if not isinstance(node, Node) or node in seen or node.op != "call_function" or node in layout.stream:
            continue
        seen.add(node)
        if node.target not in (LINEAR, MOE, EMBEDDING):
            pending += node.all_input_nodes
    return seen


def choose(layout: Layout, taken: Mapping[Node, Choice]) -> dict[Node, Choice]:
    """Decisions of the heuristic for the linears, tables and experts that ``taken`` leaves open."""
    found: dict[Node, Choice] = {}
    for node in layout.nodes:
        if node.target is MOE and node not in taken:
            found[node] = Choice("experts", "each rank has some of the experts", "moe", module_of(node))
    _vocabulary(layout, taken, found)
    for end in reversed(layout.nodes):
        if end.target is not LINEAR or end in taken or end in found:
            continue
        first = closest_linears(layout, end)
        if first and not any(n in taken or (n in found and found[n].decision != "whole") for n in first):
            found.update(_cut_region(layout, end, first, {**taken, **found}))
    for node in layout.nodes:
        if node.target in (LINEAR, EMBEDDING) and node not in found and node not in taken:
            found[node] = Choice("whole", _why_whole(node, found), *kind_of_rest(layout, node))
    _one_cut_a_weight(found)
    return found


def _vocabulary(layout: Layout, taken: Mapping[Node, Choice], found: dict[Node, Choice]) -> None:
    head = layout.head
    tied = {
        weight_of(n): c
        for n, c in taken.items()
        if n.target is not MOE and c.decision in ("whole", "rowwise")
    }
    tables = [n for n in layout.nodes if n in layout.tokens and n not in taken]
    vocab = shape_of(head.args[1])[:1] if head is not None else None
    for node in [*tables, *([head] if head is not None and head not in taken else [])]:
        other = tied.get(weight_of(node))
        if other is not None:
            found[node] = Choice(
                "whole", f"its weight is tied to one that is {other.decision}", "vocab", module_of(node)
            )
        elif node is head:
            why = "each rank makes some logits, then they are joined"
            found[node] = Choice("gather", why, "vocab", module_of(node))
        elif vocab is None or shape_of(node.args[0])[:1] == vocab:
            found[node] = Choice(
                "vocab", "each rank has some rows and gives zeros for others", "vocab", module_of(node)
            )


def weight_of(node: Node) -> str | None:
    """The name of the weight that a linear or an embedding reads."""
    if node.target not in (LINEAR, EMBEDDING):
        return None
    weight = stored(node.args[0 if node.target is EMBEDDING else 1])
    return None if weight is None else str(weight.target)


def _cut_region(
    layout: Layout, end: Node, first: list[Node], known: dict[Node, Choice]
) -> dict[Node, Choice]:
    outcome = try_region(layout, end, first, {n: c.decision for n, c in known.items()})
    kind, name = layer_type(layout, end, first), module_of(end)
    found = {n: Choice("whole", why, kind, name) for n, why in outcome.whole.items()}
    for node in outcome.first:
        found[node] = Choice("colwise", f"makes what {short(end)} reads", kind, name)
    for node in outcome.ends:
        makers = ", ".join(short(n) for n in outcome.first)
        found[node] = Choice("rowwise", f"reads what {makers} cut", kind, name)
    return found


@dataclass
class Outcome:
    """A region tried: what is colwise, what ends it (both empty: nothing is cut), what stays whole and why."""

    first: list[Node] = field(default_factory=list)
    ends: list[Node] = field(default_factory=list)
    whole: dict[Node, str] = field(default_factory=dict)


def try_region(layout: Layout, end: Node, first: list[Node], known: Mapping[Node, Decision]) -> Outcome:
    """Try ``first`` colwise and ``end`` rowwise, less what has no rule."""
    tried, ends, whole, why = list(first), [end], dict[Node, str](), ""
    while tried:
        trial: dict[Node, Decision] = {n: d for n, d in known.items() if layout.block[n] == layout.block[end]}
        trial.update(dict.fromkeys(tried, "colwise"))
        trial.update(dict.fromkeys(ends, "rowwise"))
        try:
            found = walk_region(layout, trial, tried[0], end)
        except Unaccounted as problem:
            if problem.rowwise and problem.node not in known and problem.node not in tried:
                ends.append(problem.node)  # two linears read the same cut: both end the region
                continue
            why = f"{short(problem.node)} is in the way: {problem.why}"
            dropped = [n for n in tried if n in problem.owners]
            whole.update(dict.fromkeys(dropped, why))
            tried = [n for n in tried if n not in problem.owners] if dropped else []
            ends = [end]
            continue
        if all(found.of(e.args[0]).kind == "cut" for e in ends):
            return Outcome(tried, ends, whole)
        why = why or f"{short(end)} would not read pieces"
        break
    return Outcome(whole={**dict.fromkeys((*first, end), why or "nothing is left to cut"), **whole})


def walk_region(layout: Layout, trial: Mapping[Node, Decision], start: Node, end: Node) -> Propagation:
    """Propagate from ``start`` past ``end``, on until nothing that is cut is read any more."""
    walk = Walk(trial)
    stop, at = layout.at[end], layout.at[start]
    while at <= stop:
        node = layout.nodes[at]
        walk.visit(node)
        if any(s.kind == "cut" for s in walk.found.outputs(node)):
            stop = max(stop, max((layout.at[u] for u in node.users), default=at))
        at += 1
    return walk.found


def layer_type(layout: Layout, end: Node, first: Iterable[Node]) -> str:
    """``mha``, ``mla`` (its linears read other linears), ``moe`` (beside experts) or ``mlp``."""
    if any(n.target is ATTENTION for n in _behind(layout, end)):
        return "mla" if any(closest_linears(layout, n) for n in first) else "mha"
    return "moe" if layout.block[end] in layout.expert_blocks else "mlp"


def _one_cut_a_weight(found: dict[Node, Choice]) -> None:
    """A weight with several readers is cut for all of them or for none."""
    readers: dict[str, list[Node]] = {}
    for node in found:
        if node.target in (LINEAR, EMBEDDING):
            weight = weight_of(node)
            if weight is not None:
                readers.setdefault(weight, []).append(node)
    for weight, nodes in readers.items():
        dims = {WEIGHT_DIM.get(found[n].decision) for n in nodes}
        if len(dims) > 1:
            regions = {found[n].region for n in nodes}
            why = f"{weight} has readers that would cut it differently"
            for node, choice in found.items():
                if choice.region in regions:
                    found[node] = Choice("whole", why, choice.layer_type, choice.region)


def _why_whole(node: Node, found: Mapping[Node, Choice]) -> str:
    if node.target is EMBEDDING:
        return "not a table of the vocabulary"
    ahead, seen = list(node.users), set[Node]()
    cut_later = False
    while ahead:
        reader = ahead.pop()
        if reader in seen:
            continue
        seen.add(reader)
        if reader.target is TOPK:
            return "router: every rank routes every token"
        if reader.target is LINEAR:
            cut_later |= found.get(reader, Choice("whole", "")).decision == "colwise"
        elif reader.target in (aten.add.Tensor, aten.add_.Tensor, ATTENTION, MOE):
            continue
        else:
            ahead += reader.users
    if cut_later:
        return "latent: small, and the linears that read it are cut"
    if shape_of(node)[-1:] == (1,):
        return "one output: nothing to cut"
    return "no linear before it whose cut it could read, and none after it in its region"


def kind_of_rest(layout: Layout, node: Node) -> tuple[str, str]:
    """Layer type and region of a node that is in no region."""
    return ("moe" if layout.block[node] in layout.expert_blocks else "unknown"), module_of(node)


def short(node: Node) -> str:
    """The last words of a node's module: ``self_attn.o_proj``; of a product's weight, one module may read several."""
    if (stack := stack_of(node)) is not None:
        return ".".join(stack.name.removesuffix(".weight").split(".")[-2:])
    if node.target not in (LINEAR, MOE, EMBEDDING):
        return node.name
    return ".".join(module_of(node).split(".")[-2:])
