"""Figures of a Workbench's walk, static and clean: ``wb.plots``. How they look is :mod:`adkit.viz.plots`' matter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adkit.contract import AdkitError, ConfigError
from adkit.graph.cost import Device
from adkit.graph.snapshot import Snapshot
from adkit.viz import plots
from adkit.viz.plots import Plot

if TYPE_CHECKING:
    from adkit.workbench import Workbench

#: Tokens of the prompt that costs are counted for unless sizes are given.
CONTEXT = 2048


class Plots:
    """Figures of ``wb`` as it stands; each is a matplotlib Figure that shows itself."""

    def __init__(self, wb: Workbench) -> None:
        self._wb = wb

    def nodes(self) -> Plot:
        """Nodes in the graph after each stage."""
        return plots.nodes_by_stage(self._wb.steps)

    def time(self) -> Plot:
        """Seconds a pass."""
        return plots.time_by_pass(self._wb.steps)

    def memory(self) -> Plot:
        """Tensor memory on the device after each step that changed it, in GiB; a CPU's is not measured."""
        return plots.memory(self._wb.steps)

    def cost(
        self,
        column: str = "seconds",
        step: str | int | None = None,
        device: Device | str = "H100 SXM",
        **sizes: int,
    ) -> Plot:
        """What each operation costs: ``seconds`` (roofline), ``flops`` or ``bytes``.

        Of the graph after ``step``, or as it stands. ``sizes`` as :meth:`Snapshot.cost` takes; by default one
        prompt of 2,048 tokens (``batch``, ``seq``), which a packed graph takes as tokens.
        """
        if column not in plots.COLUMNS:
            raise ConfigError(f"no cost {column!r}; expected {', '.join(plots.COLUMNS)}")
        return plots.cost_by_op(self._costs(self._after(step), device, sizes), column)

    def roofline(
        self, step: str | int | None = None, device: Device | str = "H100 SXM", **sizes: int
    ) -> Plot:
        """Where the operations lie under the roof, after ``step`` or as the graph stands."""
        dtype = str(self._wb.factory.dtype).removeprefix("torch.")
        return plots.roofline(self._costs(self._after(step), device, sizes), device, dtype=dtype)

    def before_after(self, device: Device | str = "H100 SXM", **sizes: int) -> Plot:
        """Roofline time of the whole graph after each step that changed it."""
        totals = []
        for s in self._wb.steps:
            if s.changed and len(s.after):
                total = self._costs(s.after, device, sizes).attrs["total"]
                totals.append((s.name, total.seconds * 1e6))
        if not totals:
            raise AdkitError("there is no graph yet to count; run through export_to_gm first")
        return plots.before_after(totals)

    def _after(self, step: str | int | None) -> Snapshot:
        snapshot = self._wb.graph if step is None else self._wb.steps[step].after
        if not len(snapshot):
            where = (
                "there is no graph yet"
                if step is None
                else f"step {self._wb.steps[step].name!r} left no graph"
            )
            raise AdkitError(f"{where} to count; run through export_to_gm first")
        return snapshot

    def _costs(self, snapshot: Snapshot, device: Device | str, sizes: Mapping[str, int]) -> Any:
        sizes = dict(sizes)
        batch, seq = sizes.pop("batch", 1), sizes.pop("seq", CONTEXT)
        if any(n.target == "page_table" for n in snapshot if n.op == "placeholder"):
            given = {"tokens": batch * seq, "sequences": batch, "context": seq}
        else:
            given = {"batch": batch, "seq": seq, "logits": batch}
        try:
            return snapshot.cost(device, **{**given, **sizes})
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def __repr__(self) -> str:
        rows = []
        for name, method in vars(type(self)).items():
            if not name.startswith("_"):
                told = (inspect.getdoc(method) or "").splitlines()[0].replace("``", "")
                rows.append(f"wb.plots.{name + '()':<15} {told}")
        return "\n".join(rows)


__all__ = ["Plots"]
