"""Pictures drawn: dot source, SVG, PNG and PDF through graphviz, text where graphviz is missing.

``draw(snapshot)`` and ``draw_rewrite(step, rewrite_class)`` return a :class:`Drawing`, which shows itself in
a notebook and saves itself to a file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram
from torch.fx import GraphModule

from adkit.graph.diff import Diff, RewriteClass, Site
from adkit.graph.history import History
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import Step
from adkit.viz.category import COLOURS
from adkit.viz.files import write_atomically
from adkit.viz.picture import Box, Picture, picture_of, rewrite_picture

MISSING = "graphviz's `dot` is not installed: apt-get install graphviz (conda: conda install graphviz)"
_FONT = "Helvetica,Arial,sans-serif"
_MARKS = {
    "erased": ("#fbd5d5", "#c0392b"),
    "created": ("#cdeed6", "#1e8449"),
    "changed": ("#fdebc8", "#b9770e"),
    "context": ("#eceef0", "#a8adb3"),
}
_STRONG = ("input/output", "embedding", "linear", "attention", "cache", "moe", "mixer", "communication")
_PIXELS_PER_POINT = 1.12  # a little under CSS's 96 / 72: graphs are tall


class Drawing:
    """A picture that can show itself: ``.svg``, ``.source`` (dot), ``.text``, ``.save(path)``."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture

    @property
    def source(self) -> str:
        """The dot source."""
        return dot_source(self.picture)

    @property
    def svg(self) -> str | None:
        """The SVG element, or None when graphviz's ``dot`` is not installed."""
        raw = _pipe(self.source, "svg")
        return None if raw is None else _tidy(raw.decode(), _digest(self.source))

    @property
    def text(self) -> str:
        """The picture as indented text."""
        return self.picture.text()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write svg, png, pdf or dot by the file's extension; returns the path.

        Raises ValueError for another extension, RuntimeError when ``dot`` is missing.
        """
        target = Path(path)
        kind = target.suffix.lower().lstrip(".")
        if kind not in ("svg", "png", "pdf", "dot"):
            raise ValueError(
                f"cannot save a picture as {target.name!r}: the extension must be .svg, .png, .pdf or .dot"
            )
        if kind == "dot":
            data: bytes | None = self.source.encode()
        elif kind == "svg":
            svg = self.svg
            data = None if svg is None else svg.encode()
        else:
            page = self.source.replace('bgcolor="transparent"', 'bgcolor="white"', 1)
            data = _pipe(
                page.replace("digraph {", "digraph {\n  dpi=144;", 1) if kind == "png" else page, kind
            )
        if data is None:
            raise RuntimeError(f"cannot save {target.name}: {MISSING}")
        write_atomically(target, data)
        return target

    def html(self) -> str:
        """The SVG in a scrolling frame, or the text with a note of what is missing."""
        svg = self.svg
        if svg is None:
            return f'<pre class="adkit-text">{escape(MISSING)}\n\n{escape(self.text)}</pre>'
        return f'<div class="adkit-picture" style="overflow-x:auto">{svg}</div>'

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        svg = self.svg
        if svg is None:
            return {"text/plain": f"{MISSING}\n\n{self.text}"}
        return {"text/plain": self.text, "image/svg+xml": svg}


def draw(
    snapshot: Snapshot | GraphModule | ExportedProgram,
    *,
    layer: int | None = None,
    fold: bool = True,
    highlight: Iterable[int] | None = None,
    depth: int | None = None,
    parameters: bool = True,
    shapes: bool = True,
    title: str = "",
    history: History | None = None,
    times: Mapping[int, float] | None = None,
    notes: Mapping[int, str] | None = None,
) -> Drawing:
    """Draw a graph: repeated layers as one cluster marked with their number, nodes coloured by what they do.

    Any FX graph or exported program will do, as for :func:`adkit.viz.show`.
    ``layer`` draws one layer alone; ``highlight`` outlines node ids; ``depth`` collapses modules nested
    deeper (0: a box for each child of a layer); ``parameters`` and ``shapes`` may be left out. Hovering over
    a node shows its module and source line (all the lines it stands for, given the ``history`` of the steps).
    ``times`` (seconds by node id) are written into the boxes and colour them instead: the hotter the longer;
    ``notes`` (by node id) are written into their small print.
    Raises PictureTooLarge beyond 400 boxes, saying how to see less, TypeError for what is no graph.
    """
    from adkit.viz.anygraph import snapshot_of

    return Drawing(
        picture_of(
            snapshot_of(snapshot), layer=layer, fold_layers=fold, highlight=highlight or (), depth=depth,
            parameters=parameters, shapes=shapes, title=title, history=history, times=times, notes=notes,
        )
    )  # fmt: skip


def draw_rewrite(step: Step | Diff, rewrite: RewriteClass | int = 0, site: int | Site = 0) -> Drawing:
    """Draw one site of a rewrite class, before and after: erased red, created green, neighbours grey."""
    chosen = step.rewrites[rewrite] if isinstance(rewrite, int) else rewrite
    return Drawing(rewrite_picture(step, chosen, site))


def dot_source(picture: Picture) -> str:
    """The dot source of a picture; the same picture always gives the same text."""
    out = [
        "digraph {",
        f'  graph [bgcolor="transparent", fontname="{_FONT}", fontsize=11, fontcolor="#6b7280", rankdir=TB, '
        "nodesep=0.22, ranksep=0.26, pad=0.15, labelloc=b];",
        f'  node [shape=box, style="rounded,filled", fontname="{_FONT}", fontsize=11, fontcolor="#1f2430", '
        'margin="0.11,0.05", height=0.28, penwidth=1];',
        f'  edge [color="#8b929c", fontname="{_FONT}", fontsize=8, fontcolor="#7a818c", '
        "arrowsize=0.55, penwidth=0.9];",
    ]
    label = _caption(picture)
    if label:
        out.append(f"  label={label};")
    tree: dict[tuple[str, ...], list[Box]] = {}
    for b in picture.boxes:
        tree.setdefault(b.cluster, []).append(b)
    for path in picture.clusters:
        tree.setdefault(path, [])
    _cluster(out, picture, tree, ())
    for a in picture.arrows:
        style = (
            [
                "style=dashed",
                "constraint=false",
                "tailport=e",
                "headport=e",
                'color="#b0638a"',
                'fontcolor="#b0638a"',
            ]
            if a.back
            else []
        )
        label = f"label={quoted(' ' + a.label + ' ')}" if a.label else ""
        attributes = ", ".join(filter(None, [label, *style]))
        out.append(f"  {quoted(a.tail)} -> {quoted(a.head)}" + (f" [{attributes}];" if attributes else ";"))
    out.append("}")
    return "\n".join(out)


def _cluster(
    out: list[str], picture: Picture, tree: dict[tuple[str, ...], list[Box]], path: tuple[str, ...]
) -> None:
    pad = "  " * (len(path) + 1)
    for b in tree.get(path, []):
        out.append(pad + _box(b))
    children = dict.fromkeys(
        p[: len(path) + 1] for p in tree if len(p) > len(path) and p[: len(path)] == path
    )
    for child in children:
        name = _digest("/".join(child))[:10]
        layer = child[-1].startswith("layer") and len(child) == 1
        out.append(f"{pad}subgraph cluster_{name} {{")
        style = (
            'style="rounded,bold", color="#8b929c", fontsize=13'
            if layer
            else 'style="rounded", color="#c4c9d0", fontsize=10'
        )
        out.append(
            f"{pad}  graph [{style}, label={quoted(picture.clusters.get(child, child[-1]))}, "
            "labeljust=l, labelloc=t, margin=9];"
        )
        _cluster(out, picture, tree, child)
        out.append(f"{pad}}}")


def _box(b: Box) -> str:
    fill, border = _MARKS[b.mark] if b.mark else COLOURS[b.category]
    if b.heat is not None and not b.mark:
        fill, border = heat_colour(b.heat), "#b08968"
    title = escape(b.title)
    strong = b.mark != "context" and (b.category in _STRONG or "_" in b.title)
    rows = [f"<b>{title}</b>" if strong else title]
    ink = "#5b6270" if b.heat is None else "#1f2430"
    rows += [f'<font point-size="8" color="{ink}">{escape(d)}</font>' for d in b.detail]
    attributes = [f"label=<{'<br/>'.join(rows)}>", f'fillcolor="{fill}"', f'color="{border}"']
    if b.mark == "context":
        attributes += ["fontsize=9", 'fontcolor="#6b7280"', "height=0.2"]
    elif not b.mark and b.category in ("view", "shape"):
        attributes += ["fontsize=9", "height=0.2"]
    elif not b.mark and b.category == "communication":
        attributes.append("penwidth=3")
    if b.highlight:
        attributes += ['color="#d6336c"', "penwidth=3"]
    if b.tooltip:
        attributes.append(f"tooltip={quoted(b.tooltip)}")
    return f"{quoted(b.key)} [{', '.join(attributes)}];"


def heat_colour(share: float) -> str:
    """From near white (0) to orange (1): lighter is always less, whatever hues a reader tells apart."""
    stops = ((255, 251, 245), (253, 208, 162), (253, 174, 97), (247, 126, 50))
    at = max(0.0, min(1.0, share)) * (len(stops) - 1)
    k = min(int(at), len(stops) - 2)
    mixed = (round(a + (b - a) * (at - k)) for a, b in zip(stops[k], stops[k + 1], strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _caption(picture: Picture) -> str:
    rows = []
    if picture.title:
        rows.append(
            '<tr><td colspan="24" align="left">'
            f'<font point-size="10">{escape(picture.title)}</font></td></tr>'
        )
    if picture.legend and any(b.heat is not None for b in picture.boxes):
        steps = "".join(
            f'<td bgcolor="{heat_colour(k / 4)}" border="1" color="#b08968" width="14" height="9" '
            'fixedsize="true"></td>'
            for k in range(5)
        )
        rows.append(
            '<tr><td colspan="24" align="left"><table border="0" cellborder="0" cellspacing="2"><tr>'
            f'<td><font point-size="9">no time</font></td>{steps}'
            '<td><font point-size="9">the slowest box</font></td></tr></table></td></tr>'
        )
    elif picture.legend:
        cells = "".join(
            f'<td bgcolor="{COLOURS[c][0]}" border="1" color="{COLOURS[c][1]}" '
            'width="9" height="9" fixedsize="true"></td>'
            f'<td align="left"><font point-size="9">{escape(c)} </font></td>'
            for c in COLOURS
            if c in picture.categories
        )
        if cells:
            rows.append(f"<tr>{cells}</tr>")
    return (
        f'<<table border="0" cellborder="0" cellspacing="3" cellpadding="1">{"".join(rows)}</table>>'
        if rows
        else ""
    )


def quoted(text: str) -> str:
    """A string of the DOT language."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=512)
def _pipe(source: str, kind: str) -> bytes | None:
    """dot's output; the same source is drawn once a process. None when dot is not installed."""
    import graphviz

    try:
        return bytes(graphviz.Source(source).pipe(format=kind))
    except graphviz.ExecutableNotFound:
        return None


def _tidy(svg: str, digest: str) -> str:
    """dot's SVG as an element that scales: no prolog, no comments, no ids, sizes in pixels."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.S)
    svg = re.sub(r"<title>.*?</title>\n?", "", svg, flags=re.S)
    svg = re.sub(r' id="(?:[^"]*)"', "", svg)
    found = re.search(r'<svg width="([\d.]+)pt" height="([\d.]+)pt"', svg)
    if found:
        width, height = (round(float(g) * _PIXELS_PER_POINT) for g in found.groups())
        size = f'<svg class="adkit-svg" data-digest="{digest}" width="{width}" height="{height}"'
        size += ' style="max-width:100%;height:auto"'
        svg = svg.replace(found.group(0), size, 1)
    return re.sub(r"\n+", "\n", svg).strip()


__all__ = ["MISSING", "Drawing", "dot_source", "draw", "draw_rewrite", "quoted"]
