"""A record without a script: where no widget runs (GitHub, nbconvert, a mail) and for who cannot see a picture.

:func:`static_html` is a picture of the point looked at, the steps as a table and the program as text; :func:`walk_svg`
is timeline and map (:mod:`adkit.viz.static_map`) as one SVG that needs nothing around it and reads on light and dark
pages. The map nests modules as the model does, in order of execution, a repeated layer once.
"""

from __future__ import annotations

from html import escape
from itertools import groupby

from adkit.viz.record.format import Record, Step
from adkit.viz.static_map import LAST, Chip, Colours, Looked, Module, Point, is_light, point, shown_step

WIDTH = 880
_FONT = "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"
_LETTER = 6.1  # width of a letter at 10 px
_CHIP = 18
_GAP = 4
_PAD = 6
_TITLE = 17
_MOST_CHIPS = 600
_BAR = 30
_MOST_REWRITES = 4
_INK, _MUTED, _LINE, _ACCENT = "#1d2330", "#5b6472", "#d5dae1", "#0a62b5"
_MARKS = {"created": "#0a7d55", "changed": "#9a5b00"}
_ERASED = "#b3261e"
_DEPTHS = ("#fbfcfd", "#f4f6f9", "#eceff4", "#e4e8ef")
_CELL = 'style="text-align:left;vertical-align:top"'
_NUMBER = 'style="text-align:right;vertical-align:top"'


def static_html(record: Record, look: Looked = LAST) -> str:
    """What can be told without a script: the point looked at as a picture; folded, the steps and the program."""
    facts = ", ".join(f"{k} {v}" for k, v in {**record.about, **record.versions}.items())
    at = shown_step(record, look.step)
    code = ""
    view = record.graphs[record.steps[at].after].view if at >= 0 else None
    if view is not None and view.code:
        text = "\n".join(
            f"{'    ' * x.depth}{x.text}{f'  # {x.comment}' if x.comment else ''}" for x in view.code
        )
        told = f"The program after {record.steps[at].name}"
        code = f"<details><summary>{escape(told)}</summary><pre>{escape(text)}</pre></details>"
    note = f"<p>{escape(record.note)}</p>" if record.note else ""
    heads = ("stage", "step", "status", "nodes", "added", "removed", "changed", "ms", "what")
    head = "".join(
        f'<th scope="col" {_NUMBER if k in range(3, 8) else _CELL}>{h}</th>' for k, h in enumerate(heads)
    )
    rows = "".join(_row(record, s) for s in record.steps)
    changing = sum(bool(s.created or s.erased or s.changed) for s in record.steps)
    return (
        f'<div class="adkit-static"><p><b>{escape(record.name)}</b> {escape(facts)}</p>{note}{walk_svg(record, look)}'
        f"<details><summary>{len(record.steps)} steps, {changing} of which changed the graph</summary>"
        f"<table><caption>Steps</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>"
        f"{code}</div>"
    )


def _row(record: Record, s: Step) -> str:
    nodes = record.graphs[s.after].size if s.after >= 0 else 0
    words = [s.stage, s.name, s.status]
    numbers = [nodes, s.created, s.erased, len(s.changed), round(s.seconds * 1e3, 1)]
    cells = "".join(f"<td {_CELL}>{escape(w)}</td>" for w in words)
    cells += "".join(f"<td {_NUMBER}>{n}</td>" for n in numbers)
    return f"<tr>{cells}<td {_CELL}>{escape(_what(s))}</td></tr>"


def _what(s: Step) -> str:
    """What a step did, in words; rewrites may still be to come, its summary is there."""
    return s.reason or s.summary.split(s.name, 1)[-1].strip()


def walk_svg(record: Record, look: Looked = LAST) -> str:
    """Timeline of the steps and map of the graph looked at as one SVG, :data:`WIDTH` wide.

    Nodes that the step made or changed have its colour around them, those chosen stand out, an overlay fills them. No
    times: the picture stays the same from run to run.
    """
    shown = point(record, look)
    graph = shown.graph
    parts: list[str] = []
    y = _timeline(record, parts, shown.step)
    size = f"{graph.size:,} nodes" if graph is not None else "no graph"
    name = record.name or record.about.get("class", "graph")
    told = f"{name}: {len(record.steps)} steps, {size}"
    if graph is not None:
        step = record.steps[shown.step]
        told += f" after {step.name}"
        y = _caption(parts, record, shown, y + 20)
        colours = Colours(shown.overlay) if shown.overlay is not None else None
        body, height = _draw(record, shown.root, 8, y + 4, WIDTH - 16, 0, colours)
        parts += body
        y = _legend(record, shown, colours, parts, y + height + 22)
    tall = f"{y + 10:.0f}"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{tall}" viewBox="0 0 {WIDTH} {tall}" '
        f'role="img" aria-label="{escape(told)}" style="max-width:100%;height:auto;{_FONT}" font-size="10">'
    )
    page = '<rect width="100%" height="100%" rx="6" fill="#fff"/>'
    title = _text(8, 18, _clip(told, 110), ' font-size="12" font-weight="600"')
    return f"{head}<title>{escape(told)}</title>{page}{title}{''.join(parts)}</svg>"


