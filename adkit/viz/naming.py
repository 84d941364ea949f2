"""Which node somebody means: ids in a record from what people hold of a node (its id, name, record, FX node, site)."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.fx import Node

from adkit.graph.diff import RewriteClass, Site
from adkit.graph.snapshot import NodeRecord
from adkit.viz.record.format import Record
from adkit.viz.record.read import graph_rows


class Naming:
    """Nodes of a record's graphs by what people call them; ``nodes``: ids of the FX nodes that it was made of."""

    def __init__(self, data: Record, nodes: Mapping[Node, int] | None = None) -> None:
        self._data = data
        self._nodes = nodes or {}
        self._known = set(data.nodes.id)
        self._names: list[dict[str, int]] | None = None

    def __contains__(self, i: int) -> bool:
        return i in self._known

    def id(self, node: Any, graphs: Sequence[int]) -> int:
        """The id that an FX node, a name in one of ``graphs`` (the first that has it), a node or an id stands for.

        KeyError, whose text says what was given and what was expected.
        """
        if isinstance(node, NodeRecord):
            node = node.id
        if isinstance(node, str):
            return self._named(node, graphs)
        if isinstance(node, Node):
            if node not in self._nodes:
                of = (
                    "shows other nodes" if self._nodes else "was not made of an FX graph (adkit.viz.show(gm))"
                )
                raise KeyError(f"no FX node {node.name!r} here: this explorer {of}; give its name or its id")
            return self._nodes[node]
        if not isinstance(node, numbers.Integral) or isinstance(node, bool):
            raise KeyError(
                f"{node!r} is a {type(node).__name__}, no node: give an id, a name, a node of a snapshot (wb.graph) "
                "or, of what adkit.viz.show(gm) made, a torch.fx.Node"
            )
        if int(node) not in self._known:
            raise KeyError(f"no node with id {int(node)} in this record")
        return int(node)

    def ids(self, node: Any, graphs: Sequence[int]) -> list[int]:
        """Ids of one or several nodes, of a site or a rewrite class: those made or changed, else those erased."""
        if isinstance(node, RewriteClass):
            return self.ids(node.sites, graphs)
        if isinstance(node, Site):
            return self.ids([*node.created, *node.changed] or node.erased, graphs)
        if isinstance(node, Iterable) and not isinstance(node, str):
            return [i for n in node for i in self.ids(n, graphs)]
        return [self.id(node, graphs)]

    def _named(self, name: str, graphs: Sequence[int]) -> int:
        names = self._all_names()
        for g in graphs:
            if name in names[g]:
                return names[g][name]
        shown = self._step(graphs[0]) if graphs else "no graph is shown"
        other = next((g for g in reversed(range(len(names))) if name in names[g]), None)
        if other is not None:
            raise KeyError(f"no node {name!r} {shown}; there is one {self._step(other)}")
        here = [n for g in graphs for n in names[g]]
        raise KeyError(f"no node {name!r} {shown}{nearest(name, here)}")

    def _all_names(self) -> list[dict[str, int]]:
        if self._names is None:
            rows, texts = self._data.rows, self._data.texts
            self._names = [{texts[rows.name[r]]: rows.node[r] for r in g} for g in graph_rows(self._data)]
        return self._names

    def _step(self, graph: int) -> str:
        steps = self._data.steps
        after = next((s.name for s in steps if s.after == graph), None)
        before = next((s.name for s in steps if s.before == graph), None)
        return f"after step {after!r}" if after is not None else f"before step {before!r}"


def nearest(given: str, known: Sequence[str]) -> str:
    """``; did you mean 'x' or 'y'?`` for the closest known names, else the names that contain it, else all."""
    close: Iterable[str] = (
        difflib.get_close_matches(given, known, 3, 0.5) or [k for k in known if given and given in k][:3]
    )
    if close:
        return f"; did you mean {' or '.join(repr(c) for c in close)}?"
    return f"; known: {', '.join(known[:40])}" if known else ""


__all__ = ["Naming", "nearest"]
