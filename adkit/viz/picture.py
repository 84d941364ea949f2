"""A graph picture as data: nodes, edges and clusters, before any of it is text, dot or SVG.

:func:`picture_of` makes one of a snapshot (layers folded, modules collapsed below a depth), and
:func:`rewrite_picture` of one site of a rewrite class, before and after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from adkit.graph.code import Symbols, op_text
from adkit.graph.diff import Diff, RewriteClass, Site
from adkit.graph.folding import Folding, Segment, layers_text
from adkit.graph.history import History
from adkit.graph.provenance import Source, layer_of, without_layer
from adkit.graph.snapshot import NodeRecord, Snapshot
from adkit.graph.step import Step
from adkit.graph.times import duration
from adkit.viz.category import category_of, category_of_module

MOST_NODES = 400  # dot takes 0.3 s for 448 nodes, 12.8 s for 1,792
MOST_SITE = 70
MOST_BACK = 30
MOST_SOURCES = 6


class PictureTooLarge(ValueError):
    """A picture would have more nodes than dot lays out in reasonable time."""


@dataclass(slots=True)
class Box:
    """One node of a picture.

    ``detail`` is its small print (parameters); ``mark`` is '', erased, created, changed or context; ``heat`` is
    its share of the hottest box's time, where times were given; ``node`` is the id of the node it shows, -1
    where it sums up several.
    """

    key: str
    title: str
    category: str
    detail: tuple[str, ...] = ()
    tooltip: str = ""
    cluster: tuple[str, ...] = ()
    mark: str = ""
    highlight: bool = False
    heat: float | None = None
    node: int = -1


@dataclass(slots=True)
class Arrow:
    """One edge; ``back`` marks the one from a folded layer to the next.

    ``label`` is the value's shape, and its dtype where a rewrite brings a new one.
    """

    tail: str
    head: str
    label: str = ""
    back: bool = False


@dataclass(slots=True)
class Picture:
    """Boxes, arrows and clusters (``path -> label``; a path's prefixes are its parents)."""

    title: str = ""
    boxes: list[Box] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    clusters: dict[tuple[str, ...], str] = field(default_factory=dict)
    legend: bool = True

    @property
    def categories(self) -> list[str]:
        """Categories present, most frequent first."""
        return [c for c, _ in Counter(b.category for b in self.boxes if b.mark != "context").most_common()]

    def text(self) -> str:
        """The picture as indented text, for where nothing can be drawn."""
        reads: dict[str, list[str]] = {}
        for a in self.arrows:
            if not a.back:
                reads.setdefault(a.head, []).append(a.tail)
        names: dict[str, str] = {}
        for b in self.boxes:
            names[b.key] = f"{b.title}#{len(names)}" if b.mark != "context" else b.title
        signs = {"erased": "-", "created": "+", "changed": "~"}
        out = [self.title] if self.title else []
        last: tuple[str, ...] = ()
        for b in self.boxes:
            if b.cluster != last:
                shared = 0
                while shared < min(len(last), len(b.cluster)) and last[shared] == b.cluster[shared]:
                    shared += 1
                for k in range(shared, len(b.cluster)):
                    out.append("  " * k + f"[{self.clusters.get(b.cluster[: k + 1], b.cluster[k])}]")
                last = b.cluster
            detail = f" <{', '.join(b.detail)}>" if b.detail else ""
            sources = ", ".join(names[k] for k in reads.get(b.key, []) if k in names)
            body = f"{signs.get(b.mark, ' ')} {names[b.key]}{detail}" + (f" <- {sources}" if sources else "")
            out.append("  " * len(b.cluster) + body)
        return "\n".join(out)


def tooltip(n: NodeRecord, symbols: Symbols, stands_for: int = 1, sources: Iterable[Source] = ()) -> str:
    """What hovering over a node tells: target, value, module, lines of modelling code (or its own)."""
    rows = [f"%{n.id} {n.name}: {n.target_name}"]
    value = symbols.value(n)
    if value:
        rows.append(value)
    if n.module_path:
        rows.append(f"{n.module_path} ({n.module_type})" if n.module_type else n.module_path)
    found = list(sources) or ([n.source] if n.source is not None else [])
    rows += [f"from {s.file.rsplit('/', 1)[-1]}:{s.line}  {s.code}" for s in found[:MOST_SOURCES]]
    if len(found) > MOST_SOURCES:
        rows.append(f"and {len(found) - MOST_SOURCES} more lines")
    if stands_for > 1:
        rows.append(f"stands for {stands_for} nodes")
    return "\n".join(rows)


def picture_of(
    snapshot: Snapshot,
    *,
    layer: int | None = None,
    fold_layers: bool = True,
    highlight: Iterable[int] = (),
    depth: int | None = None,
    parameters: bool = True,
    shapes: bool = True,
    title: str = "",
    history: History | None = None,
    times: Mapping[int, float] | None = None,
    notes: Mapping[int, str] | None = None,
) -> Picture:
    """The picture of a snapshot or of one layer of it.

    ``depth``: modules nested deeper than this (below the layer) become one box; 0 leaves the layers' own
    children. ``times`` (seconds by node id) give each box its time, summed over all that it stands for, and the
    share of the whole. ``notes`` (by node id) go first into the small print of boxes that show one node. Raises
    PictureTooLarge beyond 400 boxes, KeyError for a layer that is not there.
    """
    maker = _Maker(snapshot, set(highlight), depth, parameters, shapes, history)
    picture = maker.make(layer, fold_layers, title)
    for b in picture.boxes:
        told = (notes or {}).get(b.node)
        if told:
            b.detail = (told, *b.detail)
    if times is not None:
        _heat(picture, maker.stands_for, times)
    return picture


def _heat(picture: Picture, stands_for: Mapping[str, Iterable[int]], times: Mapping[int, float]) -> None:
    """Write into each box how long all that it stands for took."""
    whole = sum(times.values()) or 1.0
    each = {b.key: sum(times.get(i, 0.0) for i in stands_for.get(b.key, ())) for b in picture.boxes}
    hottest = max(each.values(), default=0.0) or 1.0
    for b in picture.boxes:
        seconds = each[b.key]
        b.heat = seconds / hottest
        if seconds >= whole / 2000:
            b.detail = (f"{duration(seconds)}  {seconds / whole:.1%}", *b.detail)


class _Maker:
    def __init__(
        self,
        snapshot: Snapshot,
        highlight: set[int],
        depth: int | None,
        parameters: bool,
        shapes: bool,
        history: History | None,
    ) -> None:
        self.history = history
        self.snapshot = snapshot
        self.symbols = Symbols(snapshot)
        self.highlight = highlight
        self.depth = depth
        self.parameters = parameters
        self.shapes = shapes
        self.picture = Picture()
        self.key: dict[int, str] = {}
        self.groups: dict[str, list[int]] = {}
        self.stands_for: dict[str, list[int]] = {}  # nodes of each box, those of folded layers included

    def make(self, layer: int | None, fold_layers: bool, title: str) -> Picture:
        self.picture.title = title
        folding = self.snapshot.folding
        if layer is not None:
            if layer not in folding.layers:
                raise KeyError(
                    f"no layer {layer} in this graph; its layers: {sorted(folding.layers) or 'none'}"
                )
            block = folding.layers[layer]
            inside = set(block.nodes) | set(block.leaves)
            outside = dict.fromkeys(
                i for b in block.nodes for i in self.snapshot[b].inputs() if i not in inside
            )
            ids = [*outside, *block.leaves, *block.nodes]
            self.boxes(ids, {i: (i,) for i in ids}, (), context=set(outside))
        elif not fold_layers:
            ids = [n.id for n in self.snapshot]
            self.boxes(ids, {i: (i,) for i in ids}, ())
        else:
            self.folded(folding)
        count = len(self.picture.boxes)
        if count > MOST_NODES:
            hints = ["depth=0 or depth=1 (modules as boxes)"]
            hints += ["layer=0 (one layer)"] if layer is None and folding.layers else []
            hints += ["fold=True"] if not fold_layers else []
            raise PictureTooLarge(
                f"a picture of {count} nodes: dot cannot lay out more than {MOST_NODES} in reasonable time; "
                f"try {', '.join(hints)}"
            )
        self.arrows(folding if layer is None and fold_layers else None)
        self.drop_small_clusters()
        return self.picture

    def folded(self, folding: Folding) -> None:
        for s in folding:
            if s.nodes:
                self.boxes(list(s.nodes), folding.same, ())
            for v in s.variants:
                name = layers_text(v.layers)
                cluster = (f"layer{v.first.layer}",)
                self.picture.clusters[cluster] = f"{name}   ×{len(v.blocks)}" if len(v.blocks) > 1 else name
                self.boxes([*v.first.leaves, *v.first.nodes], folding.same, cluster)

    def boxes(
        self,
        ids: list[int],
        same: dict[int, tuple[int, ...]],
        base: tuple[str, ...],
        context: set[int] | None = None,
    ) -> None:
        groups = self.groups
        for i in ids:
            n = self.snapshot[i]
            if n.op == "get_attr" or (category_of(n) == "shape" and not isinstance(n.val, torch.Tensor)):
                continue
            if n.op == "placeholder" and not isinstance(n.val, torch.Tensor):  # use_cache=False and the like
                continue
            inner = "" if context and i in context else self.collapsed(n)
            if inner:
                key = f"m{'_'.join(base)}.{inner}"
                self.key[i] = key
                self.stands_for.setdefault(key, []).extend(same.get(i, (i,)))
                groups.setdefault(key, []).append(i)
                if len(groups[key]) == 1:
                    self.picture.boxes.append(Box(key, inner.rsplit(".", 1)[-1], "view", cluster=base))
                continue
            key = f"n{i}"
            self.key[i] = key
            if not (context and i in context):
                self.stands_for[key] = list(same[i])
            cluster = (*base, *self.clusters(n, base)) if not (context and i in context) else ()
            title = n.target_name if n.op == "placeholder" else op_text(n)
            folded = same[i]
            mark = "context" if context and i in context else ""
            lit = bool(self.highlight.intersection(folded))
            detail = tuple(self.details(n)) if not mark else ()
            if n.op == "placeholder" and len(folded) > 1:
                title = f"{title} ×{len(folded)}"
            sources = self.history.sources(i) if self.history is not None and n.origins else ()
            tip = tooltip(n, self.symbols, len(folded), sources)
            self.picture.boxes.append(
                Box(key, title, category_of(n), detail, tip, cluster, mark, lit, node=i)
            )
        for box in self.picture.boxes:
            if box.key in groups:
                members = [self.snapshot[i] for i in groups[box.key]]
                weight = Counter(category_of(m) for m in members)
                main = max(weight, key=lambda c: (c not in ("view", "elementwise", "shape"), weight[c]))
                box.category = category_of_module(box.title) or main
                box.detail = (f"{len(members)} nodes" if len(members) > 1 else op_text(members[0]),)
                tally = Counter(op_text(m) for m in members).most_common(8)
                box.tooltip = "\n".join([box.title, *(f"{c} x {op}" for op, c in tally)])
                box.highlight = any(self.highlight.intersection(same.get(i, (i,))) for i in groups[box.key])

    def collapsed(self, n: NodeRecord) -> str:
        """The module whose box swallows this node, below :attr:`depth`; empty when it stands alone."""
        if self.depth is None or n.op in ("placeholder", "output") or n.module_path.startswith("_"):
            return ""
        path = n.module_path
        inner = without_layer(path).split("*", 1)[1].lstrip(".") if layer_of(path) is not None else path
        parts = inner.split(".") if inner else []
        keep = self.depth + (
            1 if layer_of(path) is not None else 2
        )  # outside the layers "model" alone says nothing
        return ".".join(parts[:keep]) if len(parts) > self.depth else ""

    def clusters(self, n: NodeRecord, base: tuple[str, ...]) -> tuple[str, ...]:
        path = n.module_path
        if not path or path.startswith("_") or n.op == "output":
            return ()
        inner = (
            without_layer(path).split("*", 1)[1].lstrip(".").split(".", 1)[0]
            if layer_of(path) is not None
            else path
        )
        if not inner or (not base and inner == path.split(".", 1)[0]):
            return ()
        cluster = (*base, inner)
        self.picture.clusters.setdefault(cluster, inner)
        return (inner,)

    def details(self, n: NodeRecord) -> list[str]:
        if not self.parameters:
            return []
        found = []
        for i in dict.fromkeys(n.inputs()):
            m = self.snapshot[i]
            if m.op == "get_attr":
                found.append(_parameter(m, self.symbols))
        return found[:4] + ([f"and {len(found) - 4} more"] if len(found) > 4 else [])

    def arrows(self, folding: Folding | None) -> None:
        rep = folding.representative if folding is not None else {}
        seen: dict[tuple[str, str], Arrow] = {}
        drawn = {i: self.key[i] for i in self.key}
        told: set[str] = set()
        for i, head in drawn.items():
            for j in self.snapshot[i].inputs():
                tail = drawn.get(rep.get(j, j)) if j not in drawn else drawn[j]
                if tail is None or tail == head or (tail, head) in seen:
                    continue
                m = self.snapshot[j]
                label = ""
                if (
                    self.shapes
                    and tail not in told
                    and (tail.startswith("m") or changes_shape(self.snapshot, m))
                ):
                    label = _dims(m, self.symbols)
                    told.add(tail)
                seen[tail, head] = Arrow(tail, head, label)
        if (
            folding is not None and len(self.picture.boxes) <= MOST_BACK
        ):  # in a larger picture it only wanders
            for s in folding:
                self.back_arrows(s, rep, seen)
        self.picture.arrows = list(seen.values())

    def back_arrows(self, s: Segment, rep: dict[int, int], seen: dict[tuple[str, str], Arrow]) -> None:
        blocks = s.blocks
        for reads in s.carries:
            for k in range(1, len(blocks)):
                tail = self.key.get(rep[reads[k]])
                place = {b.layer: v for v in s.variants for b in v.blocks}
                column = next(b for b in place[blocks[k].layer].blocks if b.layer == blocks[k].layer)
                for i in column.nodes:
                    if reads[k] in self.snapshot[i].inputs():
                        head = self.key.get(rep[i])
                        if tail and head and (tail, head) not in seen:
                            forward = place[blocks[k - 1].layer] is not place[blocks[k].layer] and k == 1
                            seen[tail, head] = Arrow(
                                tail, head, "" if forward else "next layer", back=not forward
                            )
                        break

    def drop_small_clusters(self) -> None:
        sizes = Counter(b.cluster for b in self.picture.boxes)
        for b in self.picture.boxes:
            if len(b.cluster) and not b.cluster[-1].startswith("layer") and sizes[b.cluster] < 2:
                b.cluster = b.cluster[:-1]
        used = {b.cluster[:k] for b in self.picture.boxes for k in range(1, len(b.cluster) + 1)}
        self.picture.clusters = {c: t for c, t in self.picture.clusters.items() if c in used}


def _parameter(n: NodeRecord, symbols: Symbols) -> str:
    """A parameter in small print: ``q_proj.weight [4096, 4096]``."""
    return f"{_short(n.target_name)} {_dims(n, symbols)}".strip()


def _dims(n: NodeRecord, symbols: Symbols) -> str:
    return "" if n.shape is None else f"[{', '.join(symbols.dim(d) for d in n.shape)}]"


def changes_shape(snapshot: Snapshot, n: NodeRecord) -> bool:
    """False where a value has the shape of a call it was made from: saying it again tells nothing."""
    return n.shape is not None and all(
        snapshot[i].shape != n.shape for i in n.inputs() if snapshot[i].op != "get_attr"
    )


def _short(path: str) -> str:
    """``model.layers.3.self_attn.q_proj.weight`` -> ``q_proj.weight``."""
    return ".".join(path.split(".")[-2:])


def rewrite_picture(step: Step | Diff, rewrite: RewriteClass, site: int | Site = 0) -> Picture:
    """One site of a rewrite class: left what was there, right what replaced it, neighbours in grey.

    Raises IndexError for a site number the class does not have.
    """
    s = rewrite.sites[site] if isinstance(site, int) else site
    where = s.module_path or "root"
    picture = Picture(
        title=f"{where}" + (f"   (1 of {rewrite.count})" if rewrite.count > 1 else ""), legend=False
    )
    sides = (
        ("before", step.before, set(s.erased) | set(s.changed)),
        ("after", step.after, set(s.created) | set(s.changed)),
    )
    had, has = ({d for i in ids if i in g.by_id and (d := g[i].dtype) is not None} for _, g, ids in sides)
    typed = any(d.is_floating_point for d in has - had)  # what was not there is what the rewrite is about
    for side, snapshot, ids in sides:
        _half(picture, side, snapshot, {i for i in ids if i in snapshot.by_id}, s, step.before, typed)
    return picture


def _half(
    picture: Picture, side: str, snapshot: Snapshot, ids: set[int], s: Site, before: Snapshot, typed: bool
) -> None:
    symbols = Symbols(snapshot)
    users = snapshot.users()
    cluster = (side,)
    picture.clusters[cluster] = side
    gone = "erased" if side == "before" else "created"
    calls = [n for n in snapshot if n.id in ids and n.op != "get_attr"]
    if not calls:
        leaves = [n for n in snapshot if n.id in ids]
        text = tuple(_short(n.target_name) for n in leaves[:4])
        picture.boxes.append(
            Box(
                f"{side}0",
                "nothing" if not leaves else "parameters",
                "view",
                text,
                "",
                cluster,
                gone if leaves else "context",
            )
        )
        return
    if len(calls) > MOST_SITE:
        tally = Counter(op_text(n) for n in calls).most_common(8)
        text = tuple(f"{c} x {op}" for op, c in tally)
        picture.boxes.append(Box(f"{side}0", f"{len(calls)} nodes", "view", text, "", cluster, gone))
        return
    inside = {n.id for n in calls}

    def box(n: NodeRecord, mark: str) -> None:
        parameters = [snapshot[i] for i in dict.fromkeys(n.inputs()) if snapshot[i].op == "get_attr"]
        detail = tuple(_parameter(m, symbols) for m in parameters[:4])
        title = n.target_name if n.op == "placeholder" else op_text(n)
        stood = [before[o].source for o in n.origins if o in before.by_id and before[o].op == "call_function"]
        sources = sorted({x for x in stood if x is not None}, key=lambda x: (x.file, x.line))
        tip = tooltip(n, symbols, sources=sources if mark == gone else ())
        picture.boxes.append(
            Box(
                f"{side}{n.id}",
                title,
                category_of(n),
                detail if mark != "context" else tuple(_short(m.target_name) for m in parameters[:1]),
                tip,
                cluster,
                mark,
                node=n.id,
            )
        )

    drawn: set[int] = set()
    for n in calls:
        for i in dict.fromkeys(n.inputs()):
            m = snapshot[i]
            if (
                i not in inside
                and i not in drawn
                and m.op != "get_attr"
                and isinstance(m.val, (torch.Tensor, tuple, list))
            ):
                drawn.add(i)
                box(m, "context")
    for n in calls:
        drawn.add(n.id)
        box(n, "changed" if n.id in s.changed else gone)
    arrows: dict[tuple[str, str], Arrow] = {}
    told: set[int] = set()

    def arrow(tail: int, head: str) -> None:
        value = snapshot[tail]
        text = symbols.value(value) if typed and value.shape is not None else _dims(value, symbols)
        label = "" if tail in told else text
        told.add(tail)
        arrows.setdefault((f"{side}{tail}", head), Arrow(f"{side}{tail}", head, label))

    for n in calls:
        for i in n.inputs():
            if i in drawn:
                arrow(i, f"{side}{n.id}")
    readers: dict[int, list[int]] = {}
    for n in calls:
        for u in users[n.id]:
            if u not in inside:
                readers.setdefault(u, []).append(n.id)
    most = 2 if len({snapshot[u].target_name for u in readers}) == 1 else 4  # readers alike need no more
    for k, (u, tails) in enumerate(readers.items()):
        if k == most and len(readers) > most + 1:
            picture.boxes.append(
                Box(f"{side}more", f"{len(readers) - most} more readers", "view", (), "", cluster, "context")
            )
            for tail in dict.fromkeys(t for ts in list(readers.values())[most:] for t in ts):
                arrow(tail, f"{side}more")
            break
        key = f"{side}r{u}" if u in drawn else f"{side}{u}"
        picture.boxes.append(
            Box(
                key,
                op_text(snapshot[u]),
                category_of(snapshot[u]),
                (),
                tooltip(snapshot[u], symbols),
                cluster,
                "context",
                node=u,
            )
        )
        for tail in tails:
            arrow(tail, key)
    picture.arrows += arrows.values()


__all__ = [
    "MOST_NODES",
    "Arrow",
    "Box",
    "Picture",
    "PictureTooLarge",
    "picture_of",
    "rewrite_picture",
    "tooltip",
]