def _rect(
    x: float,
    y: float,
    w: float,
    h: float,
    r: float,
    fill: str,
    stroke: str = "",
    title: str = "",
    width: float = 1,
) -> str:
    line = f' stroke="{escape(stroke)}"' if stroke else ""
    line += f' stroke-width="{width:g}"' if stroke and width != 1 else ""
    told = f"><title>{escape(title)}</title></rect>" if title else "/>"
    size = f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{r}"'
    return f'<rect {size} fill="{escape(fill)}"{line}{told}'


def _text(x: float, y: float, text: str, more: str = "", fill: str = _INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}"{more}>{escape(text)}</text>'


def _timeline(record: Record, parts: list[str], shown: int) -> float:
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
            fill = "#b3261e" if s.status == "failed" else _ACCENT if n else "#c3cad3"
            did = f", +{s.created} -{s.erased} nodes, {len(s.changed)} changed" if n else ""
            told = f"{s.name}: {s.status}{did}"
            if place + k == shown:
                parts.append(_rect(x + k * 12, base - _BAR - 1, 11, _BAR + 1, 1.5, _DEPTHS[3]))
                parts.append(_rect(x + k * 12, base + 1, 11, 3, 0, _INK))
            parts.append(_rect(x + k * 12 + 1, base - tall, 9, tall, 1.5, fill, title=told))
        place += len(steps)
        x += wide + 10
    return y + 14 + _BAR


def _caption(parts: list[str], record: Record, shown: Point, y: float) -> float:
    """Which step is shown and what it rewrote; returns the last line's place."""
    s = record.steps[shown.step]
    counts = [(shown.created, "+", _MARKS["created"]), (shown.erased, "−", _ERASED)]
    counts.append((shown.changed, "~", _MARKS["changed"]))
    compared = shown.against >= 0
    title = f"after {s.name}" + (f", against {record.steps[shown.against].name}" if compared else "")
    parts.append(_text(8, y, title, ' font-size="11.5" font-weight="600"'))
    x = 8 + len(title) * 7.1 + 10
    for n, sign, colour in counts:
        if n:
            parts.append(_text(x, y, f"{sign}{n}", ' font-size="11.5" font-weight="600"', colour))
            x += (len(str(n)) + 1) * 7.1 + 8
    lines = [] if compared else [x.strip() for x in _what(s).split(";") if x.strip()]
    for line in lines[:_MOST_REWRITES]:
        y += 14
        parts.append(
            _text(8, y, _clip(line.replace(" -> ", " → ").replace(" x ", " × ", 1), 140), fill=_MUTED)
        )
    if len(lines) > _MOST_REWRITES:
        y += 14
        parts.append(_text(8, y, f"and {len(lines) - _MOST_REWRITES} more", fill=_MUTED))
    return y


def _draw(
    record: Record, m: Module, x: float, y: float, width: float, depth: int, colours: Colours | None
) -> tuple[list[str], float]:
    """A module's box at (x, y) and its height; what is inside flows from left to right."""
    inner: list[str] = []
    left, right = x + _PAD, x + width - _PAD
    at, line = left, y + (_TITLE + 4 if m.title else _PAD)
    tall = 0.0
    for item in m.items[:_MOST_CHIPS]:
        if isinstance(item, Chip):
            wide, high = min(right - left, len(_said(item)) * _LETTER + 10), float(_CHIP)
        else:
            own = _natural(item)
            wide = right - left if own is None else min(right - left, own)
            high = _draw(record, item, 0, 0, wide, depth + 1, colours)[1]
        if at > left and at + wide > right:
            at, line, tall = left, line + tall + _GAP, 0.0
        if isinstance(item, Chip):
            inner += _chip(record, item, at, line, wide, colours)
        else:
            inner += _draw(record, item, at, line, wide, depth + 1, colours)[0]
        at, tall = at + wide + _GAP, max(tall, high)
    height = line + tall + _PAD - y
    box = [_rect(x, y, width, height, 5, _DEPTHS[min(depth, 3)], _LINE)]
    if m.title:
        box.append(_text(x + _PAD, y + 13, _clip(m.title, int((width - 10) / _LETTER)), ' font-weight="600"'))
    if m.erased and colours is None:
        place = x + _PAD + (len(m.title) + 1) * _LETTER if m.title else x + width - 40
        if place + 30 < x + width:
            told = f"−{m.erased}"
            box.append(_text(place, y + 13, told, ' font-weight="700"', _ERASED))
    return [*box, *inner], height


