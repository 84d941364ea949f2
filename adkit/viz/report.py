"""One standalone HTML file of a whole run: every step with pictures and code, figures, generated text.

No network, no framework: the style and a few lines of JavaScript (search, arrow keys) are in the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from adkit.graph.history import History
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import Step, Steps
from adkit.viz.dot import write_atomically
from adkit.viz.html import anchor, kind_of, snapshot_body, step_body, steps_body, style, template
from adkit.viz.plots import memory, nodes_by_stage, time_by_pass

MOST_BYTES = 5_000_000
_ROOM = 400_000  # what the page may take beside its steps' bodies


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    steps: Steps,
    final: Snapshot,
    sections: Iterable[tuple[str, str]] = (),
    completions: Iterable[Any] = (),
    figures: Iterable[Any] | None = None,
) -> Path:
    """Write the report of a run to ``path``, whole or not at all; returns the path.

    ``sections``: (title, HTML) pairs of the caller's own. ``completions``: (prompt, text) pairs, or objects
    with ``.prompt`` and ``.text``. ``figures``: matplotlib Figures, HTML strings, or (caption, either) pairs;
    None draws the standard ones (nodes, time, memory). Stays under 5 MB: where it would not, the largest
    steps are shown without their whole-graph pictures.
    """
    drawn = [_figure(f) for f in (standard_figures(steps) if figures is None else figures)]
    extra = [{"id": _slug(name), "title": name, "body": body} for name, body in sections]
    said = [_completion(c) for c in completions]
    history = History(steps)
    ending = snapshot_body(final, history) if len(final) else '<p class="ak-muted">No graph yet.</p>'
    fixed = len(ending) + sum(len(s["body"]) for s in extra) + sum(len(b) for _, b in drawn)
    bodies = _bodies(steps, MOST_BYTES - _ROOM - fixed, history)
    ran = [s for s in steps if s.status == "done"]
    changed = sum(s.changed for s in ran)
    spent = sum(s.seconds for s in ran)
    lead = f"{len(ran)} of {len(steps)} passes ran, {changed} changed the graph, {spent:.2f} s in all."
    text = template(
        "report.html",
        title=title, css=style() + _asset("report.css"), js=_asset("report.js"), lead=lead,
        nav=_nav(steps, bool(drawn), bool(said), extra), overview=steps_body(steps, link=True), figures=drawn,
        completions=said, sections=extra, final=ending,
        steps=[{"id": anchor(s), "body": body} for s, body in zip(steps, bodies, strict=True)],
    )  # fmt: skip
    target = Path(path)
    write_atomically(target, text.encode())
    return target


def standard_figures(steps: Steps) -> list[Figure]:
    """Nodes a stage, time a pass, and memory where any step changed it."""
    found: list[Figure] = []
    if any(s.status == "done" and len(s.after) for s in steps):
        found.append(nodes_by_stage(steps))
    if any(s.status == "done" and s.seconds > 0 for s in steps):
        found.append(time_by_pass(steps))
    if any(s.memory_bytes for s in steps):
        found.append(memory(steps))
    return found


def _bodies(steps: Steps, room: int, history: History) -> list[str]:
    bodies = [step_body(s, pictures=3, graph=True, history=history) for s in steps]
    sizes = [len(b.encode()) for b in bodies]
    listed: list[Step] = list(steps)
    for k in sorted(range(len(bodies)), key=lambda k: -sizes[k]):
        if sum(sizes) <= room:
            break
        bodies[k] = step_body(listed[k], pictures=1, graph=False)
        sizes[k] = len(bodies[k].encode())
    return bodies


def _nav(steps: Steps, figures: bool, completions: bool, extra: list[dict[str, str]]) -> list[dict[str, Any]]:
    top = [("overview", "Overview")] + ([("figures", "Figures")] if figures else [])
    top += [("completions", "Generated text")] if completions else []
    top += [(s["id"], s["title"]) for s in extra]
    nav: list[dict[str, Any]] = [
        {"name": "", "links": [{"id": i, "name": n, "kind": "", "quiet": False} for i, n in top]}
    ]
    waiting = next((s for s in steps if s.status == "pending"), None)
    for s in steps:
        if nav[-1]["name"] != str(s.stage):
            nav.append({"name": str(s.stage), "links": []})
        kind = kind_of(s, waiting)
        nav[-1]["links"].append({"id": anchor(s), "name": s.name, "kind": kind, "quiet": kind != "changed"})
    nav.append(
        {
            "name": "end",
            "links": [{"id": "final", "name": "The graph at the end", "kind": "", "quiet": False}],
        }
    )
    return nav


def _figure(item: Any) -> tuple[str, str]:
    caption, figure = item if isinstance(item, tuple) else ("", item)
    if isinstance(figure, str):
        return caption, figure
    if hasattr(figure, "svg"):
        return caption, str(figure.svg() if callable(figure.svg) else figure.svg)
    import base64
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return caption, f'<img alt="{escape(caption)}" style="max-width:100%" src="data:image/png;base64,{data}">'


def _completion(item: Any) -> tuple[str, str]:
    if isinstance(item, tuple):
        return str(item[0]), str(item[1])
    return str(getattr(item, "prompt", "") or ""), str(item.text)


def _slug(text: str) -> str:
    return "section-" + re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _asset(name: str) -> str:
    return files("adkit.viz").joinpath(f"templates/{name}").read_text()


__all__ = ["standard_figures", "write_report"]
