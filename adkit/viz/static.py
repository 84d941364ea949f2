"""A record without a script: where no widget runs (GitHub, nbconvert, a mail) and for who cannot see a picture.

:func:`static_html` is a table of the steps, the map of the last graph and its program as text; :func:`walk_svg` is
timeline and map as one SVG that needs nothing around it and reads on light and dark pages. The map nests modules as the
model does, in order of execution, a repeated layer once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from adkit.viz.record.format import OPS, Graph, Record, Step
from adkit.viz.record.read import graph_rows

WIDTH = 880
_FONT = "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
_LETTER = 6.1  # width of a letter at 10 px
_CHIP = 18
_GAP = 4
_PAD = 6
_TITLE = 17
_MOST_CHIPS = 600
_BAR = 30
_INK, _MUTED, _LINE = "#1d2330", "#5b6472", "#d5dae1"
_DEPTHS = ("#fbfcfd", "#f4f6f9", "#eceff4", "#e4e8ef")


@dataclass
class _Module:
    """A module in the map: what it holds in order, nodes as (text, category, how many in a row)."""

    title: str
    items: list[_Module | tuple[str, int, int]] = field(default_factory=list)


def static_html(record: Record) -> str:
    """What can be told without a script: the steps as a table, the map, and the last program as text."""
    rows = "".join(_row(record, s) for s in record.steps)
    facts = ", ".join(f"{k} {v}" for k, v in {**record.about, **record.versions}.items())
    graph = _last(record)
    code = ""
    if graph is not None and graph.view is not None and graph.view.code:
        text = "\n".join(
            f"{'    ' * x.depth}{x.text}{f'  # {x.comment}' if x.comment else ''}" for x in graph.view.code
        )
        code = f"<details><summary>The program at the end</summary><pre>{escape(text)}</pre></details>"
    note = f"<p>{escape(record.note)}</p>" if record.note else ""
    return (
        f'<div class="adkit-static"><p><b>{escape(record.name)}</b> {escape(facts)}</p>{note}{walk_svg(record)}'
        '<table><caption>Steps</caption><thead><tr><th scope="col">stage</th><th scope="col">step</th>'
        '<th scope="col">status</th><th scope="col">nodes</th><th scope="col">added</th>'
        '<th scope="col">removed</th><th scope="col">changed</th><th scope="col">ms</th>'
        f'<th scope="col">what</th></tr></thead><tbody>{rows}</tbody></table>{code}</div>'
    )


def _row(record: Record, s: Step) -> str:
    nodes = record.graphs[s.after].size if s.after >= 0 else 0
    what = s.reason or s.summary.split(s.name, 1)[-1].strip()  # rewrites may still be to come
    cells = [
        s.stage,
        s.name,
        s.status,
        nodes,
        s.created,
        s.erased,
        len(s.changed),
        round(s.seconds * 1e3, 1),
        what,
    ]
    first = "".join(f"<td>{escape(str(c))}</td>" for c in cells)
    return f"<tr>{first}</tr>"


def walk_svg(record: Record) -> str:
    """Timeline of the steps and map of the last graph as one SVG, :data:`WIDTH` wide; no times: it stays the same."""
    parts: list[str] = []
    y = _timeline(record, parts)
    graph = _last(record)
    if graph is not None:
        root = _map(record, graph)
        body, height = _draw(record, root, 8, y + 8, WIDTH - 16, 0)
        parts += body
        y = _legend(record, root, parts, y + height + 26)
    size = f"{graph.size:,} nodes at the end" if graph is not None else "no graph"
    told = f"{record.name or record.about.get('class', 'graph')}: {len(record.steps)} steps, {size}"
    tall = f"{y + 10:.0f}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{tall}" viewBox="0 0 {WIDTH} {tall}" '
        f'role="img" aria-label="{escape(told)}" style="max-width:100%;height:auto;{_FONT}" font-size="10">'
    )
    page = '<rect width="100%" height="100%" rx="6" fill="#fff"/>'
    title = _text(8, 18, _clip(told, 110), ' font-size="12" font-weight="600"')
    return f"{head}<title>{escape(told)}</title>{page}{title}{''.join(parts)}</svg>"


def _rect(
    x: float, y: float, w: float, h: float, r: float, fill: str, stroke: str = "", title: str = ""
) -> str:
    line = f' stroke="{escape(stroke)}"' if stroke else ""
    told = f"><title>{escape(title)}</title></rect>" if title else "/>"
    size = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{r}"'
    return f'<rect {size} fill="{escape(fill)}"{line}{told}'


def _text(x: float, y: float, text: str, more: str = "", fill: str = _INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{more}>{escape(text)}</text>'


def _last(record: Record) -> Graph | None:
    return next((record.graphs[s.after] for s in reversed(record.steps) if s.after >= 0), None)


def _timeline(record: Record, parts: list[str]) -> float:
    """Bars by stage: how many nodes each step touched. Returns where it ends."""
    x, y = 8.0, 30.0
    work = [s.created + s.erased + len(s.changed) for s in record.steps]
    most = max([*work, 1])
    place = 0
    for stage, group in groupby(record.steps, lambda s: s.stage):
        steps = list(group)
        label = stage.replace("_", " ")
        wide = max(len(steps) * 12.0, len(label) * 5.2 + 4)
        if x + wide > WIDTH - 8:
            x, y = 8.0, y + _BAR + 28
        parts.append(_text(x, y + 8, label, ' font-size="8.5"', _MUTED))
        base = y + 14 + _BAR
        parts.append(f'<path d="M{x:.0f} {base + 0.5:.1f}h{wide:.0f}" stroke="{_LINE}"/>')
        for k, s in enumerate(steps):
            n = work[place + k]
            tall = 2.0 if n == 0 else 4 + (_BAR - 4) * (n / most) ** 0.5
            fill = "#b3261e" if s.status == "failed" else "#0a62b5" if n else "#c3cad3"
            did = f", +{s.created} -{s.erased} nodes, {len(s.changed)} changed" if n else ""
            told = f"{s.name}: {s.status}{did}"
            parts.append(_rect(x + k * 12 + 1, base - tall, 9, tall, 1.5, fill, title=told))
        place += len(steps)
        x += wide + 10
    return y + 14 + _BAR


def _map(record: Record, graph: Graph) -> _Module:
    """The last graph as nested modules; of layers that are alike only the first, with how many it stands for."""
    rows = graph_rows(record)[record.graphs.index(graph)]
    skipped: set[int] = set()
    count: dict[str, int] = {}
    r, texts = record.rows, record.texts

    def path_of(position: int) -> str:
        path = texts[record.modules.path[r.module[rows[position]]]]
        return "" if path.startswith("_empty_nn_module_stack") else path

    for segment in graph.view.folding if graph.view is not None else ():
        for blocks in segment.variants:
            first = next(iter(_positions(blocks[0].nodes)), None)
            if first is None or len(blocks) < 2:
                continue
            layer = str(blocks[0].layer)
            above = path_of(first).split(".")
            if layer in above:
                count[".".join(above[: above.index(layer) + 1])] = len(blocks)
            for b in blocks[1:]:
                skipped.update((*_positions(b.nodes), *_positions(b.leaves)))
    root = _Module("")
    made = {"": root}
    types = {texts[p]: texts[t] for p, t in zip(record.modules.path, record.modules.type, strict=True)}

    def module(path: str) -> _Module:
        if path not in made:
            above, _, name = path.rpartition(".")
            parent = module(above)
            times = f"  ×{count[path]}" if path in count else ""
            made[path] = _Module(f"{name}: {types[path]}{times}" if types.get(path) else f"{name}{times}")
            parent.items.append(made[path])
        return made[path]

    for position, row in enumerate(rows):
        op = OPS[r.op[row]]
        if position in skipped or op in ("get_attr", "placeholder", "output"):
            continue
        short = record.targets[r.target[row]].short
        items = module(path_of(position)).items
        last = items[-1] if items else None
        if isinstance(last, tuple) and last[:2] == (short, r.category[row]):
            items[-1] = (*last[:2], last[2] + 1)
        else:
            items.append((short, r.category[row], 1))
    return root


def _positions(runs: list[int]) -> Iterator[int]:
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        yield from range(start, start + length)


def _draw(
    record: Record, m: _Module, x: float, y: float, width: float, depth: int
) -> tuple[list[str], float]:
    """A module's box at (x, y) and its height; what is inside flows from left to right."""
    inner: list[str] = []
    left, right = x + _PAD, x + width - _PAD
    at, line = left, y + (_TITLE + 4 if m.title else _PAD)
    tall = 0.0
    for item in m.items[:_MOST_CHIPS]:
        if isinstance(item, tuple):
            text = item[0] if item[2] == 1 else f"{item[0]} ×{item[2]}"
            wide, high = min(right - left, len(text) * _LETTER + 10), float(_CHIP)
        else:
            own = _natural(item)
            wide = right - left if own is None else min(right - left, own)
            high = _draw(record, item, 0, 0, wide, depth + 1)[1]
        if at > left and at + wide > right:
            at, line, tall = left, line + tall + _GAP, 0.0
        if isinstance(item, tuple):
            c = record.categories[item[1]]
            inner.append(_rect(at, line, wide, _CHIP, 3, c.fill, c.border))
            inner.append(_text(at + 5, line + 12.5, _clip(text, int((wide - 8) / _LETTER))))
        else:
            inner += _draw(record, item, at, line, wide, depth + 1)[0]
        at, tall = at + wide + _GAP, max(tall, high)
    height = line + tall + _PAD - y
    box = [_rect(x, y, width, height, 5, _DEPTHS[min(depth, 3)], _LINE)]
    if m.title:
        box.append(_text(x + _PAD, y + 13, _clip(m.title, int((width - 10) / _LETTER)), ' font-weight="600"'))
    return [*box, *inner], height


