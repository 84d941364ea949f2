"""Figures of a Workbench's walk."""

from __future__ import annotations

import pytest

from adkit.contract import AdkitError


def test_every_figure_shows_itself(exported):
    wb = exported().run()
    for figure in (wb.plots.nodes(), wb.plots.time(), wb.plots.memory(), wb.plots.roofline()):
        assert figure._repr_mimebundle_()["image/svg+xml"].startswith("<svg")
    total = wb.graph.cost(tokens=2048, context=2048).attrs["total"]
    widths = sum(bar.get_width() for bar in wb.plots.cost("flops").axes[0].patches)
    assert widths == pytest.approx(total.flops * 1e-9)
    bars = [bar.get_width() for bar in wb.plots.before_after().axes[0].patches]
    assert len(bars) == sum(s.changed for s in wb.steps)
    assert bars[-1] == pytest.approx(total.seconds * 1e6)
    assert bars[-1] < bars[0]  # fewer kernels move fewer bytes


def test_without_a_graph_costs_are_refused():
    import adkit

    with pytest.raises(AdkitError, match="no graph yet"):
        adkit.Workbench("demo", device="cpu", progress=False).plots.before_after()
