"""The viewer for graphs that never saw adkit: any ``torch.fx.GraphModule`` or ``ExportedProgram``.

Nodes of a foreign graph have no identity, so which node of one graph is which of another is a best effort, and
every result says so: equal structure above or below a node first, then equal calls at the same place of the
same module in execution order, then equal calls on matched inputs.

What a node calls is part of what it is: a call of a module is told by that module's type and settings, a graph
within the graph (a branch, a part) by its size and a digest of its calls.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, MutableMapping
from dataclasses import replace
from difflib import SequenceMatcher
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from adkit.graph.diff import Diff
from adkit.graph.provenance import module_path_of
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot, _map
from adkit.graph.step import PassInfo, Step
from adkit.viz.record.format import Record
from adkit.viz.record.splice import rising
from adkit.viz.record.write import RecordWriter

if TYPE_CHECKING:
    from adkit.viz.explorer import Explorer

BEST_EFFORT = (
    "These graphs carry no node identity: which node became which was matched by structure, module and source "
    "line, as best it could be."
)


def snapshot_of(graph: GraphModule | torch.export.ExportedProgram | Snapshot) -> Snapshot:
    """A graph as plain data, ids in execution order; the graph itself is not touched.

    Parameters that an exported program takes as inputs are shown as the parameters they are. Raises TypeError
    for anything else.
    """
    if isinstance(graph, Snapshot):
        return graph
    module = _module_of(graph)
    named: dict[str, str] = {}
    if isinstance(graph, torch.export.ExportedProgram):
        s = graph.graph_signature
        named = {**s.inputs_to_parameters, **s.inputs_to_buffers, **s.inputs_to_lifted_tensor_constants}
    ids = {n: k for k, n in enumerate(module.graph.nodes)}
    return Snapshot(tuple(_record(n, ids, named, module) for n in module.graph.nodes))


def _module_of(graph: GraphModule | torch.export.ExportedProgram) -> GraphModule:
    if isinstance(graph, torch.export.ExportedProgram):
        return graph.graph_module
    if isinstance(graph, GraphModule):
        return graph
    raise TypeError(
        f"cannot show a {type(graph).__name__}: give a torch.fx.GraphModule or an ExportedProgram "
        "(torch.export.export(module, args) makes one of a module), or a snapshot (wb.graph)"
    )


def _ids_of(
    graph: GraphModule | torch.export.ExportedProgram | Snapshot, told: Snapshot
) -> MutableMapping[Node, int]:
    """The id in ``told`` of every FX node of the graph it tells of; none for a snapshot.

    Held weakly: what is looked at must not keep a module's weights.
    """
    nodes = () if isinstance(graph, Snapshot) else _module_of(graph).graph.nodes
    return WeakKeyDictionary({n: r.id for n, r in zip(nodes, told, strict=False)})


def _record(n: Node, ids: dict[Node, int], named: dict[str, str], module: GraphModule) -> NodeRecord:
    path, kind = module_path_of(n)
    op, target = n.op, n.target
    if op == "placeholder" and n.name in named:
        op, target = "get_attr", named[n.name]
    elif op == "call_module":
        called = module.get_submodule(str(target))
        path, kind, target = str(target), type(called).__name__, _told(called)
    elif op == "get_attr" and isinstance(part := _attribute(module, str(target)), GraphModule):
        target = f"{target}: {_told(part)}"
    val = _value(n)
    return NodeRecord(
        id=ids[n],
        name=n.name,
        op=op,
        target=target,
        args=_map(tuple(n.args), lambda m: Ref(ids[m]), Node),
        kwargs=_map(dict(n.kwargs), lambda m: Ref(ids[m]), Node),
        val=val,
        module_path=path,
        module_type=kind,
        stack_trace=n.meta.get("stack_trace"),
        origins=(),
        key=(None,) * 5,
        meta={"val": val},
    )


def _told(module: torch.nn.Module) -> str:
    """A module's type and settings; of a graph its size and a digest of its calls."""
    if not isinstance(module, GraphModule):
        return f"{type(module).__name__}({module.extra_repr()})"
    calls = [(n.op, n.target_name, n.args, n.kwargs) for n in snapshot_of(module)]
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(calls))
    return f"{len(calls)} nodes #{hashlib.sha1(text.encode()).hexdigest()[:6]}"


