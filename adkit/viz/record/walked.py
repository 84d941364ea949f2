"""What a record says of a walk's graphs, kept while the walk goes on: :class:`Walked`.

It holds what is dear and depends on graphs alone: rows, graphs as splices, which ids a step kept but changed. It
follows a list of steps, telling only what it has not told yet; :mod:`~adkit.viz.record.write` makes a record of it, the
same as one made from the start.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from adkit.graph.code import Symbols
from adkit.graph.snapshot import NodeRecord, Snapshot
from adkit.graph.step import Step
from adkit.viz.record import format as f
from adkit.viz.record.rows import Mark, Rows
from adkit.viz.record.splice import moved, splices


@dataclass(frozen=True, slots=True)
class Told:
    """What was told of one step: its graphs, their indices, ids; and how much there was when it was told."""

    was: Snapshot
    now: Snapshot
    before: int
    after: int
    created: int
    erased: tuple[int, ...]
    changed: tuple[int, ...]
    rewired: tuple[int, ...]
    moved: tuple[int, ...]
    graphs: int
    rows: Mark

    def of(self, s: Step) -> bool:
        """Whether it is still what there is to tell of ``s``: two steps over the same graphs differ in nothing here."""
        return _same(self.was, s.before) and _same(self.now, s.after)


class Walked:
    """The graphs of a walk as a record has them; ``lock`` is held while it is read, as several may look at once."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self.rows = Rows()
        self.snapshots: list[Snapshot] = []
        #: Of each graph its rows.
        self.lists: list[list[int]] = []
        self.graphs: list[f.Graph] = []
        self.told: list[Told] = []
        self._known: dict[int, int] = {}

    def follow(self, steps: Sequence[Step]) -> None:
        """Tell what ``steps`` are: what was told of other steps is dropped, what is missing is made."""
        with self.lock:
            self.keep(steps)
            try:
                for s in steps[len(self.told) :]:
                    self.told.append(self._tell(s))
            except BaseException:
                self._forget()  # a graph half told
                raise

    def keep(self, steps: Sequence[Step]) -> None:
        """Drop what was told of other steps than these, so that no graph is held that a walk gave up."""
        with self.lock:
            pairs = zip(self.told, steps, strict=False)
            same = next((k for k, (t, s) in enumerate(pairs) if not t.of(s)), min(len(self.told), len(steps)))
            if same == len(self.told):
                return
            if same == 0:
                self._forget()
                return
            last = self.told[same - 1]
            del (
                self.told[same:],
                self.snapshots[last.graphs :],
                self.lists[last.graphs :],
                self.graphs[last.graphs :],
            )
            self.rows.cut(last.rows)
            self._known = {
                id(g): k for t in self.told for g, k in ((t.was, t.before), (t.now, t.after)) if len(g)
            }

    def _tell(self, s: Step) -> Told:
        last = next((t.after for t in reversed(self.told) if t.after >= 0), -1)
        before = self._graph(s.before, last)
        if s.changed:
            after = self._graph(s.after, before)
        else:
            after = before if before >= 0 else self._graph(s.after, last)
            if len(s.after):
                self._known[id(s.after)] = after
        created, erased = (len(s.diff.created), s.diff.erased) if before != after else (0, ())
        changed, rewired, shifted = (
            _kept(s) if before != after and before >= 0 and after >= 0 else ((), (), ())
        )
        return Told(
            s.before, s.after, before, after, created, erased, changed, rewired, shifted,
            len(self.graphs), self.rows.mark(),
        )  # fmt: skip

    def _graph(self, s: Snapshot, base: int) -> int:
        """The index of a graph, told from graph ``base`` if it is new; -1 for an empty one."""
        if not len(s):
            return -1
        known = self._known.get(id(s))
        if known is not None:
            return known
        symbols = Symbols(s)
        new = self.rows.of(s)
        edits = splices(self.lists[base] if base >= 0 else [], new)
        self.graphs.append(
            f.Graph.model_construct(
                size=len(s), base=base, splices=edits, symbols=dict(symbols.names), view=None
            )
        )
        self.snapshots.append(s)
        self.lists.append(new)
        made = self._known[id(s)] = len(self.snapshots) - 1
        return made

    def nodes(self) -> f.Nodes:
        """Every node of the walk."""
        origins = {n.id: n.origins for n in self.rows.nodes}
        born: dict[int, int] = {}
        gone: dict[int, int] = {}
        told = 0
        for k, t in enumerate(self.told):
            for n in self.rows.nodes[told : t.rows.nodes]:
                born.setdefault(n.id, k)
            told = t.rows.nodes
            gone.update(dict.fromkeys(t.erased, k))
        made = f.Nodes()
        for i in sorted(origins):
            made.id.append(i)
            made.born.append(born[i])
            made.gone.append(gone.get(i, -1))
            made.origins.items.extend(origins[i])
            made.origins.starts.append(len(made.origins.items))
        return made


def _kept(s: Step) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Ids that a step kept: with another target or arguments, only rewired, in another order."""
    changed, old = set(s.diff.changed), s.before.by_id
    fresh = [(o, n) for n in s.after if (o := old.get(n.id)) is not n and o is not None]
    rewired = [n.id for o, n in fresh if n.id not in changed and _differs(o, n)]
    return tuple(sorted(changed)), tuple(rewired), tuple(moved(s.before, s.after))


def _same(a: Snapshot, b: Snapshot) -> bool:
    return a is b or not (len(a) or len(b))


def _differs(a: NodeRecord, b: NodeRecord) -> bool:
    return bool(a.target != b.target or a.args != b.args or a.kwargs != b.kwargs)


__all__ = ["Told", "Walked"]
