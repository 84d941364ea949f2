"""Figures of a world of ranks: who holds which slice of which tensor, memory, communication, scaling.

Plain data in, a :class:`~adkit.viz.plots.Plot` out; ``adkit/sharding/pictures.py`` collects the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from matplotlib.patches import Patch, Rectangle

from adkit.viz.plots import BLUE, CYCLE, GREEN, GRID, INK, ORANGE, Plot, _figure, _short

#: Half-open ranges [start, stop) that are kept along some of a tensor's dimensions, by dimension.
Ranges = Mapping[int, Sequence[tuple[int, int]]]
#: A tensor's sides are drawn as this power of their size: a thin one can still be read, a large one leaves room.
SQUEEZE = 0.4
COLUMNS = 4
_LIGHT = ("#e69f00", "#56b4e9", "#c9b800", "#cc79a7")


@dataclass(frozen=True)
class Slice:
    """A part of a tensor, and the ranks that each hold a copy of it; dimensions not in ``ranges`` are whole."""

    ranks: tuple[int, ...]
    ranges: Ranges


@dataclass(frozen=True)
class Tensor:
    """A weight as a picture shows it: its name, its whole shape, what ranks hold of it, a remark."""

    name: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    note: str = ""


def mesh(tensors: Sequence[Tensor], world: int, title: str) -> Plot:
    """Each tensor a rectangle (dim 0 downwards, dim 1 to the right), its slices coloured by the rank that holds them.

    Sides are squeezed, names tell the shape. A slice that several ranks have copies of tells them all; what all
    of them have is grey. Of tensors with three dimensions, experts go from left to right.
    """
    largest = max((d for t in tensors for d in t.shape), default=1)
    sizes = [_size(t, largest) for t in tensors]
    rows = [range(k, min(k + COLUMNS, len(tensors))) for k in range(0, len(tensors), COLUMNS)]
    deep = [max(sizes[k][0] for k in row) + 0.32 for row in rows]  # names included
    figure, axes = _figure(9.4, 0.9 + 1.55 * sum(deep), title)
    for i, row in enumerate(rows):
        for k in row:
            _tensor(axes, tensors[k], world, sizes[k], (k % COLUMNS) * 1.16, -sum(deep[:i]))
    axes.set_xlim(-0.02, COLUMNS * 1.16 - 0.12)
    axes.set_ylim(-sum(deep) + 0.1, 0.12)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    handles = [Patch(color=CYCLE[r % len(CYCLE)], label=f"rank {r}") for r in range(world)]
    handles.append(Patch(facecolor=GRID, edgecolor=INK, label="all ranks"))
    axes.legend(
        handles=handles, frameon=False, fontsize=8.5, labelcolor=INK, ncols=9, handlelength=1.0,
        columnspacing=1.2, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=0.2,
    )  # fmt: skip
    return figure


def _size(t: Tensor, largest: int) -> tuple[float, float]:
    """Height and width: 1 for the largest dimension of all, but no piece too small for its label."""

    def side(d: int | None, least: float) -> float:
        if d is None:
            return 0.16
        pieces = len({tuple(s.ranges.get(d, ())) for s in t.slices})
        return max(0.16, (t.shape[d] / largest) ** SQUEEZE, least * pieces)

    down, right = _sides(t)
    return min(1.0, side(down, 0.075)), min(1.0, side(right, 0.09))


def _tensor(axes: Any, t: Tensor, world: int, size: tuple[float, float], left: float, top: float) -> None:
    (down, right), (height, width) = _sides(t), size
    label = f"[{', '.join(map(str, t.shape))}]" + (f"  {t.note}" if t.note else "")
    axes.text(left, top + 0.005, t.name, fontsize=8.5, color=INK, fontweight="bold", va="bottom")
    axes.text(left, top - 0.02, label, fontsize=7.5, color=INK, va="top")
    top -= 0.13
    for s in t.slices:
        every = len(s.ranks) == world and not s.ranges
        colour = GRID if every else CYCLE[s.ranks[0] % len(CYCLE)]
        told = "all" if every else ",".join(map(str, s.ranks))
        ink = INK if every else "#1f2430" if colour in _LIGHT else "white"
        ways = [s.ranges.get(d, [(0, t.shape[d])]) if d is not None else [(0, 1)] for d in (down, right)]
        for (a, b), (c, d) in product(*ways):
            tall = t.shape[down] if down is not None else 1
            wide = t.shape[right] if right is not None else 1
            x, y = left + width * c / wide, top - height * b / tall
            w, h = width * (d - c) / wide, height * (b - a) / tall
            axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, edgecolor=INK, linewidth=0.5))
            points = min(8.5, 80 * h, 150 * w / max(1, len(told)))
            if points >= 4:
                axes.text(x + w / 2, y + h / 2, told, fontsize=points, color=ink, ha="center", va="center")


def _sides(t: Tensor) -> tuple[int | None, int | None]:
    """Which dimensions go downwards and to the right: of more than two, the first and one that is cut."""
    if len(t.shape) < 2:
        return None, 0 if t.shape else None
    if len(t.shape) == 2:
        return 0, 1
    inner = next((d for s in t.slices for d in s.ranges if d), 1)
    return inner, 0


def memory_by_rank(
    ranks: Sequence[Mapping[str, float]],
    total: float,
    limits: Mapping[str, float],
    title: str = "Memory a rank",
) -> Plot:
    """A bar a rank, stacked by kind (bytes); lines at the fair share of ``total`` bytes and at devices' ``limits``."""
    figure, axes = _figure(7.6, 1.5 + 0.3 * len(ranks), f"{title}\n" if limits else title)
    kinds = list(dict.fromkeys(k for r in ranks for k in r))
    kinds = [k for k in kinds if any(r.get(k, 0) for r in ranks)]
    scale, unit = (1e9, "GB") if max((sum(r.values()) for r in ranks), default=0) >= 1e9 else (1e6, "MB")
    starts = [0.0] * len(ranks)
    for k, kind in enumerate(kinds):
        sizes = [r.get(kind, 0) / scale for r in ranks]
        colour = GRID if kind == "cache" else CYCLE[k % len(CYCLE)]
        axes.barh(range(len(ranks)), sizes, left=starts, color=colour, height=0.68, label=kind)
        starts = [a + b for a, b in zip(starts, sizes, strict=True)]
    axes.set_yticks(range(len(ranks)), [f"rank {r}" for r in range(len(ranks))])
    axes.invert_yaxis()
    for y, end in enumerate(starts):
        axes.text(end, y, f" {_short(end)}", va="center", fontsize=8.5, color=INK)
    fair = total / max(1, len(ranks)) / scale
    most = max([*starts, fair, 1e-9])
    shown = {name: size / scale for name, size in limits.items() if size / scale < 6 * most}
    axes.axvline(
        fair, color=INK, linestyle=":", linewidth=1.3, label=f"fair share of weights, {_short(fair)} {unit}"
    )
    for name, size in shown.items():  # in ink: colours are the kinds
        axes.axvline(size, color=INK, linestyle="--", linewidth=1.6)
        axes.text(
            size, -0.55, f"{name}, {_short(size)} {unit}", fontsize=8.5, color=INK, ha="center", va="bottom"
        )
    axes.set_ylim(len(ranks) - 0.5, -0.55)
    axes.set_xlim(0, max([most, *shown.values()]) * 1.12)
    axes.set_xlabel(unit, color=INK, fontsize=9)
    axes.xaxis.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(
        frameon=False, fontsize=8.5, labelcolor=INK, ncols=4, handlelength=1.2, loc="upper left",
        bbox_to_anchor=(-0.02, -0.42 / (0.5 + 0.3 * len(ranks))),
    )  # fmt: skip
    return figure


