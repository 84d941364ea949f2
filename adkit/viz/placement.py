"""HTML of a sharding plan: rows that are alike in every layer once. Importing this module registers it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from adkit.graph.display import register_html
from adkit.graph.placement import PlanRow, ShardingPlan
from adkit.graph.provenance import without_layer
from adkit.viz.html import fragment


def head(title: str, *facts: str) -> str:
    """A headline and what goes with it."""
    told = "".join(f'<p class="ak-muted">{escape(f)}</p>' for f in facts if f)
    return f'<div class="ak-head"><span class="ak-name">{escape(title)}</span></div>{told}'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = ()) -> str:
    """A table that scrolls within itself where it is too wide; ``numbers``: columns set to the right."""
    heads = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = []
    for row in rows:
        kinds = ["ak-key" if k == 0 else "n" if c in numbers else "" for k, c in enumerate(columns)]
        cells = (f'<td class="{kind}">{escape(x)}</td>' for kind, x in zip(kinds, row, strict=True))
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        '<div style="overflow-x:auto"><table class="ak-table">'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def folded(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Equal rows once, in order, with how many there are in front: ``x32``."""
    counts: dict[tuple[str, ...], int] = {}
    for row in rows:
        counts[row] = counts.get(row, 0) + 1
    return [(first, f"×{n}", *rest) for (first, *rest), n in counts.items()]


@register_html(ShardingPlan)
def _plan(plan: ShardingPlan) -> str:
    dealt = any(r.decision == "experts" for r in plan)
    world = f"tp={plan.tp}" + (f", experts {plan.moe_ep} x {plan.moe_tp}" if dealt else "")
    sums = sum(r.reduce for r in plan)
    facts = f"{world}{', attention on data' if plan.attention_dp else ''}; {sums} sums over ranks"
    rows = folded(_row(r) for r in plan)
    columns = ("module", "rows", "decision", "pieces", "placement", "then", "by", "why")
    return fragment(head("ShardingPlan", facts) + table(columns, rows, numbers=("rows",)))


def _row(r: PlanRow) -> tuple[str, ...]:
    pieces = "" if r.dim is None else f"dim {r.dim}"
    pieces += f" of {list(r.sizes)}" if r.sizes else ""
    pieces += f", at least {r.min_local}" if r.min_local > 1 else ""
    then = "sum" if r.reduce else ""
    then += f"{', ' if then and r.tokens else ''}{f'tokens {r.tokens}' if r.tokens else ''}"
    return (
        without_layer(r.module) or r.op, r.decision, pieces, str(r.placement), then, r.source,
        without_layer(r.why),
    )  # fmt: skip


__all__ = ["folded", "head", "table"]
