"""Where a node came from and what became of it, across a whole pipeline.

Every node a pass makes names the ids it replaces; followed back, that leads from a fused kernel to the
lines of modelling code it computes, and forward from a line to the kernel that computes it now.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adkit.graph.provenance import Source
from adkit.graph.snapshot import NodeRecord
from adkit.graph.step import Step


class History:
    """The nodes of all steps by id: when each was made, from what, and when it went."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.records: dict[int, NodeRecord] = {}
        self.born: dict[int, str] = {}
        self.gone: dict[int, str] = {}
        self.alive: set[int] = set()
        last: Any = None
        for s in steps:
            for snapshot in (s.before, s.after):
                if snapshot is last or not len(snapshot):
                    continue
                known = {n.id for n in snapshot}
                for i in self.alive - known:
                    self.gone[i] = s.name
                for n in snapshot:
                    if n.id not in self.records:
                        self.records[n.id] = n
                        self.born[n.id] = s.name
                self.alive, last = known, snapshot

    @cached_property
    def heirs(self) -> dict[int, tuple[int, ...]]:
        """For every id, the ids made in its place."""
        found: dict[int, list[int]] = {}
        for n in self.records.values():
            for o in n.origins:
                found.setdefault(o, []).append(n.id)
        return {i: tuple(ids) for i, ids in found.items()}

    def node(self, node_id: int) -> NodeRecord:
        """The record of an id, from whichever step had it; KeyError for an unknown one."""
        if node_id not in self.records:
            raise KeyError(
                f"no node with id {node_id} in any of these steps ({len(self.records)} nodes known)"
            )
        return self.records[node_id]

    def roots(self, node_id: int) -> tuple[NodeRecord, ...]:
        """The exported nodes that a node goes back to (itself, when it replaced nothing), in export order."""
        found: dict[int, NodeRecord] = {}
        seen: set[int] = set()
        todo = [node_id]
        while todo:
            i = todo.pop()
            if i in seen or i not in self.records:
                continue
            seen.add(i)
            n = self.records[i]
            if n.origins:
                todo.extend(n.origins)
            else:
                found[i] = n
        return tuple(found[i] for i in sorted(found))

    def sources(self, node_id: int) -> tuple[Source, ...]:
        """The lines of modelling code a node computes, in file order."""
        roots = [n.source for n in self.roots(node_id) if n.op not in ("get_attr", "placeholder")]
        return tuple(sorted({s for s in roots if s is not None}, key=lambda s: (s.file, s.line)))

    def ends(self, node_id: int) -> tuple[NodeRecord, ...]:
        """The nodes of the last graph that a node became (itself, when it still stands), in id order."""
        found: dict[int, NodeRecord] = {}
        seen: set[int] = set()
        todo = [node_id]
        while todo:
            i = todo.pop()
            if i in seen:
                continue
            seen.add(i)
            if i in self.alive:
                found[i] = self.records[i]
            todo.extend(self.heirs.get(i, ()))
        return tuple(found[i] for i in sorted(found))


@dataclass(frozen=True)
class Trace:
    """A node's history: ``roots`` (exported nodes), ``ends`` (in the last graph), the ``steps`` between."""

    node: NodeRecord
    roots: tuple[NodeRecord, ...]
    ends: tuple[NodeRecord, ...]
    sources: tuple[Source, ...]
    steps: tuple[str, ...]

    def __repr__(self) -> str:
        head = f"%{self.node.id} {self.node.name} ({self.node.target_name})"
        rows = [head] + [f"  made by {', '.join(self.steps)}"] * bool(self.steps)
        rows += [f"  from {s.file.rsplit('/', 1)[-1]}:{s.line}  {s.code}" for s in self.sources]
        now = [n for n in self.ends if n.id != self.node.id]
        rows += [f"  now %{n.id} {n.name} ({n.target_name})" for n in now]
        if not self.ends:
            rows.append("  now gone, with nothing in its place")
        return "\n".join(rows)


def trace_origins(steps: Iterable[Step], node_id: int) -> Trace:
    """Follow a node back to the exported nodes and source lines it computes. KeyError for an unknown id."""
    history = History(steps)
    return _trace(history, node_id)


def descendants(steps: Iterable[Step], what: int | str) -> tuple[Trace, ...]:
    """What became of a node (its id) or of every exported node of a source line (``modeling_llama.py:66``).

    Raises KeyError for an unknown id, or a line that no node came from, naming the lines near it.
    """
    history = History(steps)
    if isinstance(what, int):
        return (_trace(history, what),)
    exported = [n for n in history.records.values() if not n.origins and n.source is not None]
    hits = [n for n in exported if str(n.source) == what or str(n.source).endswith(f"/{what}")]
    if not hits:
        file, _, line = what.rpartition(":") if ":" in what else (what, "", "")
        known = sorted(
            {n.source.line for n in exported if file and n.source and n.source.file.endswith(file)}
        )
        at = int(line) if line.isdigit() else 0
        near = sorted(known, key=lambda k: abs(k - at))[:5]
        hint = (
            f"lines of {file} that did: {', '.join(map(str, sorted(near)))}"
            if near
            else "give it as 'modeling_llama.py:66'"
        )
        raise KeyError(f"no exported node came from {what!r}; {hint}")
    return tuple(_trace(history, n.id) for n in hits)


def _trace(history: History, node_id: int) -> Trace:
    node = history.node(node_id)
    through: dict[str, None] = {}
    todo, seen = [node_id], set()
    while todo:
        i = todo.pop()
        if i in seen or i not in history.records:
            continue
        seen.add(i)
        if history.records[i].origins:
            through[history.born[i]] = None
            todo.extend(history.records[i].origins)
    return Trace(
        node,
        history.roots(node_id),
        history.ends(node_id),
        history.sources(node_id),
        tuple(reversed(through)),
    )


__all__ = ["History", "Trace", "descendants", "trace_origins"]
