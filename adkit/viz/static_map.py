"""What the static picture shows of one point of a walk, as data: nested modules, their nodes in order, what marks them.

:mod:`adkit.viz.static` draws it. Equal layers are held once; a mark on any of them is a mark on the one that is held.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from adkit.viz.record.format import OPS, Graph, Overlay, Record
from adkit.viz.record.read import graph_rows

_RAMP = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (253, 234, 69))
_DIVERGING = ((33, 102, 172), (146, 197, 222), (247, 247, 247), (244, 165, 130), (178, 24, 43))
_WORDS = (  # Okabe and Ito: colour-blind readers tell them apart
    (86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66),
    (0, 114, 178), (213, 94, 0), (204, 121, 167), (153, 153, 153),
)  # fmt: skip


@dataclass(frozen=True)
class Looked:
    """What is looked at: a step (-1: the last that changed the graph), nodes chosen by id, an overlay's name.

    ``against``: the step whose graph it is compared with; -1 for the one before.
    """

    step: int = -1
    selection: tuple[int, ...] = ()
    overlay: str = ""
    against: int = -1


#: The last step that changed the graph, nothing chosen.
LAST = Looked()

_COSTS = (("FLOPs", "FLOP"), ("bytes", "B"), ("roofline time", "µs"))


@dataclass
class Chip:
    """Like nodes in a row: their op, kind of work and mark (``created``, ``changed``), and an overlay's value."""

    text: str
    category: int
    mark: str = ""
    chosen: bool = False
    value: float | None = None
    count: int = 1


@dataclass
class Module:
    """A module in the map: what it holds in order, and how many nodes the step took out of it."""

    title: str
    items: list[Module | Chip] = field(default_factory=list)
    erased: int = 0


@dataclass
class Point:
    """The graph of one step of the walk, and its map."""

    step: int
    graph: Graph | None
    root: Module
    against: int = -1
    created: int = 0
    erased: int = 0
    changed: int = 0
    overlay: Overlay | None = None


def shown_step(record: Record, step: int = -1) -> int:
    """The step asked for if it has a graph, else the last one that changed the graph; -1 where none did."""
    if 0 <= step < len(record.steps) and record.steps[step].after >= 0:
        return step
    having = [k for k, s in enumerate(record.steps) if s.after >= 0]
    return next((k for k in reversed(having) if record.steps[k].after != record.steps[k].before), -1)


def point(record: Record, look: Looked) -> Point:
    """What a record shows at the point looked at."""
    at = shown_step(record, look.step)
    if at < 0:
        return Point(-1, None, Module(""))
    s = record.steps[at]
    graph = record.graphs[s.after]
    rows = graph_rows(record)
    r, texts = record.rows, record.texts
    here = rows[s.after]
    against = look.against if 0 <= look.against < at and record.steps[look.against].after >= 0 else -1
    base = s.before if against < 0 else record.steps[against].after
    before = rows[base] if base >= 0 else []
    ids, old = {r.node[row] for row in here}, {r.node[row] for row in before}
    created = ids - old if base >= 0 and base != s.after else set()
    erased = old - ids
    changed = {i for step in record.steps[against + 1 if against >= 0 else at : at + 1] for i in step.changed}
    changed &= ids & old
    over = _overlay(record, look.overlay, s.after)
    values = dict(zip(over.ids, over.values, strict=True)) if over is not None else {}

    def path_of(row: int) -> str:
        path = texts[record.modules.path[r.module[row]]]
        return "" if path.startswith("_empty_nn_module_stack") else path

    # Of layers that are alike the first is held; the others' marks and values go to it.
    stands: dict[int, list[int]] = {}
    skipped: set[int] = set()
    count: dict[str, int] = {}
    others: set[str] = set()
    for segment in graph.view.folding if graph.view is not None else ():
        for blocks in segment.variants:
            first = next(iter(_positions(blocks[0].nodes)), None)
            if first is None or len(blocks) < 2:
                continue
            if drawn := _layer(path_of(here[first]), blocks[0].layer):
                count[drawn] = len(blocks)
            for b in blocks[1:]:
                others.add(_layer(path_of(here[next(_positions(b.nodes))]), b.layer))
                skipped.update((*_positions(b.nodes), *_positions(b.leaves)))
                for held, other in zip(_positions(blocks[0].nodes), _positions(b.nodes), strict=False):
                    stands.setdefault(held, []).append(r.node[here[other]])

    root = Module("")
    made = {"": root}
    types = {texts[p]: texts[t] for p, t in zip(record.modules.path, record.modules.type, strict=True)}
    # A path may be of another class in another graph.
    told = {
        path_of(row): texts[record.modules.type[r.module[row]]]
        for row in here
        if OPS[r.op[row]] != "get_attr"
    }
    types.update({path: kind for path, kind in told.items() if kind})

    def module(path: str) -> Module:
        if path not in made:
            above, _, name = path.rpartition(".")
            parent = module(above)
            times = f"  ×{count[path]}" if path in count else ""
            made[path] = Module(f"{name}: {types[path]}{times}" if types.get(path) else f"{name}{times}")
            parent.items.append(made[path])
        return made[path]

    for position, row in enumerate(here):
        op = OPS[r.op[row]]
        if position in skipped or op in ("get_attr", "placeholder", "output"):
            continue
        all_ids = (r.node[row], *stands.get(position, ()))
        known = [values[i] for i in all_ids if i in values]
        chip = Chip(
            record.targets[r.target[row]].short,
            r.category[row],
            "created" if r.node[row] in created else "changed" if r.node[row] in changed else "",
            any(i in look.selection for i in all_ids),
            max(known, key=abs) if known else None,
        )
        _put(module(path_of(row)).items, chip)
    gone = Counter(path_of(row) for row in before if r.node[row] in erased)
    for path, n in gone.items():
        if any(around in others for around in _around(path)):
            continue
        while path not in made and path:  # a module that went with its nodes: the one around it tells
            path = path.rpartition(".")[0]
        made[path].erased += n
    return Point(at, graph, root, against, len(created), len(erased), len(changed), over)