def comm_by_layer(rows: Sequence[tuple[str, float, float, float]], title: str) -> Plot:
    """A bar a place: microseconds of latency and of bytes on the link.

    ``rows``: (name, bytes that a rank sends, microseconds of latency, microseconds that the bytes take).
    """
    figure, axes = _figure(7.6, 1.3 + 0.34 * max(1, len(rows)), title)
    at = range(len(rows))
    waits, moves = [r[2] for r in rows], [r[3] for r in rows]
    axes.barh(at, waits, color=BLUE, height=0.62, label="latency")
    axes.barh(at, moves, left=waits, color=ORANGE, height=0.62, label="bytes / bandwidth")
    axes.set_yticks(at, [r[0] for r in rows])
    axes.invert_yaxis()
    span = max((a + b for a, b in zip(waits, moves, strict=True)), default=0) or 1
    for y, (_, sent, wait, move) in enumerate(rows):
        told = f"{_short(wait + move)} us, {_bytes(sent)}"
        axes.text(wait + move + span * 0.012, y, told, va="center", fontsize=8.5, color=INK)
    axes.set_xlim(0, span * 1.3)
    axes.set_xlabel("estimated microseconds", color=INK, fontsize=9)
    axes.xaxis.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="lower right")
    return figure


def scaling(table: Any, title: str) -> Plot:
    """Tokens/s over ranks beside the ideal line, both axes logarithmic; ``table`` as ``v.scaling()`` makes it.

    Each batch is a line; at every point stands its speed over the first point's.
    """
    figure, axes = _figure(7.6, 3.9, title)
    for k, column in enumerate(c for c in table.columns if c.startswith("tokens/s")):
        batch = column.split("(b")[1].rstrip(")")
        found = table[column].dropna()
        if found.empty:
            continue
        tps, colour = list(found.index), (BLUE, GREEN, ORANGE)[k % 3]
        first = found.iloc[0]
        axes.plot(tps, [first * n / tps[0] for n in tps], color=colour, linestyle=":", linewidth=1.3)
        axes.plot(tps, found, color=colour, marker="o", linewidth=1.8, label=f"batch {batch}")
        for n, speed in found.items():
            told = _short(speed) + ("" if n == tps[0] else f"  {speed / first:.1f}x")
            axes.annotate(told, (n, speed), (7, -11), textcoords="offset points", fontsize=8.5, color=INK)
    axes.plot([], [], color=INK, linestyle=":", label="ideal")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xticks(list(table.index), [str(n) for n in table.index])
    axes.set_xlim(min(table.index) * 0.9, max(table.index) * 1.5)
    axes.set_xlabel("ranks", color=INK, fontsize=9)
    axes.set_ylabel("estimated tokens/s", color=INK, fontsize=9)
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    axes.grid(True, which="major", color=GRID, linewidth=0.5)
    axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left")
    return figure


def _bytes(count: float) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


__all__ = ["Ranges", "Slice", "Tensor", "comm_by_layer", "memory_by_rank", "mesh", "scaling"]
