"""Two records side by side: models, configurations or library versions. :func:`compare` says what differs.

Times, versions and names are told but never counted as a difference: only what the pipeline is and what it made of
the graph counts, so that a check in CI fails for a change of the graph and for nothing else.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from difflib import unified_diff

from adkit.viz.record.format import OPS, Costs, Record, Step
from adkit.viz.record.read import graph_rows, load_record

_MOST_LINES = 60


@dataclass
class Comparison:
    """What two records differ in: ``facts`` are told alone, ``differences`` count. True when they differ."""

    names: tuple[str, str]
    facts: list[tuple[str, str, str]] = field(default_factory=list)
    differences: list[tuple[str, str, str]] = field(default_factory=list)
    program: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.differences)

    def __repr__(self) -> str:
        rows = [("", *self.names), *self.facts, *(self.differences or [("no difference", "", "")])]
        wide = [min(60, max(len(r[k]) for r in rows)) for k in range(2)]
        told = [f"{r[0]:<{wide[0]}}  {r[1]:<{wide[1]}}  {r[2]}".rstrip() for r in rows]
        told.insert(1 + len(self.facts), "")
        return "\n".join([*told, *([""] if self.program else []), *self.program])


def compare(
    a: Record | str | os.PathLike[str],
    b: Record | str | os.PathLike[str],
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Compare two records (or files of records) step by step: which passes, what they matched, what graph they left.

    Raises RecordError for a file that is no record.
    """
    a, b = (r if isinstance(r, Record) else load_record(r) for r in (a, b))
    found = Comparison(names)
    _tell(found.facts, "model", a.name, b.name)
    for table in ("about", "versions"):
        left, right = getattr(a, table), getattr(b, table)
        for key in dict.fromkeys([*left, *right]):
            if left.get(key) != right.get(key):
                _tell(found.facts, key, left.get(key, "-"), right.get(key, "-"))
    _tell(found.facts, "time of all passes", *(f"{sum(s.seconds for s in r.steps):.2f} s" for r in (a, b)))
    steps = {s.name: s for s in a.steps}, {s.name: s for s in b.steps}
    rows = graph_rows(a), graph_rows(b)
    order = [s.name for s in a.steps if s.name in steps[1]], [s.name for s in b.steps if s.name in steps[0]]
    if order[0] != order[1]:
        _tell(found.differences, "order of the passes", ", ".join(order[0]), ", ".join(order[1]))
    ops: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for name in dict.fromkeys([*steps[0], *steps[1]]):
        one, two = steps[0].get(name), steps[1].get(name)
        if one is None or two is None:
            _tell(
                found.differences,
                name,
                "-" if one is None else one.status,
                "-" if two is None else two.status,
            )
            continue
        for what in ("status", "matches", "created", "erased", "config"):
            left, right = getattr(one, what), getattr(two, what)
            if left != right:
                if what == "config":
                    keys = [k for k in {**left, **right} if left.get(k) != right.get(k)]
                    left, right = ({k: c.get(k) for k in keys} for c in (left, right))
                _tell(found.differences, f"{name}: {what}", str(left), str(right))
        now = _ops(a, one, rows[0]), _ops(b, two, rows[1])
        for op in sorted({k for k in now[0] | now[1] if now[0][k] - ops[0][k] != now[1][k] - ops[1][k]}):
            _tell(found.differences, f"{name}: {op}", f"{now[0][op]} after it", f"{now[1][op]} after it")
        ops = now
    left, right = _program(a), _program(b)
    if left != right:
        lines = list(unified_diff(left, right, *names, n=1, lineterm=""))
        added, gone = (sum(x[:1] == s and x[:3] != s * 3 for x in lines) for s in "+-")
        _tell(
            found.differences, "program at the end", f"{gone} lines of its own", f"{added} lines of its own"
        )
        found.program = lines[:_MOST_LINES]
        if len(lines) > _MOST_LINES:
            found.program.append(f"... and {len(lines) - _MOST_LINES} more lines")
    costs = {c.name: c for c in b.costs if c.rows}
    for c in a.costs:
        if c.name in costs and c.device == costs[c.name].device and rows[0] and rows[1]:
            totals = [_total(x, r[-1]) for x, r in ((c, rows[0]), (costs[c.name], rows[1]))]
            if totals[0] != totals[1]:
                _tell(found.facts, f"roofline, {c.name}", *(f"{t:,.1f} us" for t in totals))
    return found


def _tell(rows: list[tuple[str, str, str]], what: str, left: str, right: str) -> None:
    """Add a row."""
    rows.append((what, left, right))


def _ops(r: Record, s: Step, rows: list[list[int]]) -> Counter[str]:
    call = OPS.index("call_function")
    graph = rows[s.after] if s.after >= 0 else []
    return Counter(r.targets[r.rows.target[k]].name for k in graph if r.rows.op[k] >= call)


def _program(r: Record) -> list[str]:
    graph = next((r.graphs[s.after] for s in reversed(r.steps) if s.after >= 0), None)
    if graph is None or graph.view is None:
        return []
    return [f"{'    ' * x.depth}{x.text}{f'  # {x.comment}' if x.comment else ''}" for x in graph.view.code]


def _total(c: Costs, rows: list[int]) -> float:
    return round(sum(c.table[c.rows[k]][2] for k in rows if c.rows[k] >= 0), 1)


__all__ = ["Comparison", "compare"]
