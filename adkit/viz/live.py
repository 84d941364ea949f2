"""An engine at work, as data and drawn: its cache pages, its batches, its answers, its speed.

``PageMap`` and ``Occupancy`` are pictures, ``Answer`` and ``Meter`` rows, ``LiveView`` all of them at one moment; the
``*_html`` functions draw them. Who fills them in is not known here (see ``adkit.playground``). Colour is never the
only sign: a held page is full, a shared one barred, a kept one hollow, a free one faint. Hues are Okabe and Ito's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, Literal

import numpy as np

from adkit.graph.display import mimebundle, register_html
from adkit.viz.html import fragment
from adkit.viz.plots import CYCLE

Look = Literal["free", "cached", "shared", "held"]

_MOST_CELLS = 512
_COLUMNS = 64
_PITCH, _CELL = 10, 8  # of the page map, in its own units
_SAMPLES = 160  # of occupancy, the latest
_MOST_IN_LEGEND = 4
_MOST_PROMPT = 600  # characters of an answer that are drawn
_MOST_TEXT = 24_000  # over all answers drawn
_MOST_ANSWERS = 24


def hue(number: int) -> str:
    """The colour of request ``number``: of its answer and of its pages."""
    return CYCLE[number % len(CYCLE)]


@dataclass(frozen=True)
class PageGroup:
    """Pages that look the same: what is said of them, how they look, and whose they are (for the colour)."""

    label: str
    look: Look
    colour: str = "var(--ak-muted)"


@dataclass(frozen=True, repr=False)
class PageMap:
    """What every page of a cache is: ``owner[p]`` is the index of page p's group; [P].

    The padding page is not part of it. Shows itself as a picture in a notebook.
    """

    groups: tuple[PageGroup, ...]
    owner: np.ndarray
    page_size: int = 0

    def counts(self) -> dict[str, int]:
        """Pages by group, those without any left out."""
        count = np.bincount(self.owner, minlength=len(self.groups))
        return {g.label: int(n) for g, n in zip(self.groups, count, strict=True) if n}

    def cells(self) -> tuple[int, list[list[tuple[int, float]]]]:
        """Pages a cell, and for each cell its groups with their share of it, those in use first.

        With more pages than cells a cell stands for several neighbours.
        """
        pages = len(self.owner)
        per = max(1, -(-pages // _MOST_CELLS))
        if per == 1:
            return 1, [[(int(g), 1.0)] for g in self.owner]
        cells, kinds = -(-pages // per), len(self.groups)
        count = np.bincount(np.arange(pages) // per * kinds + self.owner, minlength=cells * kinds)
        count = count.reshape(cells, kinds) / count.reshape(cells, kinds).sum(1, keepdims=True)
        order = sorted(range(len(self.groups)), key=lambda g: self.groups[g].look == "free")
        return per, [[(g, row[g]) for g in order if row[g]] for row in count.tolist()]

    def __repr__(self) -> str:
        said = ", ".join(f"{n:,} {label}" for label, n in self.counts().items())
        size = f" of {self.page_size} tokens" if self.page_size else ""
        return f"PageMap({len(self.owner):,} pages{size}: {said})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


@dataclass(frozen=True, repr=False)
class Occupancy:
    """Sequences a step over time: ``samples``, oldest first, each the mean over ``interval`` seconds."""

    samples: tuple[float, ...]
    interval: float
    limit: int

    def __repr__(self) -> str:
        if not self.samples:
            return "Occupancy(no step yet)"
        mean = sum(self.samples) / len(self.samples)
        return f"Occupancy(mean {mean:.1f}, most {max(self.samples):.1f} of {self.limit} sequences a step)"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


@dataclass(frozen=True)
class Answer:
    """One request as it stands: what was asked, what came, how it ended (empty while it runs)."""

    number: int
    prompt: str
    text: str
    state: str
    facts: str = ""
    chat: bool = False
    error: str = ""


@dataclass(frozen=True)
class Meter:
    """One figure with its name and unit; ``None`` when there is none yet."""

    name: str
    value: float | None
    unit: str = ""
    form: str = ",.0f"

    @property
    def shown(self) -> str:
        """The value as text."""
        return "–" if self.value is None else format(self.value, self.form)


@dataclass(frozen=True, repr=False)
class LiveView:
    """All that a panel shows at one moment; shows itself without anything running behind it."""

    heading: str = ""
    meters: tuple[Meter, ...] = ()
    answers: tuple[Answer, ...] = ()
    pages: PageMap | None = None
    occupancy: Occupancy | None = None
    log: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = [
            self.heading,
            *(f"  {m.shown} {m.unit} {m.name}" for m in self.meters if m.value is not None),
        ]
        lines += [f"  [{a.number}] {a.prompt!r} -> {a.text!r} ({a.state or 'running'})" for a in self.answers]
        lines += [f"  {picture!r}" for picture in (self.pages, self.occupancy) if picture is not None]
        return "\n".join([*lines, *(f"  error: {line}" for line in self.log)])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


# ---- drawn -----------------------------------------------------------------------------------------------


@cache
def live_style() -> str:
    """The style sheet of these pictures, beside the one all fragments share."""
    return files("adkit.viz").joinpath("templates/live.css").read_text()


def live_fragment(body: str) -> str:
    """A body as a fragment that carries its style."""
    return fragment(f"<style>{live_style()}</style>{body}")


def pages_html(pages: PageMap) -> str:
    """The page map and its legend; its size depends on the number of pages alone."""
    per, cells = pages.cells()
    paths: dict[int, list[str]] = {}
    for at, shares in enumerate(cells):
        x, bottom = at % _COLUMNS * _PITCH, float(at // _COLUMNS * _PITCH + _CELL)
        for group, share in shares:
            tall = _CELL * share
            paths.setdefault(group, []).append(_block(pages.groups[group].look, x, bottom - tall, tall))
            bottom -= tall
    counts = pages.counts()
    drawn = "".join(
        f'<path class="al-{g.look}" style="--al-hue:{g.colour}" d="{"".join(paths[k])}">'
        f"<title>{escape(g.label)}: {counts.get(g.label, 0):,} pages</title></path>"
        for k, g in enumerate(pages.groups)
        if k in paths
    )
    rows = -(-len(cells) // _COLUMNS) or 1
    width = _COLUMNS * _PITCH
    return (
        f'<svg class="al-pages" viewBox="0 0 {width} {rows * _PITCH}" role="img" '
        f'aria-label="{escape(repr(pages), quote=True)}">{drawn}</svg>{_legend(pages, counts, per)}'
    )


def _block(look: Look, x: int, y: float, tall: float) -> str:
    """A cell, or a band of one, as path data."""
    square = f"M{x} {y:.4g}h{_CELL}v{tall:.4g}h-{_CELL}z"
    if look == "cached" and tall > 4:  # a hole: drawn the other way round
        square += f"M{x + 2} {y + 2:.4g}v{tall - 4:.4g}h{_CELL - 4}v-{tall - 4:.4g}z"
    if look == "shared" and tall > 4:  # a bar across
        square += f"M{x} {y + tall / 2 - 1:.4g}v2h{_CELL}v-2z"
    return square


def _legend(pages: PageMap, counts: dict[str, int], per: int) -> str:
    always = [g for g in pages.groups if g.look != "held"]
    held = [g for g in pages.groups if g.look == "held" and counts.get(g.label)]
    entries = [
        f'<span>{_swatch(g)}{escape(g.label)} <b class="al-n">{counts.get(g.label, 0):,}</b></span>'
        for g in [*always, *held[:_MOST_IN_LEGEND]]
    ]
    if len(held) > _MOST_IN_LEGEND:
        entries.append(f"<span>and {len(held) - _MOST_IN_LEGEND} more requests</span>")
    size = f" of {pages.page_size} tokens" if pages.page_size else ""
    scale = f"{len(pages.owner):,} pages{size}" + (f", a cell is {per}" if per > 1 else "")
    return f'<div class="ak-legend al-legend">{"".join(entries)}<span>{scale}</span></div>'


def _swatch(group: PageGroup) -> str:
    return (
        f'<svg class="al-swatch" viewBox="0 0 {_CELL} {_CELL}"><path class="al-{group.look}" '
        f'style="--al-hue:{group.colour}" d="{_block(group.look, 0, 0, _CELL)}"/></svg>'
    )


def occupancy_html(occupancy: Occupancy) -> str:
    """Sequences a step as bars, the latest at the right, under a line for the most there were."""
    samples = occupancy.samples[-_SAMPLES:]
    most = max(samples, default=0) or 1
    left = _SAMPLES - len(samples)
    bars = "".join(
        f"M{(left + k) * 4} 40v-{max(1.0, 36 * s / most):.1f}h3V40z" for k, s in enumerate(samples) if s
    )
    span = f"{_SAMPLES * occupancy.interval:.0f} s"
    now = f"{samples[-1]:.1f}" if samples else "–"
    return (
        f'<svg class="al-spark" viewBox="0 0 {_SAMPLES * 4} 41" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(repr(occupancy), quote=True)}"><path class="al-rule" d="M0 4H{_SAMPLES * 4}"/>'
        f'<path class="al-bars" d="{bars}"/><path class="al-rule" d="M0 40.5H{_SAMPLES * 4}"/></svg>'
        f'<div class="ak-legend al-legend al-one"><span>sequences a step, at work in the last {span}</span>'
        f'<span>now <b class="al-n">{now}</b></span><span>line at <b class="al-n">{most:.1f}</b></span>'
        f"<span>at most {occupancy.limit:,}</span></div>"
    )


def meters_html(meters: Iterable[Meter]) -> str:
    """Figures side by side, each in a box of fixed width."""
    boxes = "".join(
        f'<div class="al-meter"><b>{escape(m.shown)}</b><i>{escape(m.unit)}</i><span>{escape(m.name)}</span></div>'
        for m in meters
    )
    return f'<div class="al-meters">{boxes}</div>'


def answers_html(answers: Sequence[Answer]) -> str:
    """Requests one under the other, prompt and answer told apart; of many, the first few of the latest."""
    if not answers:
        return '<p class="ak-muted">Nothing asked yet.</p>'
    shown = answers[-_MOST_ANSWERS:]
    more = len(answers) - len(shown)
    head = f'<p class="ak-muted">and {more} before these</p>' if more > 0 else ""
    return head + "".join(_answer(a, _MOST_TEXT // len(shown)) for a in shown)


def _answer(a: Answer, most: int) -> str:
    state = a.state or "running"
    kind = {"error": " ak-failed", "running": " al-running"}.get(state, "")
    prompt = a.prompt if len(a.prompt) <= _MOST_PROMPT else f"{a.prompt[:_MOST_PROMPT]} …"
    text = a.text if len(a.text) <= most else f"… {a.text[-most:]}"
    body = f'<span class="al-prompt">{escape(prompt)}</span>'
    body += f'<span class="al-text">{escape(text)}</span>'
    error = f'<div class="al-error">{escape(a.error)}</div>' if a.error else ""
    return (
        f'<div class="al-answer{" al-chat" if a.chat else ""}" style="--al-hue:{hue(a.number)}">'
        f'<div class="al-who"><span class="al-dot"></span>request {a.number} '
        f'<span class="ak-chip{kind}">{escape(state)}</span> <span class="ak-fact">{escape(a.facts)}</span></div>'
        f'<div class="al-said">{body}</div>{error}</div>'
    )


def log_html(log: Sequence[str]) -> str:
    """Messages, the latest first."""
    if not log:
        return '<div class="al-log ak-muted">No errors.</div>'
    return f'<div class="al-log">{"".join(f"<div>{escape(line)}</div>" for line in reversed(log))}</div>'


def view_html(view: LiveView) -> str:
    """All of a view as one body without style: what a notebook keeps when nothing runs behind it."""
    parts = [f'<div class="ak-head"><span class="ak-name">{escape(view.heading)}</span></div>']
    parts += [meters_html(view.meters)] if view.meters else []
    parts += [f'<div class="al-answers">{answers_html(view.answers)}</div>']
    parts += [pages_html(view.pages)] if view.pages is not None else []
    parts += [occupancy_html(view.occupancy)] if view.occupancy is not None else []
    parts += [log_html(view.log)] if view.log else []
    return "".join(parts)


@register_html(PageMap)
def _page_map(pages: PageMap) -> str:
    return live_fragment(pages_html(pages))


@register_html(Occupancy)
def _occupancy(occupancy: Occupancy) -> str:
    return live_fragment(occupancy_html(occupancy))


@register_html(LiveView)
def _live_view(view: LiveView) -> str:
    return live_fragment(view_html(view))


__all__ = [
    "Answer", "LiveView", "Meter", "Occupancy", "PageGroup", "PageMap", "answers_html", "hue", "live_fragment",
    "live_style", "log_html", "meters_html", "occupancy_html", "pages_html", "view_html",
]  # fmt: skip