def _natural(m: _Module) -> float | None:
    """The width of a module of few nodes on one line; None for one that takes a line of its own."""
    if any(isinstance(i, _Module) for i in m.items) or len(m.items) > 6:
        return None
    chips = [len(i[0]) + (0 if i[2] == 1 else len(f" ×{i[2]}")) for i in m.items if isinstance(i, tuple)]
    wide = sum(n * _LETTER + 10 + _GAP for n in chips) - _GAP + 2 * _PAD
    return max(wide, len(m.title) * _LETTER + 2 * _PAD + 4)


def _legend(record: Record, root: _Module, parts: list[str], y: float) -> float:
    """The kinds of work that the map shows."""

    def kinds(m: _Module) -> set[int]:
        return {k for i in m.items for k in (kinds(i) if isinstance(i, _Module) else {i[1]})}

    x = 8.0
    for k in sorted(kinds(root)):
        c = record.categories[k]
        wide = 18 + len(c.name) * _LETTER + 12
        if x + wide > WIDTH - 8:
            x, y = 8.0, y + 16
        parts.append(_rect(x, y - 9, 11, 11, 2, c.fill, c.border) + _text(x + 16, y, c.name, fill=_MUTED))
        x += wide
    return y


def _clip(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: max(1, letters - 1)]}…"


__all__ = ["WIDTH", "static_html", "walk_svg"]
