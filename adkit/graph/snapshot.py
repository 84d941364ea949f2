"""A graph frozen as plain data: one immutable record a node, shared between snapshots.

A snapshot after a pass reuses the record of every node the pass left alone, so a history of thirty
steps over a 2,500-node graph costs little more than its changes. A snapshot can be shown (table,
code), compared (:mod:`adkit.graph.diff`), rebuilt into a runnable graph, and stored as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Node

from adkit.graph.identity import Tag, identities, set_tag, tag_of
from adkit.graph.provenance import Source, layer_of, module_path_of, source_of

if TYPE_CHECKING:
    from adkit.graph.cost import Device
    from adkit.graph.folding import Folding


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to another node of the same snapshot, by id."""

    id: int

    def __repr__(self) -> str:
        return f"%{self.id}"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class NodeRecord:
    """One node as data. ``args``/``kwargs`` hold :class:`Ref` where the FX node held nodes."""

    id: int
    name: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    val: Any
    module_path: str
    module_type: str
    stack_trace: str | None
    origins: tuple[int, ...]
    key: tuple[Any, ...]  # identity of the FX fields it was made from
    meta: dict[str, Any]
    _shape: Any = field(default=False, init=False)  # made on first use: printing symbols is slow
    _inputs: Any = field(default=None, init=False)

    @property
    def target_name(self) -> str:
        """The target as text: ``aten.mul.Tensor``, ``adkit.torch_rmsnorm``, an input's name."""
        return target_name(self.target)

    @property
    def shape(self) -> tuple[Any, ...] | None:
        """Shape of the value (symbols as text), or None where the value is not a tensor."""
        if self._shape is False:
            val = self.val
            dims = None
            if isinstance(val, torch.Tensor):
                dims = tuple(map(size_text, val.shape))
            object.__setattr__(self, "_shape", dims)
        shape: tuple[Any, ...] | None = self._shape
        return shape

    @property
    def dtype(self) -> torch.dtype | None:
        """dtype of the value, or None where it is not a tensor."""
        return self.val.dtype if isinstance(self.val, torch.Tensor) else None

    @property
    def layer(self) -> int | None:
        """Index of the decoder layer this node belongs to, if any."""
        path = self.target if self.op == "get_attr" else self.module_path
        return layer_of(path)

    @property
    def source(self) -> Source | None:
        """The line of modelling code the node came from."""
        return source_of(self.stack_trace)

    def __repr__(self) -> str:
        body = self.target_name
        if self.op == "call_function":
            parts = [repr(a) for a in self.args] + [f"{k}={v!r}" for k, v in self.kwargs.items()]
            body += f"({', '.join(parts)})"
        elif self.op == "output":
            body += repr(self.args)
        facts = [] if self.shape is None else [f"[{', '.join(map(str, self.shape))}] {str(self.dtype)[6:]}"]
        facts += [t for t in (self.module_path, str(self.source or "").rsplit("/", 1)[-1]) if t]
        return f"%{self.id} {self.name}: {self.op} {body}" + (f"  # {', '.join(facts)}" if facts else "")

    def inputs(self) -> list[int]:
        """Ids of the nodes this one reads, in order, repeats kept."""
        if self._inputs is None:
            found: list[int] = []
            _collect(self.args, found)
            _collect(self.kwargs, found)
            object.__setattr__(self, "_inputs", tuple(found))
        return list(self._inputs)


def size_text(d: Any) -> int | str:
    """A dimension: its number, or an open size as text."""
    if isinstance(d, int):
        return d
    expr = getattr(d.node, "expr", None)
    return str(d) if expr is None else _printed(expr)


_printed = lru_cache(maxsize=1 << 12)(str)  # sympy takes 10 us to print a symbol


def target_name(target: Any) -> str:
    """A call target as short text, stable across runs."""
    return target if isinstance(target, str) else _call_name(target)


@lru_cache(maxsize=1 << 10)  # asked of every node of every step, of a few targets
def _call_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = target.name().replace("::", ".")
        return name
    module = getattr(target, "__module__", "") or ""
    name = getattr(target, "__name__", type(target).__name__)
    return f"{module.lstrip('_')}.{name}" if module in ("_operator", "math") else str(name)


