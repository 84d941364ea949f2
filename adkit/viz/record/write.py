"""From steps to a record: everything stored once, each graph as splices of the one before.

:class:`RecordWriter` makes the light part first (rows, graphs, steps); the dear parts (folding, program,
rewrite classes with pictures) are made a graph or a step at a time, so that a live explorer opens at once.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adkit.graph.code import Symbols, dtype_text, lines, op_text
from adkit.graph.cost import Device, NodeCost, device_named, node_costs
from adkit.graph.diff import Diff, RewriteClass
from adkit.graph.provenance import Source, context_of, layer_of, without_layer
from adkit.graph.serialize import portable
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot
from adkit.graph.step import Step
from adkit.viz.category import COLOURS, category_of
from adkit.viz.picture import rewrite_picture
from adkit.viz.record import format as f

#: What costs are counted for unless told otherwise: one prompt of this many tokens, then one token after it.
CONTEXT = 2048
_PARAMETER = re.compile(r"\.[^.]+$")


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
        self.record.categories = [f.Category(name=n, fill=a, border=b) for n, (a, b) in COLOURS.items()]
        self._texts: dict[str, int] = {}
        self._modules: dict[str, int] = {}
        self._types: dict[str, int] = {}
        self._sources: dict[Source | None, int] = {None: -1}
        self._values: dict[Any, int] = {}
        self._targets: dict[Any, int] = {}
        self._calls: dict[tuple[str, ...], int] = {}
        self._rows: dict[int, int] = {}
        self.records: list[NodeRecord] = []
        self._category = {name: k for k, name in enumerate(COLOURS)}
        self._text("")
        self._module("")
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
        last = -1
        for k, s in enumerate(self.steps):
            before = graph(s.before, last)
            after = before if not s.changed else graph(s.after, before)
            if not s.changed and len(s.after):
                graphs[id(s.after)] = after = before if before >= 0 else graph(s.after, last)
            for n in self.snapshots[before] if before >= 0 else ():
                born.setdefault(n.id, k)  # of a walk that does not begin at its export
            for n in self.snapshots[after] if after >= 0 and after != before else ():
                born.setdefault(n.id, k)
            step = self._step(s, before, after)
            if after != before:
                gone.update(dict.fromkeys(s.diff.erased, k))
            self.record.steps.append(step)
            last = after if after >= 0 else last
        self._nodes(born, gone)
        self._finish_modules()

    def _step(self, s: Step, before: int, after: int) -> f.Step:
        same = before == after or before < 0 or after < 0
        changed = set() if same else set(s.diff.changed)
        old = s.before.by_id if not same else {}
        kept = [] if same else [n for n in s.after if n.id in old]
        rewired = [
            n.id for n in kept if n is not old[n.id] and n.id not in changed and _differs(old[n.id], n)
        ]
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
        new = [self._row(n) for n in s]
        old = [self._rows[id(n)] for n in self.snapshots[base]] if base >= 0 else []
        self.snapshots.append(s)
        self.record.graphs.append(
            f.Graph.model_construct(
                size=len(s), base=base, splices=splices(old, new), symbols=dict(symbols.names), view=None
            )
        )
        return len(self.snapshots) - 1

    def _row(self, n: NodeRecord) -> int:
        known = self._rows.get(id(n))
        if known is not None:
            return known
        rows = self.record.rows
        at = self._rows[id(n)] = len(self.records)
        self.records.append(n)
        pieces, inputs = call_text(n)
        rows.node.append(n.id)
        rows.name.append(self._text(n.name))
        rows.op.append(f.OPS.index(n.op))
        rows.target.append(self._target(n))
        rows.call.append(self._calls.setdefault(tuple(pieces), len(self._calls)))
        rows.inputs.items.extend(inputs)
        rows.inputs.starts.append(len(rows.inputs.items))
        rows.value.append(self._value(n))
        rows.module.append(self._module_of(n))
        rows.source.append(self._source(n.source))
        rows.category.append(self._category[category_of(n)])
        return at

    def _nodes(self, born: dict[int, int], gone: dict[int, int]) -> None:
        origins = {n.id: n.origins for n in self.records}
        nodes = self.record.nodes
        for i in sorted(origins):
            nodes.id.append(i)
            nodes.born.append(born[i])
            nodes.gone.append(gone.get(i, -1))
            nodes.origins.items.extend(origins[i])
            nodes.origins.starts.append(len(nodes.origins.items))
        self.record.calls = [list(c) for c in self._calls]
        self.record.texts = list(self._texts)

    # --- what is stored once

    def _text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def _module_of(self, n: NodeRecord) -> int:
        if n.module_type:
            self._types[n.module_path] = self._text(n.module_type)
        own = self._module(n.module_path)  # a parameter's too: rewrite classes name it
        if n.op == "get_attr":
            return self._module(_PARAMETER.sub("", n.target) if "." in n.target else "")
        return own

    def _module(self, path: str) -> int:
        if path not in self._modules:
            above, _, name = path.rpartition(".")
            parent = self._module(above) if path else -1
            self._modules[path] = len(self._modules)
            table = self.record.modules
            table.parent.append(parent)
            table.name.append(self._text(name))
            table.path.append(self._text(path))
            layer = layer_of(path)
            table.layer.append(-1 if layer is None else layer)
        return self._modules[path]

    def _finish_modules(self) -> None:
        """Class names: a module that no node named is told by the same place in another layer."""
        general = {without_layer(path): kind for path, kind in self._types.items()}
        self.record.modules.type = [
            self._types.get(p, general.get(without_layer(p), 0)) for p in self._modules
        ]

    def _source(self, source: Source | None) -> int:
        if source not in self._sources:
            assert source is not None
            self._sources[source] = len(self._sources) - 1
            table = self.record.sources
            table.file.append(self._text(source.file))
            table.line.append(source.line)
            table.function.append(self._text(source.function))
            table.code.append(self._text(source.code))
            context = context_of(source)
            table.context.append(self._text(context.text if context else ""))
            table.first.append(context.first if context else source.line)
        return self._sources[source]

    def _value(self, n: NodeRecord) -> int:
        key: Any
        if isinstance(n.val, torch.Tensor):
            key = (n.shape, n.dtype)
        else:
            key = value_text(n.val)
        if key not in self._values:
            self._values[key] = len(self._values)
            if isinstance(n.val, torch.Tensor):
                dtype = dtype_text(n.dtype)
                value = f.Value(text=value_text(n.val), shape=list(n.shape or ()), dtype=dtype)
            else:
                value = f.Value(text=key)
            self.record.values.append(value)
        return self._values[key]

    def _target(self, n: NodeRecord) -> int:
        name = n.target_name
        key = (n.op, name)
        if key not in self._targets:
            self._targets[key] = len(self._targets)
            signature, doc = "", ""
            if isinstance(n.target, torch._ops.OpOverload):
                signature = str(n.target._schema)
            short = op_text(n) if n.op == "call_function" else name
            self.record.targets.append(f.Target(name=name, short=short, signature=signature, doc=doc))
        return self._targets[key]

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
            found = [-1] * len(self.records)
            sizes: Mapping[str, int] = {}
            for s in self.snapshots:
                packed = any(n.op == "placeholder" and n.target == "page_table" for n in s)
                given = w.packed if packed else w.whole
                todo = [n for n in s if n.op == "call_function" and found[self._rows[id(n)]] < 0]
                if not given or not todo:
                    continue
                try:
                    counted = node_costs(s, on, given, {n.id for n in todo})
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
                sizes = {**sizes, **given}
                for n in todo:
                    cost = _cost_row(counted[n.id])
                    found[self._rows[id(n)]] = table.setdefault(cost, len(table))
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


def ragged(lists: Iterable[Iterable[int]]) -> f.Ragged:
    """Lists as one :class:`~adkit.viz.record.format.Ragged`."""
    made = f.Ragged(starts=[0], items=[])
    for one in lists:
        made.items.extend(one)
        made.starts.append(len(made.items))
    return made


def runs(places: list[int]) -> list[int]:
    """Positions as runs, in order: start, length, start, length."""
    found: list[int] = []
    for p in places:
        if found and found[-2] + found[-1] == p:
            found[-1] += 1
        else:
            found += [p, 1]
    return found


def rising(numbers: Sequence[int]) -> list[int]:
    """Places of a longest rising subsequence of distinct ``numbers`` (patience sorting)."""
    tails: list[int] = []
    at: list[int] = []
    before: list[int] = []
    for k, n in enumerate(numbers):
        p = bisect_left(tails, n)
        before.append(at[p - 1] if p else -1)
        if p == len(tails):
            tails.append(n)
            at.append(k)
        else:
            tails[p], at[p] = n, k
    found: list[int] = []
    k = at[-1] if at else -1
    while k >= 0:
        found.append(k)
        k = before[k]
    return found[::-1]


def moved(before: Snapshot, after: Snapshot) -> list[int]:
    """Ids in both graphs that stand in another order: the fewest whose moving explains it."""
    place = {n.id: p for p, n in enumerate(before)}
    kept = [n.id for n in after if n.id in place]
    still = set(rising([place[i] for i in kept]))
    return [i for k, i in enumerate(kept) if k not in still]


def splices(old: list[int], new: list[int]) -> list[f.Splice]:
    """Edits that turn ``old`` into ``new``, from front to back; each list without repeats."""
    place = {r: p for p, r in enumerate(old)}
    shared = [k for k, r in enumerate(new) if r in place]
    keep = [shared[k] for k in rising([place[new[k]] for k in shared])]
    found: list[f.Splice] = []
    i = j = 0
    for k in [*keep, len(new)]:
        upto = place[new[k]] if k < len(new) else len(old)
        if upto > i or k > j:
            found.append(f.Splice.model_construct(at=j, drop=upto - i, rows=new[j:k]))
        i, j = upto + 1, k + 1
    return found


def apply_splices(old: list[int], edits: Iterable[f.Splice]) -> list[int]:
    """``old`` edited."""
    rows = list(old)
    for e in edits:
        rows[e.at : e.at + e.drop] = e.rows
    return rows


def value_text(v: Any) -> str:
    """A value in short, open sizes by their symbols: ``[s31, 4096] bf16``."""
    if isinstance(v, torch.Tensor):
        return f"[{', '.join(map(str, v.shape))}] {dtype_text(v.dtype)}"
    if isinstance(v, (tuple, list)):
        return f"({', '.join(value_text(x) or '-' for x in v)})"
    if isinstance(v, (bool, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(v)
    return ""


def call_text(n: NodeRecord) -> tuple[list[str], list[int]]:
    """A node's arguments as pieces of text, and the ids that stand between them."""
    pieces, inputs = [""], []

    def put(text: str) -> None:
        pieces[-1] += text

    def each(values: Iterable[Any]) -> None:
        for k, v in enumerate(values):
            put(", " if k else "")
            tell(v)

    def tell(v: Any) -> None:
        match v:
            case Ref(id=i):
                inputs.append(i)
                pieces.append("")
            case tuple():
                put("(")
                each(v)
                put(",)" if len(v) == 1 else ")")
            case list():
                put("[")
                each(v)
                put("]")
            case dict():
                put("{")
                for k, (name, x) in enumerate(v.items()):
                    put(f"{', ' if k else ''}{name!r}: ")
                    tell(x)
                put("}")
            case slice():
                for k, x in enumerate((v.start, v.stop, v.step)):
                    put(":" if k else "")
                    if x is not None:
                        tell(x)
            case None | bool() | int() | float() | str() | complex():
                put(repr(v))
            case torch.dtype() | torch.device() | torch.layout() | torch.memory_format() | torch.SymInt():
                put(str(v).removeprefix("torch."))
            case _:
                put("..." if v is Ellipsis else getattr(v, "__name__", type(v).__name__))

    each(n.args)
    for k, (name, v) in enumerate(n.kwargs.items()):
        put(f"{', ' if k or n.args else ''}{name}=")
        tell(v)
    return pieces, inputs


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


__all__ = ["WORKLOADS", "RecordWriter", "Workload", "apply_splices", "moved", "splices"]