def _said(chip: Chip) -> str:
    return chip.text if chip.count == 1 else f"{chip.text} ×{chip.count}"


def _chip(record: Record, chip: Chip, x: float, y: float, wide: float, colours: Colours | None) -> list[str]:
    c = record.categories[chip.category]
    fill, stroke, ink = c.fill, c.border, _INK
    if colours is not None:
        fill, stroke = "#fff", _LINE
        if chip.value is not None:
            fill = colours.of(chip.value)
            ink = _INK if is_light(fill) else "#fff"
    width = 1.0
    if chip.mark and colours is None:  # one story at a time: an overlay's colours or what changed
        stroke, width = _MARKS[chip.mark], 2
    if chip.chosen:
        stroke, width = _ACCENT, 3
    text = _clip(_said(chip), int((wide - 8) / _LETTER))
    weight = ' font-weight="700"' if chip.chosen else ""
    return [_rect(x, y, wide, _CHIP, 3, fill, stroke, width=width), _text(x + 5, y + 12.5, text, weight, ink)]


def _natural(m: Module) -> float | None:
    """The width of a module of few nodes on one line; None for one that takes a line of its own."""
    if any(isinstance(i, Module) for i in m.items) or len(m.items) > 6:
        return None
    wide = sum(len(_said(i)) * _LETTER + 10 + _GAP for i in m.items if isinstance(i, Chip)) - _GAP + 2 * _PAD
    erased = (len(str(m.erased)) + 2) * _LETTER if m.erased else 0
    return max(wide, len(m.title) * _LETTER + 2 * _PAD + 4 + erased)


def _legend(record: Record, shown: Point, colours: Colours | None, parts: list[str], y: float) -> float:
    """What the colours mean: kinds of work or an overlay's values, and the marks."""
    x = 8.0

    def entry(fill: str, stroke: str, text: str, width: float = 1) -> None:
        nonlocal x, y
        wide = 18 + len(text) * _LETTER + 12
        if x + wide > WIDTH - 8:
            x, y = 8.0, y + 16
        parts.append(
            _rect(x, y - 9, 11, 11, 2, fill, stroke, width=width) + _text(x + 16, y, text, fill=_MUTED)
        )
        x += wide

    chips = list(_chips(shown.root))
    if colours is None:
        for k in sorted({c.category for c in chips}):
            entry(record.categories[k].fill, record.categories[k].border, record.categories[k].name)
    elif colours.overlay.scale == "words":
        for k, word in enumerate(colours.overlay.words):
            entry(colours.of(k), _LINE, word)
    else:
        low, high = colours.ends
        told = f"{colours.overlay.name}  {low}"
        parts.append(_text(x, y, told, fill=_MUTED))
        x += len(told) * _LETTER + 6
        for colour in colours.ramp():
            parts.append(_rect(x, y - 9, 9.5, 11, 0, colour))
            x += 9
        parts.append(_text(x + 6, y, high, fill=_MUTED))
        x += len(high) * _LETTER + 22
        if colours.overlay.note:
            parts.append(
                _text(x, y, _clip(colours.overlay.note, int((WIDTH - 8 - x) / _LETTER)), fill=_MUTED)
            )
            x = WIDTH
    for mark, told in (("created", "new here"), ("changed", "changed here")):
        if colours is None and any(c.mark == mark for c in chips):
            entry("#fff", _MARKS[mark], told, 2)
    if any(c.chosen for c in chips):
        entry("#fff", _ACCENT, "chosen", 3)
    return y


def _chips(m: Module) -> list[Chip]:
    return [c for i in m.items for c in (_chips(i) if isinstance(i, Module) else [i])]


def _clip(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: max(1, letters - 1)]}…"


__all__ = ["WIDTH", "static_html", "walk_svg"]
