"""HTML of measured node times: a bar an op, then the slowest nodes. Importing this module registers it."""

from __future__ import annotations

from html import escape
from typing import Any

from adkit.graph.display import register_html
from adkit.graph.times import NodeTimes, duration
from adkit.viz.dot import heat_colour
from adkit.viz.html import fragment

_MOST_OPS = 12
_MOST_NODES = 20


@register_html(NodeTimes)
def _times(t: NodeTimes) -> str:
    head = (
        f'<div class="ak-head"><span class="ak-name">{escape(t.name)}</span>'
        f'<span class="ak-fact">{escape(t.batch)}, on {escape(t.where)}</span></div>'
        f'<p class="ak-muted">{escape(t.facts())}</p>'
    )
    ops = t.by_op()
    rows = "".join(
        _row(str(op), f"{r.nodes:.0f}", r, ops.measured_us.max()) for op, r in ops.head(_MOST_OPS).iterrows()
    )
    slow = t.table().sort_values("measured_us", ascending=False).head(_MOST_NODES)
    nodes = "".join(
        _row(r["name"], escape(r["module"]), r, slow.measured_us.max()) for _, r in slow.iterrows()
    )
    return fragment(
        f"{head}{_table('op', 'nodes', rows)}<details><summary>The slowest nodes</summary>"
        f'<div class="ak-body">{_table("node", "module", nodes)}</div></details>'
    )


def _table(first: str, second: str, rows: str) -> str:
    heads = "".join(f"<th>{h}</th>" for h in (first, second, "measured", "", "share", "roofline", "of it"))
    return f'<table class="ak-table"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _row(name: str, second: str, r: Any, most: float) -> str:
    width = 120 * r.measured_us / most if most else 0
    bar = f'<div style="height:9px;width:{width:.0f}px;background:{heat_colour(r.measured_us / (most or 1))}"></div>'
    reached = f"{r.predicted_us / r.measured_us:.0%}" if r.measured_us and r.predicted_us else ""
    return (
        f'<tr><td class="ak-key">{escape(name)}</td><td class="n">{second}</td>'
        f'<td class="n">{duration(r.measured_us / 1e6)}</td><td style="min-width:120px">{bar}</td>'
        f'<td class="n">{r.share:.1%}</td><td class="n">{duration(r.predicted_us / 1e6)}</td>'
        f'<td class="n">{reached}</td></tr>'
    )
