"""HTML of adkit's objects: Snapshot, Diff, RewriteClass, Step, Steps, Text.

Each fragment stands alone (its style travels with it), follows JupyterLab's theme through CSS variables, and
is the same for the same data. Importing this module registers the renderers with ``adkit.graph.display``.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from adkit.graph.code import Line, lines
from adkit.graph.diff import Diff, RewriteClass, _tally
from adkit.graph.display import register_html
from adkit.graph.folding import layers_text
from adkit.graph.history import History
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import Step, Steps, Text
from adkit.viz.dot import Drawing, draw
from adkit.viz.picture import PictureTooLarge, rewrite_picture

_MOST_CLASSES = 8
_TALL = 60


@cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("adkit.viz"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=False, undefined=jinja2.StrictUndefined,
    )  # fmt: skip


def template(name: str, **values: Any) -> str:
    """A template of this package, filled in."""
    return str(_environment().get_template(name).render(**values))


@cache
def style() -> str:
    """The style sheet all fragments share.

    VS Code has rules of its own: its widget manager sets JupyterLab's colours to a light page's, whatever the theme.
    """
    return files("adkit.viz").joinpath("templates/style.css").read_text()


def fragment(body: str) -> str:
    """A body as a fragment that carries its style."""
    return f'<style>{style()}</style><div class="adkit">{body}</div>'


# ---- pieces, also used by the report and the widgets ---------------------------------------------------


def code_html(snapshot: Snapshot, *, layer: int | None = None) -> str:
    """The program view; hovering over a line tells the modelling code it came from."""
    rows = lines(snapshot, layer=layer)
    return (
        f'<div class="ak-code"><pre>{chr(10).join(_code_line(line, snapshot) for line in rows)}</pre></div>'
    )


_KEYWORDS = re.compile(r"^(\s*)(def|for|if|elif|else|return)\b")


def _code_line(line: Line, snapshot: Snapshot) -> str:
    text = "    " * line.depth + line.text
    html = _KEYWORDS.sub(r'\1<span class="k">\2</span>', escape(text, quote=False))
    if line.comment:
        html += f'{"  " if line.text else ""}<span class="c"># {escape(line.comment, quote=False)}</span>'
    if line.ids:
        n = snapshot[line.ids[0]]
        if n.source is not None:
            note = f"{n.source.file.rsplit('/', 1)[-1]}:{n.source.line}  {n.source.code}"
            return f'<span title="{escape(note)}">{html}</span>'
    return html


def diff_html(before: Snapshot, after: Snapshot, *, context: int = 3) -> str:
    """The code views' difference: removed lines red, added green, ``context`` lines around them."""
    if not len(before):
        return ""
    old, new = before.code().splitlines(), after.code().splitlines()
    rows = []
    for n, text in enumerate(difflib.unified_diff(old, new, n=context, lineterm="")):
        if n < 2:
            continue
        if text.startswith("@@"):
            rows.append('<span class="h">⋯</span>')
            continue
        kind = {"+": "a", "-": "d"}.get(text[0], "s")
        rows.append(f'<span class="{kind}">{escape(text, quote=False)}</span>')
    if not rows:
        return '<p class="ak-muted">The programs read the same.</p>'
    return f'<div class="ak-code"><pre>{"".join(rows)}</pre></div>'


def picture_html(
    snapshot: Snapshot, *, highlight: Any = (), depth: int | None = None, history: History | None = None
) -> str:
    """The folded picture; modules collapse where the graph is too large to read in full."""
    error = ""
    for level in (depth,) if depth is not None else (None, 1, 0):
        try:
            drawing = draw(snapshot, highlight=highlight, depth=level, history=history)
        except PictureTooLarge as too_large:
            error = str(too_large)
            continue
        if level == 0 or depth is not None or len(drawing.picture.boxes) <= _TALL:
            return f'<div class="ak-svgbox">{_fit(drawing)}</div>'
    return f'<p class="ak-muted">{escape(error)}</p>'


def _fit(drawing: Drawing) -> str:
    return drawing.html().replace('class="adkit-svg"', 'class="adkit-svg ak-fit"', 1)