def _overlay(record: Record, name: str, k: int) -> Overlay | None:
    """The overlay of that name over graph k: one that was laid, or one of the record's costs."""
    for o in record.overlays:
        if o.name == name:
            return o
    r = record.rows
    for c in record.costs:
        for kind, (what, unit) in enumerate(_COSTS):
            if name != f"{what} ({c.name})":
                continue
            costs = {r.node[row]: c.table[c.rows[row]] for row in graph_rows(record)[k] if c.rows[row] >= 0}
            known = {i: float(cost[kind]) for i, cost in costs.items() if cost[2] > 0}
            return Overlay(
                name=name, unit=unit, note=c.device, scale="log", ids=list(known), values=list(known.values())
            )
    return None


def _put(items: list[Module | Chip], chip: Chip) -> None:
    """Like nodes in a row are one chip."""
    last = items[-1] if items else None
    if not isinstance(last, Chip) or (last.text, last.category, last.mark, last.chosen) != (
        chip.text, chip.category, chip.mark, chip.chosen,
    ):  # fmt: skip
        items.append(chip)
        return
    last.count += 1
    if chip.value is not None and (last.value is None or abs(chip.value) > abs(last.value)):
        last.value = chip.value


def _layer(path: str, layer: int) -> str:
    """Path of the layer around a path; empty where its number does not stand in it."""
    names = path.split(".")
    return ".".join(names[: names.index(str(layer)) + 1]) if str(layer) in names else ""


def _around(path: str) -> Iterator[str]:
    names = path.split(".")
    return (".".join(names[: k + 1]) for k in range(len(names)))


def _positions(runs: list[int]) -> Iterator[int]:
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        yield from range(start, start + length)


class Colours:
    """The colours of an overlay, as the explorer gives them: numbers on a scale, words each in their own."""

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay
        finite = [v for v in overlay.values if math.isfinite(v)]
        self.low, self.high = min(finite, default=0.0), max(finite, default=0.0)
        least = min((v for v in finite if v > 0), default=1.0)
        self._floor = max(least, self.high / 1e4)

    def of(self, value: float) -> str:
        """A value's colour as ``#rrggbb``."""
        o = self.overlay
        if o.scale == "words":
            return _hex(_WORDS[int(value) % len(_WORDS)])
        if o.scale == "diverging":
            share = 0.5 + value / (2 * max(abs(self.low), abs(self.high), 1e-30))
            return _mix(_DIVERGING, share)
        if o.scale == "log":
            span = math.log(self.high / self._floor) if self.high > self._floor else 0.0
            share = (
                0.0
                if value <= 0
                else 1.0
                if not span
                else math.log(max(value, self._floor) / self._floor) / span
            )
        else:
            share = 1.0 if self.high == self.low else (value - self.low) / (self.high - self.low)
        return _mix(_RAMP, share)

    def ramp(self) -> list[str]:
        """The scale from its low to its high end."""
        return [_mix(_DIVERGING if self.overlay.scale == "diverging" else _RAMP, k / 11) for k in range(12)]

    @property
    def ends(self) -> tuple[str, str]:
        """What stands at the two ends of the scale."""
        low = self._floor if self.overlay.scale == "log" else self.low
        return _measured(low, self.overlay.unit), _measured(self.high, self.overlay.unit)


def _measured(value: float, unit: str) -> str:
    if unit in ("us", "µs"):
        size, unit = next(((s, u) for s, u in ((1e6, "s"), (1e3, "ms")) if abs(value) >= s), (1.0, "µs"))
        return f"{value / size:.3g} {unit}"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if unit else ():
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def is_light(colour: str) -> bool:
    """Whether dark text can be read on it."""
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140


def _mix(stops: tuple[tuple[int, int, int], ...], share: float) -> str:
    x = min(1.0, max(0.0, share)) * (len(stops) - 1)
    k = min(len(stops) - 2, int(x))
    low, high = stops[k], stops[k + 1]
    return _hex(tuple(round(a + (b - a) * (x - k)) for a, b in zip(low, high, strict=True)))


def _hex(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{c:02x}" for c in colour)


__all__ = ["LAST", "Chip", "Colours", "Looked", "Module", "Point", "is_light", "point", "shown_step"]