def _collect(value: Any, found: list[int]) -> None:
    if isinstance(value, Ref):
        found.append(value.id)
    elif isinstance(value, (tuple, list)):
        for v in value:
            _collect(v, found)
    elif isinstance(value, dict):
        for v in value.values():
            _collect(v, found)
    elif isinstance(value, slice):
        _collect((value.start, value.stop, value.step), found)


def _map(value: Any, fn: Callable[[Any], Any], kinds: type | tuple[type, ...]) -> Any:
    if isinstance(value, kinds):
        return fn(value)
    if isinstance(value, tuple):
        return tuple(_map(v, fn, kinds) for v in value)
    if isinstance(value, list):
        return [_map(v, fn, kinds) for v in value]
    if isinstance(value, dict):
        return {k: _map(v, fn, kinds) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_map(v, fn, kinds) for v in (value.start, value.stop, value.step)))
    return value


class Snapshot:
    """An immutable picture of a graph: its node records in execution order."""

    def __init__(self, nodes: tuple[NodeRecord, ...] = ()) -> None:
        self.nodes = nodes
        self._by_id: dict[int, NodeRecord] | None = None
        self._folding: Folding | None = None
        self._code: str | None = None

    @property
    def by_id(self) -> dict[int, NodeRecord]:
        """Records by node id."""
        if self._by_id is None:
            self._by_id = {n.id: n for n in self.nodes}
        return self._by_id

    @property
    def folding(self) -> Folding:
        """The graph's repeated layers; see :mod:`adkit.graph.folding`."""
        if self._folding is None:
            from adkit.graph.folding import fold

            self._folding = fold(self)
        return self._folding

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[NodeRecord]:
        return iter(self.nodes)

    def __getitem__(self, node_id: int) -> NodeRecord:
        try:
            return self.by_id[node_id]
        except KeyError:
            raise KeyError(f"no node with id {node_id} in this graph of {len(self)} nodes") from None

    def find(self, text: str) -> list[NodeRecord]:
        """Records whose name, target or module path contains ``text``."""
        return [n for n in self.nodes if text in n.name or text in n.target_name or text in n.module_path]

    def counts(self) -> dict[str, int]:
        """Number of call nodes by target, most frequent first."""
        found: dict[str, int] = {}
        for n in self.nodes:
            if n.op == "call_function":
                found[n.target_name] = found.get(n.target_name, 0) + 1
        return dict(sorted(found.items(), key=lambda kv: (-kv[1], kv[0])))

    def users(self) -> dict[int, list[int]]:
        """For every node id, the ids of the nodes that read it, in order."""
        found: dict[int, list[int]] = {n.id: [] for n in self.nodes}
        for n in self.nodes:
            for i in dict.fromkeys(n.inputs()):
                found[i].append(n.id)
        return found

    def table(self) -> Any:
        """The graph as a pandas DataFrame, a row a node (id, name, op, target, shape, dtype, module, source).

        Open sizes go by the names of the code view (B, S, T).
        """
        import pandas as pd

        from adkit.graph.code import symbols

        names = symbols(self)
        rows = [
            {
                "id": n.id,
                "name": n.name,
                "op": n.op,
                "target": n.target_name,
                "shape": "" if n.shape is None else f"[{', '.join(map(names.dim, n.shape))}]",
                "dtype": "" if n.dtype is None else str(n.dtype).removeprefix("torch."),
                "module": n.module_path,
                "source": str(n.source or ""),
            }
            for n in self.nodes
        ]
        columns = ["id", "name", "op", "target", "shape", "dtype", "module", "source"]
        return pd.DataFrame(rows, columns=columns).set_index("id")  # columns named: a graph may have no nodes

    def code(self, *, fold: bool = True, layer: int | None = None, types: bool = True) -> str:
        """The graph as a readable program; repeated layers fold into one loop unless ``fold=False``."""
        from adkit.graph.code import render

        if not fold or layer is not None or not types:
            return render(self, fold=fold, layer=layer, types=types)
        if self._code is None:
            self._code = render(self)
        return self._code

    def cost(self, device: Device | str = "H100 SXM", **sizes: int) -> Any:
        """FLOPs, bytes and roofline seconds of every call on a named device, as a pandas DataFrame.

        ``sizes`` fix what the graph leaves open: ``batch`` and ``seq``; once packed ``tokens``, ``sequences``
        and ``context``. The total is in ``.attrs["total"]``. See :mod:`adkit.graph.cost`.
        """
        from adkit.graph.cost import cost_table

        return cost_table(self, device, sizes)

    def __repr__(self) -> str:
        calls = sum(n.op == "call_function" for n in self.nodes)
        return f"Snapshot({len(self)} nodes, {calls} calls)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from adkit.graph.display import mimebundle

        return mimebundle(self)

    def build(self, attributes: Any) -> GraphModule:
        """A new graph module with these nodes over the tensors of ``attributes``.

        ``attributes`` is a module (tensors looked up by dotted path and shared, not copied). Ids, values and
        provenance are restored. Raises AttributeError naming the tensor that ``attributes`` lacks.
        """
        graph = Graph()
        made: dict[int, Node] = {}
        for n in self.nodes:
            args = _map(n.args, lambda r: made[r.id], Ref)
            kwargs = _map(n.kwargs, lambda r: made[r.id], Ref)
            node = graph.create_node(n.op, n.target, args, kwargs, n.name)
            node.name = n.name
            node.meta = dict(n.meta)
            set_tag(node, Tag(n.id, n.origins))
            made[n.id] = node
        for n in self.nodes:
            if n.op == "get_attr" and attribute(attributes, n.target) is None:
                raise AttributeError(f"the module has no tensor {n.target!r}, which this graph reads")
        gm = GraphModule(attributes, graph, class_name="GraphModule")
        identities(gm).adopt(gm.graph)
        return gm


