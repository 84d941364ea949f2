"""Results as a picture: a bar an engine, and beside it the share of what the machine could do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from adkit.bench.results import SHARES, Result, Row
from adkit.contract import ConfigError
from adkit.viz.plots import BLUE, GREEN, GRID, INK, ORANGE, PURPLE, TEXT, Plot

_COLOURS = {"adkit": BLUE, "hf": PURPLE, "hf-static-compile": ORANGE, "hf-continuous": GREEN}
_RATES = {
    "flops_per_second": (1e12, "TFLOP/s"),
    "output_tokens_per_second": (1, "output tokens/s"),
    "tokens_per_second": (1, "tokens/s"),
}
_BAR = 0.34  # inches
_KINDS = (".svg", ".png", ".pdf")


def draw(results: Sequence[Result]) -> Plot:
    """A row of panels a result: rates on the left, shares of the limit on the right."""
    panels = [(r, _groups(r)) for r in results]
    heights = [sum(len(rows) + 0.6 for _, rows in groups) * _BAR + 0.75 for _, groups in panels]
    with rc_context(TEXT):
        figure = Plot(figsize=(9.0, sum(heights)), layout="constrained")
        grid = figure.add_gridspec(
            len(panels), 2, height_ratios=heights, width_ratios=(3, 2), hspace=0.08, wspace=0.04
        )
        for k, (result, groups) in enumerate(panels):
            left = figure.add_subplot(grid[k, 0])
            _panel(result, groups, left, figure.add_subplot(grid[k, 1], sharey=left))
    figure.patch.set_alpha(0)
    return figure


def save(results: Sequence[Result], path: str | os.PathLike[str]) -> Path:
    """Draw and write a .svg, .png or .pdf; returns the path. Raises ConfigError for another extension."""
    target = check_path(path)
    figure = draw(results)
    with rc_context(TEXT):
        figure.savefig(target, dpi=144, bbox_inches="tight", facecolor="white", pad_inches=0.15)
    return target


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, when a picture can be written there; ConfigError otherwise."""
    target = Path(path)
    if target.suffix.lower() not in _KINDS:
        raise ConfigError(f"cannot draw {target.name!r}: the extension must be one of {', '.join(_KINDS)}")
    if not target.resolve().parent.is_dir():
        raise ConfigError(f"cannot draw {target.name!r}: its folder does not exist")
    return target


def _groups(result: Result) -> list[tuple[int, list[Row]]]:
    """Rows by number of requests, in order; failed ones left out."""
    groups: dict[int, list[Row]] = {}
    for row in result["rows"]:
        if "error" not in row:
            groups.setdefault(row["requests"], []).append(row)
    return list(groups.items())


def _panel(result: Result, groups: list[tuple[int, list[Row]]], left: Any, right: Any) -> None:
    rows = [row for _, group in groups for row in group]
    key = next(k for k in _RATES if all(k in row for row in rows))
    scale, unit = _RATES[key]
    share_key = next((s for s in SHARES if s in rows[0]), "")
    most = max(row[key] for row in rows) / scale
    ticks: list[tuple[float, str]] = []
    at = 0.0
    for requests, group in groups:
        for row in group:
            colour, value = _COLOURS.get(row["engine"], INK), row[key] / scale
            left.barh(at, value, height=0.7, color=colour)
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            left.text(value + most * 0.015, at, text, va="center", fontsize=9, color=INK)
            right.barh(at, 1, height=0.7, color=GRID)
            right.barh(at, min(row.get(share_key, 0), 1), height=0.7, color=colour)
            right.text(1.02, at, f"{row.get(share_key, 0):.0%}", va="center", fontsize=9, color=INK)
            several = f", batch {requests}" if len(groups) > 1 else ""
            ticks.append((at, f"{row['engine']}{several}{' (stopped)' if row.get('cut') else ''}"))
            at += 1
        at += 0.6
    left.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=9)
    left.set_ylim(at - 0.9, -0.7)
    left.set_xlim(0, most * 1.16)
    right.set_xlim(0, 1.15)
    left.set_title(result["what"], loc="left", fontsize=10, fontweight="bold", color=INK)
    several = f"{result['ranks']} x " if result.get("ranks", 1) > 1 else ""
    left.set_xlabel(f"{unit}, {several}{result['machine']}", fontsize=9, color=INK)
    right.set_xlabel(f"share of {SHARES.get(share_key, '')}", fontsize=9, color=INK)
    right.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    left.xaxis.grid(True, color=GRID, linewidth=0.6)
    left.set_axisbelow(True)
    right.tick_params(labelleft=False)
    for axes in (left, right):
        axes.patch.set_alpha(0)
        axes.tick_params(colors=INK, labelsize=9, length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
