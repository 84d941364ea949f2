"""From steps to a record: rows stored once (:mod:`~adkit.viz.record.rows`), each graph as splices of the one before.

:class:`RecordWriter` makes the light part first (rows, graphs, steps); the dear parts (folding, program,
rewrite classes with pictures) are made a graph or a step at a time, so that a live explorer opens at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adkit.graph.code import Symbols, lines
from adkit.graph.cost import Device, NodeCost, device_named, node_costs
from adkit.graph.diff import Diff, RewriteClass
from adkit.graph.serialize import portable
from adkit.graph.snapshot import NodeRecord, Snapshot
from adkit.graph.step import Step
from adkit.viz.picture import rewrite_picture
from adkit.viz.record import format as f
from adkit.viz.record.rows import Rows
from adkit.viz.record.splice import moved, ragged, runs, splices

#: What costs are counted for unless told otherwise: one prompt of this many tokens, then one token after it.
CONTEXT = 2048


@dataclass(frozen=True)
class Workload:
    """Sizes that a graph leaves open: ``whole`` for a graph of [batch, seq], ``packed`` for one of tokens.

    Empty sizes say that such a graph cannot run this workload.
    """

    name: str
    whole: Mapping[str, int]
    packed: Mapping[str, int]


WORKLOADS = (
    Workload(
        f"prefill of {CONTEXT} tokens",
        {"batch": 1, "seq": CONTEXT, "logits": 1},
        {"tokens": CONTEXT, "sequences": 1, "context": CONTEXT},
    ),
    Workload(f"one token after {CONTEXT}", {}, {"tokens": 1, "sequences": 1, "context": CONTEXT}),
)


class RecordWriter:
    """Builds a :class:`~adkit.viz.record.format.Record` of ``steps``.

    ``sources`` gives the code of a pass by step name. The record grows: :meth:`view` and :meth:`rewrites`
    fill in one graph or one step, :meth:`complete` all of them, :meth:`costs` the costs.
    """

    def __init__(self, steps: Iterable[Step], sources: Mapping[str, f.PassSource] | None = None) -> None:
        self.steps = list(steps)
        self.sources = sources or {}
        #: What costs are told for when they are asked for later (:meth:`costed`).
        self.device: Device | str = "H100 SXM"
        self.snapshots: list[Snapshot] = []
        self.record = f.Record(name="")
        self.rows = Rows(self.record)
        self._lists: list[list[int]] = []
        self._walk()

    # --- the light part

    def _walk(self) -> None:
        graphs: dict[int, int] = {}

        def graph(s: Snapshot, base: int) -> int:
            if not len(s):
                return -1
            if id(s) not in graphs:
                graphs[id(s)] = self._graph(s, base)
            return graphs[id(s)]

        born: dict[int, int] = {}
        gone: dict[int, int] = {}
        last, told = -1, 0
        for k, s in enumerate(self.steps):
            before = graph(s.before, last)
            after = before if not s.changed else graph(s.after, before)
            if not s.changed and len(s.after):
                graphs[id(s.after)] = after = before if before >= 0 else graph(s.after, last)
            for n in self.rows.nodes[told:]:
                born.setdefault(n.id, k)
            told = len(self.rows.nodes)
            step = self._step(s, before, after)
            if after != before:
                gone.update(dict.fromkeys(s.diff.erased, k))
            self.record.steps.append(step)
            last = after if after >= 0 else last
        self._nodes(born, gone)
        self.rows.finish()

    def _step(self, s: Step, before: int, after: int) -> f.Step:
        same = before == after or before < 0 or after < 0
        changed = set() if same else set(s.diff.changed)
        old = s.before.by_id
        fresh = [] if same else [(o, n) for n in s.after if (o := old.get(n.id)) is not n and o is not None]
        rewired = [n.id for o, n in fresh if n.id not in changed and _differs(o, n)]
        return f.Step(
            name=s.name,
            stage=str(s.stage),
            status=s.status,
            doc=s.doc,
            config=_plain(s.config),
            reason=portable(s.info.reason),
            summary=portable(s.summary()),
            matches=s.info.num_matches,
            details=_plain(s.info.details),
            log=[portable(str(x)) for x in s.log],
            seconds=s.seconds,
            record_seconds=s.record_seconds,
            memory_bytes=s.memory_bytes,
            altered=list(s.altered),
            before=before,
            after=after,
            created=0 if before == after else len(s.diff.created),
            erased=0 if before == after else len(s.diff.erased),
            changed=sorted(changed),
            rewired=rewired,
            moved=[] if same else moved(s.before, s.after),
            rewrites=[] if same else None,
            source=self.sources.get(s.name),
        )

    def _graph(self, s: Snapshot, base: int) -> int:
        symbols = Symbols(s)
        new = self.rows.of(s)
        edits = splices(self._lists[base] if base >= 0 else [], new)
        self.snapshots.append(s)
        self._lists.append(new)
        self.record.graphs.append(
            f.Graph.model_construct(
                size=len(s), base=base, splices=edits, symbols=dict(symbols.names), view=None
            )
        )
        return len(self.snapshots) - 1

    def _nodes(self, born: dict[int, int], gone: dict[int, int]) -> None:
        origins = {n.id: n.origins for n in self.rows.nodes}
        nodes = self.record.nodes
        for i in sorted(origins):
            nodes.id.append(i)
            nodes.born.append(born[i])
            nodes.gone.append(gone.get(i, -1))
            nodes.origins.items.extend(origins[i])
            nodes.origins.starts.append(len(nodes.origins.items))

    # --- the dear parts

    def view(self, k: int) -> f.View:
        """Graph ``k``'s folding and program, made on first asking."""
        graph = self.record.graphs[k]
        if graph.view is None:
            snapshot = self.snapshots[k]
            place = {n.id: p for p, n in enumerate(snapshot)}
            graph.view = f.View.model_construct(
                folding=[
                    f.Segment.model_construct(
                        nodes=runs([place[i] for i in s.nodes]),
                        variants=[
                            [
                                f.Block.model_construct(
                                    layer=b.layer,
                                    nodes=runs([place[i] for i in b.nodes]),
                                    leaves=runs([place[i] for i in b.leaves]),
                                )
                                for b in v.blocks
                            ]
                            for v in s.variants
                        ],
                    )
                    for s in snapshot.folding
                ],
                code=[
                    f.Line.model_construct(
                        depth=line.depth, text=line.text, comment=line.comment, ids=self._first(snapshot, line.ids)
                    )
                    for line in lines(snapshot)
                ],
            )  # fmt: skip
        return graph.view

    @staticmethod
    def _first(snapshot: Snapshot, ids: tuple[int, ...]) -> list[int]:
        """Of the nodes that a line stands for, those of the first layer: folding tells the others."""
        return list(dict.fromkeys(snapshot.folding.representative[i] for i in ids))

    def rewrites(self, k: int) -> list[f.Rewrite]:
        """Step ``k``'s rewrite classes, made on first asking."""
        step = self.record.steps[k]
        if step.rewrites is None:
            s = self.steps[k]
            step.rewrites = [rewrite_of(s, r, self.rows.modules) for r in s.rewrites]
        return step.rewrites

    def complete(self) -> f.Record:
        """The whole record, every part made."""
        for k in range(len(self.record.graphs)):
            self.view(k)
        for k in range(len(self.steps)):
            self.rewrites(k)
        return self.record

    def costed(self) -> list[f.Costs]:
        """Every row's cost, counted on first asking for the device that ``device`` names."""
        if not self.record.costs:
            self.costs(self.device)
        return self.record.costs

    def costs(self, device: Device | str = "H100 SXM", workloads: Sequence[Workload] = WORKLOADS) -> None:
        """Count every row's cost under each workload; a graph whose sizes stay unknown is left out."""
        on = device_named(device)
        for w in workloads:
            table: dict[tuple[float, float, float, str], int] = {}
            found = [-1] * len(self.rows.nodes)
            sizes: Mapping[str, int] = {}
            for s, rows in zip(self.snapshots, self._lists, strict=True):
                packed = any(n.op == "placeholder" and n.target == "page_table" for n in s)
                given = w.packed if packed else w.whole
                todo = {
                    n.id: row
                    for n, row in zip(s, rows, strict=True)
                    if n.op == "call_function" and found[row] < 0
                }
                if not given or not todo:
                    continue
                try:
                    counted = node_costs(s, on, given, set(todo))
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
                sizes = {**sizes, **given}
                for i, row in todo.items():
                    cost = _cost_row(counted[i])
                    found[row] = table.setdefault(cost, len(table))
            if table:
                self.record.costs.append(
                    f.Costs(name=w.name, device=on.name, sizes=dict(sizes), table=list(table), rows=found)
                )