def attribute(module: Any, path: str) -> Any:
    """What ``module`` has at dotted ``path``, or None."""
    at: Any = module
    for part in path.split("."):
        at = getattr(at, part, None)
    return at


def unchanged(gm: GraphModule, snapshot: Snapshot) -> bool:
    """True when ``gm``'s graph is still what ``snapshot`` froze: the same nodes, arguments, targets and values."""
    rows = snapshot.nodes
    at = 0
    for node in gm.graph.nodes:
        if at == len(rows):
            return False
        owner, args, kwargs, target, val = rows[at].key
        if owner is not node or args is not node._args or kwargs is not node._kwargs:
            return False
        if target is not node.target or val is not node.meta.get("val"):
            return False
        at += 1
    return at == len(rows)


def take(gm: GraphModule, previous: Snapshot | None = None) -> Snapshot:
    """Freeze ``gm``'s graph; records of nodes unchanged since ``previous`` are shared with it.

    Every node must carry an id (:meth:`IdentityMap.settle` gives them).
    """
    before = previous.by_id if previous is not None else {}
    rows: list[NodeRecord] = []
    ids: dict[Node, int] = {}
    for node in gm.graph.nodes:
        tag = tag_of(node)
        if tag is None:
            raise KeyError(f"node {node.name!r} has no adkit id")
        ids[node] = tag.id
        val = node.meta.get("val")
        args, kwargs, target = node._args, node._kwargs, node.target
        old = before.get(tag.id)
        if old is not None:
            key = old.key
            if key[0] is node and key[1] is args and key[2] is kwargs and key[3] is target and key[4] is val:
                rows.append(old)
                continue
        path, kind = module_path_of(node)
        rows.append(
            NodeRecord(
                id=tag.id,
                name=node.name,
                op=node.op,
                target=node.target,
                args=_map(tuple(node.args), lambda n: Ref(ids[n]), Node),
                kwargs=_map(dict(node.kwargs), lambda n: Ref(ids[n]), Node),
                val=val,
                module_path=path,
                module_type=kind,
                stack_trace=node.meta.get("stack_trace"),
                origins=tag.origins,
                key=(node, args, kwargs, target, val),
                meta={k: v for k, v in node.meta.items() if k != "custom"},
            )
        )
    return Snapshot(tuple(rows))
