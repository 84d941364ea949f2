"""Rows of a record: every version of every node stored once, and the tables that rows index.

:class:`Rows` is what :mod:`adkit.viz.record.walked` asks; it is written for speed, since a walk has 20,000 rows and an
explorer shows nothing before them: a column at a time, and nothing worked out twice. Everything is appended, so it can
also be cut back to what it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from adkit.graph.code import dtype_text, op_text
from adkit.graph.provenance import Source, context_of, layer_of, without_layer
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot, size_text
from adkit.viz.category import COLOURS, category_of
from adkit.viz.record import format as f

_PARAMETER = re.compile(r"\.[^.]+$")
#: Stands for an input in a call's text, where repr() would not leave it.
_INPUT = "\0"
_Part = TypeVar("_Part", bound=f.Part)


@dataclass(frozen=True, slots=True)
class Mark:
    """How many there were of everything that :class:`Rows` appends to."""

    nodes: int
    modules: int
    others: int
    sources: int
    values: int
    seen: int
    targets: int
    calls: int
    texts: int
    types: int


class Rows:
    """Rows and the tables they index, which :meth:`of` adds to; ``nodes`` is the node of each row."""

    def __init__(self) -> None:
        self.nodes: list[NodeRecord] = []
        #: The module of each path; ``_others`` has those of a class that the path has in another graph.
        self.modules: dict[str, int] = {}
        self._others: dict[tuple[str, int], int] = {}
        self._rows, self._module_table, self._source_table = f.Rows(), f.Modules(), f.Sources()
        self._value_table: list[f.Value] = []
        self._target_table: list[f.Target] = []
        self._known: dict[int, int] = {}
        self._texts: dict[str, int] = {}
        self._types: dict[str, int] = {}
        self._sources: dict[Source, int] = {}
        self._values: dict[Any, int] = {}
        self._seen: dict[int, int] = {}
        self._targets: dict[tuple[str, str], int] = {}
        self._calls: dict[str, int] = {}
        self._category = {name: k for k, name in enumerate(COLOURS)}
        self.text("")
        self._module("")

    def of(self, s: Snapshot) -> list[int]:
        """The row of every node of ``s``, in order; most are known from the graph before."""
        known = self._known
        new = [n for n in s if id(n) not in known]
        for n in new:
            known[id(n)] = len(known)
        self.nodes += new
        self._add(new)
        return [known[id(n)] for n in s]

    def unknown(self, s: Snapshot) -> int:
        """How many rows ``s`` would add."""
        return sum(id(n) not in self._known for n in s)

    def mark(self) -> Mark:
        """How much there is, for :meth:`cut`."""
        return Mark(
            len(self.nodes), len(self.modules), len(self._others), len(self._sources), len(self._values),
            len(self._seen), len(self._targets), len(self._calls), len(self._texts), len(self._types),
        )  # fmt: skip

    def cut(self, to: Mark) -> None:
        """Drop all that was added since ``to``."""
        del self.nodes[to.nodes :], self._value_table[to.values :], self._target_table[to.targets :]
        _cut(self._rows, to.nodes)
        _cut(self._module_table, to.modules + to.others)
        _cut(self._source_table, to.sources)
        for known, size in (
            (self._known, to.nodes), (self.modules, to.modules), (self._others, to.others), (self._sources, to.sources),
            (self._values, to.values), (self._seen, to.seen), (self._targets, to.targets),
            (self._calls, to.calls), (self._texts, to.texts), (self._types, to.types),
        ):  # fmt: skip
            while len(known) > size:
                known.popitem()

    def write(self, record: f.Record) -> None:
        """Put all there is so far into ``record``, which stays as it is when more is added.

        Class names: a module that no node named is told by the same place in another layer.
        """
        general = {without_layer(path): kind for path, kind in self._types.items()}
        record.rows, record.sources = _copy(self._rows), _copy(self._source_table)
        record.modules = _copy(self._module_table)
        kinds = {k: self._types.get(p, general.get(without_layer(p), 0)) for p, k in self.modules.items()}
        kinds.update({k: kind for (_, kind), k in self._others.items()})
        record.modules.type = [kinds[k] for k in range(len(kinds))]
        record.values, record.targets = list(self._value_table), list(self._target_table)
        record.calls = [text.split(_INPUT) for text in self._calls]
        record.texts = list(self._texts)
        record.categories = [f.Category(name=n, fill=a, border=b) for n, (a, b) in COLOURS.items()]

    def _add(self, nodes: list[NodeRecord]) -> None:
        rows = self._rows
        rows.node += [n.id for n in nodes]
        rows.name += [self.text(n.name) for n in nodes]
        rows.op += [f.OPS.index(n.op) for n in nodes]
        rows.target += [self._target(n) for n in nodes]
        rows.call += [self._calls.setdefault(call_text(n), len(self._calls)) for n in nodes]
        rows.value += [self._value(n) for n in nodes]
        rows.module += [self._module_of(n) for n in nodes]
        rows.source += [self._source(n.source) for n in nodes]
        rows.category += [self._category[category_of(n)] for n in nodes]
        for n in nodes:
            rows.inputs.items += n.inputs()
            rows.inputs.starts.append(len(rows.inputs.items))

    def text(self, text: str) -> int:
        """The index of a text."""
        return self._texts.setdefault(text, len(self._texts))

    def _module_of(self, n: NodeRecord) -> int:
        path = n.module_path
        kind = self.text(n.module_type) if n.module_type else 0
        if kind:
            self._types.setdefault(path, kind)
        own = self._module(path)  # a parameter's too: rewrite classes name it
        if n.op == "get_attr":
            return self._module(_PARAMETER.sub("", n.target) if "." in n.target else "")
        return self._other(path, kind) if kind and self._types[path] != kind else own

    def _module(self, path: str) -> int:
        known = self.modules.get(path)
        if known is not None:
            return known
        above, _, name = path.rpartition(".")
        parent = self._module(above) if path else -1
        self.modules[path] = len(self.modules) + len(self._others)
        return self._entry(path, name, parent)

    def _other(self, path: str, kind: int) -> int:
        """The module of another class that stands at ``path`` in another graph."""
        known = self._others.get((path, kind))
        if known is not None:
            return known
        self._others[path, kind] = len(self.modules) + len(self._others)
        above, _, name = path.rpartition(".")
        return self._entry(path, name, self._module(above) if path else -1)

    def _entry(self, path: str, name: str, parent: int) -> int:
        table = self._module_table
        table.parent.append(parent)
        table.name.append(self.text(name))
        table.path.append(self.text(path))
        layer = layer_of(path)
        table.layer.append(-1 if layer is None else layer)
        return len(table.layer) - 1

    def _source(self, source: Source | None) -> int:
        if source is None:
            return -1
        known = self._sources.get(source)
        if known is not None:
            return known
        made = self._sources[source] = len(self._sources)
        table = self._source_table
        table.file.append(self.text(source.file))
        table.line.append(source.line)
        table.function.append(self.text(source.function))
        table.code.append(self.text(source.code))
        context = context_of(source)
        table.context.append(self.text(context.text if context else ""))
        table.first.append(context.first if context else source.line)
        return made

    def _value(self, n: NodeRecord) -> int:
        known = self._seen.get(id(n.val))  # rows of one node share it, and telling a shape is slow
        if known is None:
            known = self._seen[id(n.val)] = self._new_value(n)
        return known

    def _new_value(self, n: NodeRecord) -> int:
        tensor = isinstance(n.val, torch.Tensor)
        key = (n.shape, n.val.dtype) if tensor else value_text(n.val)
        known = self._values.get(key)
        if known is not None:
            return known
        value = f.Value(text=value_text(n.val))
        if tensor:
            value.shape, value.dtype = list(n.shape or ()), dtype_text(n.dtype)
        self._value_table.append(value)
        made = self._values[key] = len(self._values)
        return made

    def _target(self, n: NodeRecord) -> int:
        key = (n.op, n.target_name)
        known = self._targets.get(key)
        if known is not None:
            return known
        name = n.target_name
        signature = str(n.target._schema) if isinstance(n.target, torch._ops.OpOverload) else ""
        short = op_text(n) if n.op == "call_function" else name
        self._target_table.append(f.Target(name=name, short=short, signature=signature))
        made = self._targets[key] = len(self._targets)
        return made


def _cut(table: f.Rows | f.Modules | f.Sources, size: int) -> None:
    """Keep the first ``size`` entries of each column."""
    for _, column in table:
        if isinstance(column, f.Ragged):
            del column.starts[size + 1 :], column.items[column.starts[size] :]
        else:
            del column[size:]


def _copy(part: _Part) -> _Part:
    """A part with lists of its own."""
    own: dict[str, Any] = {k: _own(v) if isinstance(v, f.Ragged) else list(v) for k, v in part}
    return type(part).model_construct(None, **own)


def _own(lists: f.Ragged) -> f.Ragged:
    return f.Ragged.model_construct(starts=list(lists.starts), items=list(lists.items))


def value_text(v: Any) -> str:
    """A value in short, open sizes by their symbols: ``[s31, 4096] bf16``."""
    if isinstance(v, torch.Tensor):
        return f"[{', '.join(str(size_text(d)) for d in v.shape)}] {dtype_text(v.dtype)}"
    if isinstance(v, (tuple, list)):
        return f"({', '.join(value_text(x) or '-' for x in v)})"
    if isinstance(v, torch.SymInt):
        return str(size_text(v))
    if isinstance(v, (bool, int, float, str, torch.SymFloat, torch.SymBool)):
        return str(v)
    return ""


def call_text(n: NodeRecord) -> str:
    """A node's arguments as text; a zero byte stands for each of :meth:`NodeRecord.inputs`."""
    told = [_told(v) for v in n.args]
    told += [f"{name}={_told(v)}" for name, v in n.kwargs.items()]
    return ", ".join(told)


def _told(v: Any) -> str:
    if isinstance(v, Ref):
        return _INPUT
    if v is None or isinstance(v, (bool, int, float, str, complex)):
        return repr(v)
    if isinstance(v, tuple):
        return f"({_each(v)},)" if len(v) == 1 else f"({_each(v)})"
    if isinstance(v, list):
        return f"[{_each(v)}]"
    if isinstance(v, dict):
        return "{" + ", ".join(f"{name!r}: {_told(x)}" for name, x in v.items()) + "}"
    if isinstance(v, slice):
        return ":".join("" if x is None else _told(x) for x in (v.start, v.stop, v.step))
    if isinstance(v, (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.SymInt)):
        return str(v).removeprefix("torch.")
    return "..." if v is Ellipsis else str(getattr(v, "__name__", type(v).__name__))


def _each(values: Iterable[Any]) -> str:
    return ", ".join(map(_told, values))


__all__ = ["Mark", "Rows", "call_text", "value_text"]
