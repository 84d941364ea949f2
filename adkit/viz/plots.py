"""Figures over steps and cost tables. No pyplot: every function returns a Figure of its own.

Backgrounds are transparent and text is mid grey, so that a figure reads on light and dark pages; colours are
Okabe and Ito's, which colour-blind readers tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from adkit.graph.cost import Device, device_named
from adkit.graph.step import Step

INK = "#808792"
GRID = "#9aa1ab55"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#c9b800", "#7f7f7f",
)  # fmt: skip
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY)
#: Units that a figure goes through, each a thousand of the one before.
UNITS = (("roofline us", "roofline ms", "roofline s"), ("GFLOP", "TFLOP", "PFLOP"), ("MB", "GB", "TB"))
#: What :func:`cost_by_op` draws: unit and factor of a cost table's columns.
COLUMNS = {"seconds": ("roofline us", 1e6), "flops": ("GFLOP", 1e-9), "bytes": ("MB", 1e-6)}
TEXT: Any = {"svg.fonttype": "none", "svg.hashsalt": "adkit", "font.family": "sans-serif"}


class Plot(Figure):
    """A Figure that shows itself as SVG in a notebook, without pyplot and the same each time."""

    def svg(self) -> str:
        """The figure as an SVG element."""
        buffer = io.StringIO()
        with rc_context(TEXT):
            self.savefig(
                buffer,
                format="svg",
                transparent=True,
                bbox_inches="tight",
                metadata={"Date": None, "Creator": None},
            )
        text = buffer.getvalue()
        return (
            text[text.index("<svg") :].replace("<svg ", '<svg style="max-width:100%;height:auto" ', 1).strip()
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": f"Plot({self.axes[0].get_title(loc='left')!r})", "image/svg+xml": self.svg()}


def _figure(width: float, height: float, title: str) -> tuple[Plot, Axes]:
    with rc_context(TEXT):
        figure = Plot(figsize=(width, height))
        axes: Axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    return figure, axes


def _bars(
    title: str, names: list[str], values: list[float], labels: list[str], colours: list[str], unit: str
) -> Plot:
    figure, axes = _figure(7.2, 0.7 + 0.27 * max(1, len(names)), title)
    at = range(len(names))
    axes.barh(list(at), values, color=colours, height=0.66)
    axes.set_yticks(list(at), names)
    axes.invert_yaxis()
    axes.xaxis.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(unit, color=INK, fontsize=9)
    span = max([abs(v) for v in values], default=0) or 1
    for y, (v, label) in enumerate(zip(values, labels, strict=True)):
        axes.text(max(v, 0) + span * 0.012, y, label, va="center", ha="left", fontsize=8.5, color=INK)
    axes.set_xlim(min([0.0, *values]), span * 1.16)
    return figure


def _readable(values: list[float], unit: str) -> tuple[list[float], str]:
    """Values of five digits and more in the next larger unit."""
    names = next((u for u in UNITS if u[0] == unit), (unit,))
    k = 0
    while k + 1 < len(names) and max(values, default=0.0) >= 10_000:
        values, k = [v / 1000 for v in values], k + 1
    return values, names[k]


def _stage_colours(steps: Iterable[Step]) -> dict[str, str]:
    stages = dict.fromkeys(str(s.stage) for s in steps)
    return {stage: CYCLE[k % len(CYCLE)] for k, stage in enumerate(stages)}


def nodes_by_stage(steps: Iterable[Step]) -> Plot:
    """Nodes in the graph at the end of each stage that has run."""
    last = {str(s.stage): len(s.after) for s in steps if s.status == "done" and len(s.after)}
    values = [float(v) for v in last.values()]
    labels = [f"{v:,.0f}" for v in values]
    return _bars(
        "Nodes in the graph, after each stage", list(last), values, labels, [BLUE] * len(last), "nodes"
    )


def time_by_pass(steps: Iterable[Step]) -> Plot:
    """Seconds each pass took, coloured by stage; passes of under half a millisecond are one bar together."""
    ran = [s for s in steps if s.status == "done" and s.seconds > 0]
    shown = [s for s in ran if s.seconds >= 5e-4]
    colours = _stage_colours(shown)
    bars = [(s.name, s.seconds, colours[str(s.stage)]) for s in shown]
    if len(ran) > len(shown):
        rest = sum(s.seconds for s in ran) - sum(s.seconds for s in shown)
        bars.append((f"{len(ran) - len(shown)} others", rest, INK))
    labels = [f"{t:.2f} s" if t >= 0.1 else f"{t * 1e3:.0f} ms" for _, t, _ in bars]
    figure = _bars(
        "Time a pass",
        [n for n, *_ in bars],
        [t for _, t, _ in bars],
        labels,
        [c for *_, c in bars],
        "seconds",
    )
    _legend(figure.axes[0], colours)
    return figure


def memory(steps: Iterable[Step]) -> Plot:
    """Tensor memory on the device after each step that changed it by a MiB or more, in GiB, coloured by stage.

    A CPU's is not measured: the figure then says that no step changed it.
    """
    total, bars = 0, []
    ran = [s for s in steps if s.status == "done"]
    colours = _stage_colours(s for s in ran if abs(s.memory_bytes) >= 2**20)
    for s in ran:
        total += s.memory_bytes
        if abs(s.memory_bytes) >= 2**20:
            now, change = total / 2**30, s.memory_bytes / 2**30
            bars.append((s.name, now, f"{_short(now)}  ({change:+.3g})", colours[str(s.stage)]))
    title = "Memory on the device, after each step that changed it"
    if not bars:
        figure, axes = _figure(7.2, 0.7, title)
        axes.set_axis_off()
        axes.text(0, 0.5, "No step changed it, or the device is a CPU.", fontsize=9, color=INK)
        return figure
    names, sums, labels, fills = (list(column) for column in zip(*bars, strict=True))
    figure = _bars(title, names, sums, labels, fills, "GiB")
    _legend(figure.axes[0], colours)
    return figure


def cost_by_op(costs: Any, column: str = "seconds", most: int = 12) -> Plot:
    """What each kind of operation costs, largest first: a cost table's ``seconds``, ``flops`` or ``bytes``, summed.

    ``costs`` as :meth:`Snapshot.cost` makes it; beyond ``most`` operations the rest are one bar.
    """
    unit, factor = COLUMNS[column]
    sums = (costs.groupby("target")[column].sum() * factor).sort_values(ascending=False)
    sums = sums[sums > 0]
    shown = dict(sums.iloc[:most].items())
    if len(sums) > most:
        shown[f"{len(sums) - most} others"] = float(sums.iloc[most:].sum())
    whole = sum(shown.values()) or 1.0
    names = [_operation(n) for n in shown]
    values, unit = _readable([float(v) for v in shown.values()], unit)
    labels = [f"{_short(v)}  {_share(w / whole)}" for v, w in zip(values, shown.values(), strict=True)]
    return _bars("Cost by operation", names, values, labels, [BLUE] * len(shown), unit)


def before_after(totals: Iterable[tuple[str, float]], unit: str = "roofline us") -> Plot:
    """One total a step: what the whole graph costs after each step that changed it."""
    rows = list(totals)
    values, unit = _readable([v for _, v in rows], unit)
    labels = [_short(v) for v in values]
    colours = [SKY] * (len(rows) - 1) + [BLUE]
    return _bars("The whole graph's cost, step by step", [n for n, _ in rows], values, labels, colours, unit)


def roofline(
    costs: Any,
    device: Device | str | None = None,
    *,
    dtype: str = "bfloat16",
    peak_flops: float | None = None,
    bandwidth: float | None = None,
) -> Plot:
    """Where the operations lie under a device's roof, and how far below it where they were measured.

    ``costs`` is a DataFrame, one row an operation, with columns ``flops`` and ``bytes`` and, where present,
    ``category`` (or ``op``, ``target``) to colour by and ``measured_us``; ``Snapshot.cost`` and ``Profile.table`` make
    them. ``device`` is a :class:`Device`, the name of a known one, or left out where the table knows it; its peak is
    that of ``dtype``. ``peak_flops`` (FLOP/s) and ``bandwidth`` (bytes/s) go before the device's, which is then a
    name alone. The roof is min(peak, intensity x bandwidth) (Williams et al., CACM 2009). A dot's area is its
    share of the time; operations at one place (those of equal layers) are one dot. Raises ValueError for a
    device that is not known.
    """
    peak_flops, bandwidth, name = _roof(costs, device, dtype, peak_flops, bandwidth)
    figure, axes = _figure(7.2, 4.2, f"Roofline on {name}")
    rows = costs[(costs["flops"] > 0) & (costs["bytes"] > 0)]
    measured = "measured_us" in rows
    if measured:
        rows = rows[rows["measured_us"] > 0]
    by = next((c for c in ("category", "op", "target") if c in rows), None)
    ridge = peak_flops / bandwidth
    intensity = rows["flops"] / rows["bytes"]
    low = min([ridge / 100, *intensity]) / 2
    high = max([ridge * 20, *intensity]) * 2
    axes.plot([low, ridge, high], [low * bandwidth, peak_flops, peak_flops], color=INK, linewidth=1.6)
    axes.axvline(ridge, color=GRID, linestyle=":", linewidth=1)
    if measured:
        seconds = rows["measured_us"] * 1e-6
    else:
        seconds = (rows["flops"] / peak_flops).combine(rows["bytes"] / bandwidth, max)
    whole = float(seconds.sum()) or 1.0
    groups = list(rows.groupby(by, sort=False)) if by else [("operations", rows)]
    groups.sort(key=lambda g: -float(seconds[g[1].index].sum()))
    for k, (name, part) in enumerate(groups):
        x = part["flops"] / part["bytes"]
        y = part["flops"] / seconds[part.index]
        share = seconds[part.index] / whole
        label = f"{_operation(name)}  {_share(share.sum())}" if k < len(CYCLE) else "_hidden"
        dots = share.groupby([x, y], sort=False).sum()  # operations at one place are one dot
        axes.scatter(
            dots.index.get_level_values(0),
            dots.index.get_level_values(1),
            s=18 + 900 * dots.to_numpy(),
            color=CYCLE[k] if k < len(CYCLE) else INK,  # a colour in the legend is that operation's alone
            alpha=0.75,
            linewidths=0,
            label=label,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xlim(low, high)
    axes.set_xlabel("arithmetic intensity (FLOP/byte)", color=INK, fontsize=9)
    axes.set_ylabel("measured FLOP/s" if measured else "attainable FLOP/s", color=INK, fontsize=9)
    axes.grid(True, which="major", color=GRID, linewidth=0.5)
    axes.text(
        high, peak_flops * 1.12, f"{_si(peak_flops)}FLOP/s", ha="right", va="bottom", fontsize=8.5, color=INK
    )
    axes.text(
        ridge / 12,
        ridge / 12 * bandwidth * 1.6,
        f"{_si(bandwidth)}B/s",
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=INK,
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: _si(v)))
    legend = axes.legend(
        frameon=False, fontsize=8.5, loc="lower right", title="share of time", labelcolor=INK
    )
    legend.get_title().set(color=INK, fontsize=8.5)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set(sizes=[36])
    return figure


def _roof(
    costs: Any, device: Device | str | None, dtype: str, peak_flops: float | None, bandwidth: float | None
) -> tuple[float, float, str]:
    """(peak FLOP/s, bandwidth bytes/s, name)."""
    if peak_flops is not None and bandwidth is not None:
        return peak_flops, bandwidth, str(getattr(device, "name", device or "device"))
    device = costs.attrs.get("device") if device is None else device
    if device is None:
        raise ValueError("roofline() needs a device: a name such as 'H100 SXM', or a Device")
    known = device_named(device)
    peak = known.flops.get(dtype, known.flops["float32"])
    return peak_flops or peak, bandwidth or known.bandwidth, f"{known.name}, {dtype}"


def _legend(axes: Axes, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=c, label=name) for name, c in colours.items()]
    axes.legend(handles=handles, frameon=False, fontsize=8.5, loc="lower right", labelcolor=INK)


def _operation(name: Any) -> str:
    return str(name).removeprefix("adkit.").removeprefix("aten.")


def _share(part: float) -> str:
    return f"{part:.0%}" if part >= 0.005 or part == 0 else "<1%"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _si(value: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


__all__ = ["Plot", "before_after", "cost_by_op", "memory", "nodes_by_stage", "roofline", "time_by_pass"]