def rewrite_of(s: Step | Diff, r: RewriteClass, modules: Mapping[str, int]) -> f.Rewrite:
    """A rewrite class of a step or diff ``s`` as the record has it; ``modules`` are indices by path."""
    made = f.Rewrite(
        text=str(r), label=r.label, count=r.count, where=r.where,
        before=list(r.before), after=list(r.after), changed=list(r.changed),
        module=[modules[x.module_path] for x in r.sites],
        erased_ids=ragged(x.erased for x in r.sites),
        created_ids=ragged(x.created for x in r.sites),
        changed_ids=ragged(x.changed for x in r.sites),
    )  # fmt: skip
    if len(s.before) and r.sites:
        picture = rewrite_picture(s, r)
        index = {b.key: k for k, b in enumerate(picture.boxes)}
        made.picture = f.Picture(
            boxes=[
                f.Box(
                    id=b.node, side="before" if b.cluster[:1] == ("before",) else "after", title=b.title,
                    category=b.category, mark=b.mark, detail=list(b.detail), tooltip=b.tooltip,
                )
                for b in picture.boxes
            ],
            arrows=[
                f.Arrow(tail=index[a.tail], head=index[a.head], label=a.label)
                for a in picture.arrows
                if a.tail in index and a.head in index
            ],
        )  # fmt: skip
    return made


def _differs(a: NodeRecord, b: NodeRecord) -> bool:
    return bool(a.target != b.target or a.args != b.args or a.kwargs != b.kwargs)


def _cost_row(c: NodeCost) -> tuple[float, float, float, str]:
    return (c.flops, c.bytes, float(f"{c.seconds * 1e6:.6g}"), c.bound)


def _plain(v: Any) -> Any:
    """Configuration values as JSON has them."""
    if isinstance(v, dict):
        return {str(k): _plain(x) for k, x in v.items()}
    if isinstance(v, (list, tuple, set, frozenset)):
        return [_plain(x) for x in v]
    if isinstance(v, float) and not math.isfinite(v):
        return str(v)
    if isinstance(v, (bool, int, float, type(None))):
        return v
    return portable(str(v))


__all__ = ["WORKLOADS", "RecordWriter", "Workload"]
