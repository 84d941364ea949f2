"""Rows of a record: every version of every node stored once, and the tables that rows index.

:class:`Rows` is what :mod:`adkit.viz.record.write` asks; it is written for speed, since a walk has 20,000 rows and an
explorer shows nothing before them: a column at a time, and nothing worked out twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from adkit.graph.code import dtype_text, op_text
from adkit.graph.provenance import Source, context_of, layer_of, without_layer
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot, size_text
from adkit.viz.category import COLOURS, category_of
from adkit.viz.record import format as f

_PARAMETER = re.compile(r"\.[^.]+$")
#: Stands for an input in a call's text, where repr() would not leave it.
_INPUT = "\0"


class Rows:
    """The rows of ``record``, which :meth:`of` adds to; ``nodes`` is the node of each."""

    def __init__(self, record: f.Record) -> None:
        self.record = record
        self.nodes: list[NodeRecord] = []
        self.modules: dict[str, int] = {}
        self._rows: dict[int, int] = {}
        self._texts: dict[str, int] = {}
        self._types: dict[str, int] = {}
        self._sources: dict[Source | None, int] = {None: -1}
        self._values: dict[Any, int] = {}
        self._seen: dict[int, int] = {}
        self._targets: dict[tuple[str, str], int] = {}
        self._calls: dict[str, int] = {}
        record.categories = [f.Category(name=n, fill=a, border=b) for n, (a, b) in COLOURS.items()]
        self._category = {name: k for k, name in enumerate(COLOURS)}
        self.text("")
        self._module("")

    def of(self, s: Snapshot) -> list[int]:
        """The row of every node of ``s``, in order; most are known from the graph before."""
        known = self._rows
        new = [n for n in s if id(n) not in known]
        for n in new:
            known[id(n)] = len(known)
        self.nodes += new
        self._add(new)
        return [known[id(n)] for n in s]

    def _add(self, nodes: list[NodeRecord]) -> None:
        rows = self.record.rows
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

    def finish(self) -> None:
        """Write down what was collected beside the rows.

        Class names: a module that no node named is told by the same place in another layer.
        """
        general = {without_layer(path): kind for path, kind in self._types.items()}
        self.record.modules.type = [
            self._types.get(p, general.get(without_layer(p), 0)) for p in self.modules
        ]
        self.record.calls = [text.split(_INPUT) for text in self._calls]
        self.record.texts = list(self._texts)

    def text(self, text: str) -> int:
        """The index of a text."""
        return self._texts.setdefault(text, len(self._texts))

    def _module_of(self, n: NodeRecord) -> int:
        if n.module_type and n.module_path not in self._types:
            self._types[n.module_path] = self.text(n.module_type)
        own = self._module(n.module_path)  # a parameter's too: rewrite classes name it
        if n.op == "get_attr":
            return self._module(_PARAMETER.sub("", n.target) if "." in n.target else "")
        return own

    def _module(self, path: str) -> int:
        known = self.modules.get(path)
        if known is not None:
            return known
        above, _, name = path.rpartition(".")
        parent = self._module(above) if path else -1
        made = self.modules[path] = len(self.modules)
        table = self.record.modules
        table.parent.append(parent)
        table.name.append(self.text(name))
        table.path.append(self.text(path))
        layer = layer_of(path)
        table.layer.append(-1 if layer is None else layer)
        return made

    def _source(self, source: Source | None) -> int:
        known = self._sources.get(source)
        if known is not None:
            return known
        assert source is not None
        made = self._sources[source] = len(self._sources) - 1
        table = self.record.sources
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
        self.record.values.append(value)
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
        self.record.targets.append(f.Target(name=name, short=short, signature=signature))
        made = self._targets[key] = len(self._targets)
        return made


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


__all__ = ["Rows", "call_text", "value_text"]