def _attribute(module: Any, path: str) -> Any:
    """What a dotted name leads to, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _value(n: Node) -> Any:
    """What a node gives: ``val`` or ``example_value``, or what ShapeProp noted."""
    for key in ("val", "example_value"):
        if key in n.meta:
            return n.meta[key]
    noted: Any = n.meta.get("tensor_meta")
    if hasattr(noted, "shape") and hasattr(noted, "dtype"):
        return torch.empty(tuple(noted.shape), dtype=noted.dtype, device="meta")
    return None


def match(a: Snapshot, b: Snapshot) -> dict[int, int]:
    """For nodes of ``b``, the id of the node of ``a`` that each most likely is; best effort, linear in practice."""
    found: dict[int, int] = {}
    used: set[int] = set()

    def pair(left: Iterable[int], right: Iterable[int]) -> None:
        for i, j in zip(left, right, strict=True):
            found[j] = i
            used.add(i)

    def by(key_a: Callable[[NodeRecord], Hashable], key_b: Callable[[NodeRecord], Hashable]) -> None:
        groups: dict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        for n in a:
            if n.id not in used:
                groups[key_a(n)][0].append(n.id)
        for n in b:
            if n.id not in found:
                groups[key_b(n)][1].append(n.id)
        for left, right in groups.values():
            if len(left) == len(right):
                pair(left, right)

    leaf = lambda n: (n.op, n.target_name) if n.op in ("placeholder", "get_attr", "output") else n  # noqa: E731
    by(leaf, leaf)
    for hashes in (_above, _below):
        ha, hb = hashes(a), hashes(b)
        by(lambda n, h=ha: h[n.id], lambda n, h=hb: h[n.id])  # type: ignore[misc]
    _align(a, b, found, used, pair)
    users = a.users()
    for n in b:
        if n.id in found or not n.inputs():
            continue
        wanted = (_local(n), [found.get(i) for i in n.inputs()])
        near = users[wanted[1][0]] if wanted[1][0] is not None else []
        twins = [a[u] for u in near if u not in used and (_local(a[u]), a[u].inputs()) == wanted]
        if len(twins) == 1:
            pair([twins[0].id], [n.id])
    return found


def _local(n: NodeRecord) -> Hashable:
    """A call without its inputs: what it calls, with which constants."""
    return (n.op, n.target_name, repr(_map((n.args, n.kwargs), lambda r: None, Ref)))


def _place(n: NodeRecord) -> Hashable:
    source = n.source
    return (n.op, n.target_name, n.module_path, (source.file, source.line) if source else None)


def _above(s: Snapshot) -> dict[int, Hashable]:
    """A hash of each node with everything that it is computed from."""
    h: dict[int, Hashable] = {}
    for n in s:
        own = (n.op, n.target_name) if n.op in ("placeholder", "get_attr") else _local(n)
        h[n.id] = hash((own, n.module_path, tuple(h[i] for i in n.inputs())))
    return h


def _below(s: Snapshot) -> dict[int, Hashable]:
    """A hash of each node with everything that is computed from it."""
    h: dict[int, Hashable] = {}
    users = s.users()
    for n in reversed(s.nodes):
        reads = tuple((h[u], tuple(k for k, i in enumerate(s[u].inputs()) if i == n.id)) for u in users[n.id])
        h[n.id] = hash((_local(n), n.module_path, tuple(sorted(reads, key=hash))))
    return h


def _align(a: Snapshot, b: Snapshot, found: dict[int, int], used: set[int], pair: Any) -> None:
    """Between nodes already matched, pair equal calls at equal places in execution order."""
    place_a = {n.id: k for k, n in enumerate(a)}
    anchors = [(place_a[found[n.id]], k) for k, n in enumerate(b) if n.id in found]
    kept = [anchors[k] for k in rising([p for p, _ in anchors])]
    last = (-1, -1)
    for at in [*kept, (len(a), len(b))]:
        left = [n for n in a.nodes[last[0] + 1 : at[0]] if n.id not in used]
        right = [n for n in b.nodes[last[1] + 1 : at[1]] if n.id not in found]
        if left and right:
            for key in (_place, _local):
                rows = [n for n in left if n.id not in used], [n for n in right if n.id not in found]
                same = SequenceMatcher(
                    None, [key(n) for n in rows[0]], [key(n) for n in rows[1]], autojunk=False
                )
                for i, j, size in same.get_matching_blocks():
                    pair((n.id for n in rows[0][i : i + size]), (n.id for n in rows[1][j : j + size]))
        last = at


def renumbered(a: Snapshot, b: Snapshot) -> Snapshot:
    """``b`` with the ids of ``a`` where nodes match, fresh ones elsewhere; what took a node's place names it."""
    found = match(a, b)
    fresh = max((n.id for n in a), default=-1) + 1
    ids: dict[int, int] = {}
    for n in b:
        ids[n.id] = found.get(n.id, fresh)
        fresh += n.id not in found
    stays = set(found.values())
    origins: dict[int, set[int]] = defaultdict(set)
    for n in b:
        if n.id in found:
            was, now = a[found[n.id]].inputs(), n.inputs()
            if len(was) == len(now):
                for i, j in zip(was, now, strict=True):
                    if i not in stays and j not in found:
                        origins[j].add(i)
    rows = []
    for n in b:
        args = _map(n.args, lambda r: Ref(ids[r.id]), Ref)
        kwargs = _map(n.kwargs, lambda r: Ref(ids[r.id]), Ref)
        old = a.by_id.get(ids[n.id]) if n.id in found else None
        if (
            old is not None
            and (old.target, old.args, old.kwargs, old.name) == (n.target, args, kwargs, n.name)
            and n.module_type in ("", old.module_type)
            and _form(old) == _form(n)
        ):
            rows.append(old)
            continue
        made = replace(n, id=ids[n.id], args=args, kwargs=kwargs, origins=tuple(sorted(origins[n.id])))
        if (
            made.origins and not made.module_path
        ):  # subgraph_rewriter keeps no place: that of what it replaced
            place = a[made.origins[0]]
            made = replace(made, module_path=place.module_path, module_type=place.module_type)
        rows.append(made)
    return Snapshot(tuple(rows))


