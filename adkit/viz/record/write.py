"""From steps to a record: what :mod:`~adkit.viz.record.walked` tells of the graphs, and what the steps say themselves.

:class:`RecordWriter` makes the light part first (rows, graphs, steps); the dear parts (folding, program,
rewrite classes with pictures) are made a graph or a step at a time, so that a live explorer opens at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adkit.graph.code import lines
from adkit.graph.cost import Device, NodeCost, device_named, node_costs
from adkit.graph.diff import Diff, RewriteClass
from adkit.graph.serialize import portable
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import Step
from adkit.viz.picture import rewrite_picture
from adkit.viz.record import format as f
from adkit.viz.record.splice import ragged, runs
from adkit.viz.record.walked import Told, Walked

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

    ``sources`` gives the code of a pass by step name; ``walked`` what was told of these or other steps before, which
    saves telling it again and is told the rest. The record grows: :meth:`view` and :meth:`rewrites`
    fill in one graph or one step, :meth:`complete` all of them, :meth:`costs` the costs.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        sources: Mapping[str, f.PassSource] | None = None,
        walked: Walked | None = None,
    ) -> None:
        self.steps = list(steps)
        #: What costs are told for when they are asked for later (:meth:`costed`).
        self.device: Device | str = "H100 SXM"
        self.record = f.Record(name="")
        walked = walked or Walked()
        with walked.lock:
            walked.follow(self.steps)
            self.snapshots = list(walked.snapshots)
            self._lists = list(walked.lists)
            self._modules = dict(walked.rows.modules)
            walked.rows.write(self.record)
            self.record.nodes = walked.nodes()
            self.record.graphs = [g.model_copy() for g in walked.graphs]
            told = list(walked.told)
        self.record.steps = [_step(s, t, sources or {}) for s, t in zip(self.steps, told, strict=True)]

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
            step.rewrites = [rewrite_of(s, r, self._modules) for r in s.rewrites]
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
            found = [-1] * len(self.record.rows.node)
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


def _step(s: Step, told: Told, sources: Mapping[str, f.PassSource]) -> f.Step:
    same = told.before == told.after or told.before < 0 or told.after < 0
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
        before=told.before,
        after=told.after,
        created=told.created,
        erased=len(told.erased),
        changed=list(told.changed),
        rewired=list(told.rewired),
        moved=list(told.moved),
        rewrites=[] if same else None,
        source=sources.get(s.name),
    )


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