def rewrite_rows(
    change: Step | Diff, *, pictures: int = 1, most: int = _MOST_CLASSES
) -> tuple[list[dict[str, Any]], int]:
    """Rewrite classes as rows for the templates, ``pictures`` of them drawn, and how many are left out.

    Drawn are the first where something became something else, before those where something only went or came.
    """
    classes = change.rewrites
    rows = []
    drawn = sorted(classes[:most], key=lambda r: not (r.before and r.after))[:pictures]
    for r in classes[:most]:
        row = _row(r)
        if any(r is d for d in drawn) and len(change.before):
            row["picture"] = _fit(Drawing(rewrite_picture(change, r)))
        rows.append(row)
    return rows, max(0, len(classes) - most)


def _row(r: RewriteClass) -> dict[str, Any]:
    was = ", ".join(_tally(r.before)) or ("" if r.after or r.changed else "parameters")
    now = ", ".join(_tally(r.after))
    if r.before and not r.after:
        now = "nothing"
    if r.changed and not r.before and not r.after:
        was, now = ", ".join(_tally(r.changed)), "rewired"
    elif not r.before and not r.after:
        now = str(r).split(": ", 1)[-1].split(" (", 1)[0]
    places = ", ".join(dict.fromkeys(s.module_path or "root" for s in r.sites[:12]))
    more = f" and {len(r.sites) - 12} more" if len(r.sites) > 12 else ""
    return {
        "count": r.count,
        "was": was or "nothing",
        "now": now,
        "where": r.where,
        "places": places + more,
        "picture": "",
    }


def kind_of(s: Step, next_step: Step | None = None) -> str:
    """A step's look: changed, done, skipped, disabled, failed, pending, pending next."""
    if s.status == "done":
        return "changed" if s.changed else "done"
    return "pending next" if s is next_step else s.status


def anchor(s: Step) -> str:
    """The step's id within a page."""
    return f"step-{re.sub(r'[^a-z0-9_-]', '-', s.name.lower())}"


def step_body(s: Step, *, pictures: int = 1, graph: bool = False, history: History | None = None) -> str:
    """A step's HTML without the style; ``graph`` adds the whole picture and program after it."""
    doc = textwrap.dedent(s.doc).strip()
    lead, _, rest = doc.partition("\n\n")
    changed = s.changed
    rows, more = rewrite_rows(s, pictures=pictures) if changed and len(s.before) else ([], 0)
    counts = ""
    if s.status == "done" and len(s.after):
        counts = f"{len(s.before):,} → {len(s.after):,}" if changed and len(s.before) else f"{len(s.after):,}"
    whole = (graph or not len(s.before)) and changed
    touched = [*s.diff.created, *s.diff.changed] if whole and len(s.before) else ()
    return template(
        "step.html",
        s={
            "name": s.name, "stage": str(s.stage), "status": s.status, "info": s.info,
            "changed": changed or not len(s.after),
            "counts": counts, "time": seconds_text(s.seconds), "memory": memory_text(s.memory_bytes),
            "lead": _marked(" ".join(lead.split())), "rest": rest, "rows": rows, "more": more,
            "diff": diff_html(s.before, s.after) if changed else "",
            "code": code_html(s.after) if whole else "",
            "graph": picture_html(s.after, highlight=touched, history=history) if whole else "",
            "config": json.dumps(s.config, indent=2, default=str) if s.config else "",
            "log": "\n".join(s.log),
        },
    )  # fmt: skip


def _marked(text: str) -> str:
    """Docstring text as HTML: ``literals`` in code type."""
    return re.sub(r"``(.+?)``", r"<code>\1</code>", escape(text, quote=False))


def steps_body(steps: Steps, *, link: bool = False) -> str:
    """The pipeline's HTML without the style; ``link`` makes names jump to the steps' own sections."""
    waiting = next((s for s in steps if s.status == "pending"), None)
    stages: list[dict[str, Any]] = []
    for s in steps:
        if not stages or stages[-1]["stage"] != str(s.stage):
            stages.append({"stage": str(s.stage), "steps": []})
        counts = ""
        if s.changed:
            added, gone = len(s.diff.created), len(s.diff.erased)
            counts = " ".join(([f"+{added:,}"] if added else []) + ([f"−{gone:,}"] if gone else []))
        what = s.info.reason or (_what(s) if s.changed else "")
        if s is waiting and not what:
            what = "next"
        stages[-1]["steps"].append(
            {"name": s.name, "status": s.status, "kind": kind_of(s, waiting), "what": what, "counts": counts,
             "time": seconds_text(s.seconds), "anchor": anchor(s)}
        )  # fmt: skip
    for g in stages:  # a stage that nothing of has run is its passes' names
        g["ahead"] = all(s["kind"] in ("pending", "disabled") for s in g["steps"])
    title, *facts = steps.heading.splitlines() or [""]
    return template("steps.html", stages=stages, link=link, title=title, facts=facts)