def _form(n: NodeRecord) -> Hashable:
    """Shapes (None an open size, whose name differs from export to export) and dtypes of what a node gives."""
    return tuple(
        (tuple(d if isinstance(d, int) else None for d in t.shape), t.dtype)
        for t in tree_leaves(n.val)
        if isinstance(t, torch.Tensor)
    )


def _spelled(n: NodeRecord) -> str:
    return ", ".join(
        f"[{', '.join(map(str, t.shape))}] {str(t.dtype).removeprefix('torch.')}"
        for t in tree_leaves(n.val)
        if isinstance(t, torch.Tensor)
    )


class GraphDiff(Diff):
    """The difference of two graphs matched as best they could be: a :class:`~adkit.graph.diff.Diff` with a view.

    ``matched`` counts the nodes taken for the same; ``nodes`` are the ids of both graphs' FX nodes.
    ``changed`` has those that give another shape or dtype, too.
    """

    def __init__(self, before: Snapshot, after: Snapshot, names: tuple[str, str]) -> None:
        super().__init__(before, after)
        self.names = names
        self.nodes: MutableMapping[Node, int] = {}
        self.matched = sum(n.id in before.by_id for n in after)

    @cached_property
    def changed(self) -> tuple[int, ...]:
        """Ids in both that call something else, or with other arguments, or give another shape or dtype."""
        told = {*super().changed, *self.reshaped}
        return tuple(n.id for n in self.after if n.id in told)

    @cached_property
    def reshaped(self) -> tuple[int, ...]:
        """Ids in both that give another shape or dtype, where both graphs tell theirs."""
        old = self.before.by_id
        pairs = [(_form(old[n.id]), _form(n), n.id) for n in self.after if n.id in old]
        return tuple(i for was, now, i in pairs if was and now and was != now)

    def record(self) -> Record:
        """Both graphs as a record of two steps."""
        first = Step(self.names[0], "graphs", {}, "", "done", after=self.before)
        second = Step(self.names[1], "graphs", {}, BEST_EFFORT, "done", self.before, self.after)
        second._diff = self  # knows of shapes what a step's own does not ask
        return _record_of([first, second], " -> ".join(self.names), BEST_EFFORT)

    def explore(self) -> Explorer:
        """The two graphs in the explorer, the second compared with the first."""
        from adkit.viz.explorer import Explorer

        return Explorer(self.record(), nodes=self.nodes, mode="compare")

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        if self.reshaped:
            was, now = self.before[self.reshaped[0]], self.after[self.reshaped[0]]
            lines.append(
                f"  {len(self.reshaped)} nodes give another shape or dtype, first {now.name}: "
                f"{_spelled(was)} -> {_spelled(now)}"
            )
        return "\n".join([*lines, f"  ({self.matched} nodes matched; best effort)"])


def diff(
    a: GraphModule | torch.export.ExportedProgram | Snapshot,
    b: GraphModule | torch.export.ExportedProgram | Snapshot,
    *,
    names: tuple[str, str] = ("before", "after"),
) -> GraphDiff:
    """The difference between two graphs that need not know adkit; matching is best-effort (see the module).

    Raises TypeError for what is no graph.
    """
    before, after = snapshot_of(a), snapshot_of(b)
    made = GraphDiff(before, renumbered(before, after), names)
    made.nodes = _ids_of(a, before)
    made.nodes.update(_ids_of(b, made.after))
    return made


def show(graph: GraphModule | torch.export.ExportedProgram | Snapshot, *, name: str = "graph") -> Explorer:
    """A graph in the explorer, folded by modules; raises TypeError for what is no graph."""
    told = snapshot_of(graph)
    step = Step(name, "graph", {}, "", "done", after=told, info=PassInfo())
    from adkit.viz.explorer import Explorer

    return Explorer(_record_of([step], name, ""), nodes=_ids_of(graph, told))


def _record_of(steps: list[Step], name: str, note: str) -> Record:
    made = RecordWriter(steps)
    made.record.name, made.record.note = name, note
    made.record.versions = {"torch": torch.__version__}
    made.costs()
    return made.complete()


__all__ = ["BEST_EFFORT", "GraphDiff", "diff", "match", "renumbered", "show", "snapshot_of"]