def _what(s: Step) -> str:
    if not len(s.before):
        return f"a graph of {len(s.after):,} nodes"
    parts = [str(r).replace(" -> ", " → ").replace(" x ", " × ", 1) for r in s.rewrites[:2]]
    more = len(s.rewrites) - len(parts)
    return "; ".join(parts) + (f"; {more} more" if more > 0 else "")


def seconds_text(seconds: float) -> str:
    """A duration in short: ``1.20 s``, ``34 ms``; empty for none."""
    if not seconds:
        return ""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.0f} ms"


def memory_text(count: int) -> str:
    """A change of memory in short: ``+1.25 GiB``; empty for none."""
    if not count:
        return ""
    size, unit = abs(count) / 2**20, "MiB"
    if size >= 1024:
        size, unit = size / 1024, "GiB"
    return f"{'+' if count > 0 else '−'}{size:.4g} {unit}"


# ---- renderers -------------------------------------------------------------------------------------------


@register_html(Step)
def _step(s: Step) -> str:
    return fragment(step_body(s))


@register_html(Steps)
def _steps(steps: Steps) -> str:
    return fragment(steps_body(steps))


@register_html(Diff)
def _diff(d: Diff) -> str:
    if d.empty:
        return fragment('<p class="ak-muted">Nothing changed.</p>')
    rows, more = rewrite_rows(d, most=3 * _MOST_CLASSES)  # it may tell a whole walk
    counts = f"+{len(d.created)} −{len(d.erased)} ~{len(d.changed)}"
    head = f'<div class="ak-head"><span class="ak-fact"><b>{counts}</b> nodes</span></div>'
    module = _environment().get_template("macros.html").module
    code = diff_html(d.before, d.after)
    tail = (
        f'<details><summary>Code, before and after</summary><div class="ak-body">{code}</div></details>'
        if code
        else ""
    )
    return fragment(head + str(module.rewrites(rows, more)) + tail)


@register_html(RewriteClass)
def _rewrite(r: RewriteClass) -> str:
    module = _environment().get_template("macros.html").module
    sites = "".join(
        f'<tr><td class="ak-key">{escape(s.module_path or "root")}</td>'
        f'<td class="n">−{len(s.erased)} +{len(s.created)} ~{len(s.changed)}</td></tr>'
        for s in r.sites[:40]
    )
    more = f'<p class="ak-muted">and {len(r.sites) - 40} more sites</p>' if len(r.sites) > 40 else ""
    table = (
        f'<details><summary>{r.count} sites</summary><div class="ak-body">'
        f'<table class="ak-table">{sites}</table>{more}</div></details>'
    )
    picture = ""
    if r.diff is not None and len(r.diff.before):
        picture = f'<div class="ak-svgbox">{_fit(Drawing(rewrite_picture(r.diff, r)))}</div>'
    return fragment(f"<div>{module.rewrite_line(_row(r))}</div>{picture}{table}")


@register_html(Snapshot)
def _snapshot(s: Snapshot) -> str:
    return fragment(snapshot_body(s))


def snapshot_body(s: Snapshot, history: History | None = None) -> str:
    """A graph's HTML without the style: picture, program, operations."""
    variants = [
        f"{layers_text(v.layers)} ×{len(v.blocks)}"
        for seg in s.folding
        for v in seg.variants
        if len(v.blocks) > 1
    ]
    calls = sum(n.op == "call_function" for n in s)
    return template(
        "snapshot.html",
        s={"nodes": f"{len(s):,}", "calls": f"{calls:,}", "variants": variants[:6],
           "picture": picture_html(s, history=history) if len(s) else "",
           "code": code_html(s), "ops": list(s.counts().items())},
    )  # fmt: skip


@register_html(Text)
def _text(text: Text) -> str:
    if text.startswith("def "):
        rows = []
        for row in text.splitlines():
            body, mark, comment = row.partition("  # ") if "  # " in row else row.partition("# ")
            html = _KEYWORDS.sub(r'\1<span class="k">\2</span>', escape(body, quote=False))
            rows.append(
                html + (f'<span class="c">{escape(mark + comment, quote=False)}</span>' if mark else "")
            )
        return fragment(f'<div class="ak-code"><pre>{chr(10).join(rows)}</pre></div>')
    return fragment(f'<pre class="ak-text">{escape(text, quote=False)}</pre>')
