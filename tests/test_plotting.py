"""Figures of a Workbench's walk."""

from __future__ import annotations

import pytest

from adkit.contract import AdkitError, ConfigError


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


def test_a_figure_of_an_earlier_step(exported):
    wb = exported().run()
    total = wb.steps["match_linear"].after.cost(batch=1, seq=2048, logits=1).attrs["total"]
    bars = wb.plots.cost("bytes", "match_linear").axes[0].patches
    assert sum(bar.get_width() for bar in bars) == pytest.approx(total.bytes * 1e-6)
    assert repr(wb.plots).splitlines()[0] == "wb.plots.nodes()         Nodes in the graph after each stage."


def test_what_cannot_be_drawn_is_told(exported):
    wb = exported().run("post_export")
    with pytest.raises(ConfigError, match="no cost 'time'; expected seconds, flops, bytes"):
        wb.plots.cost("time")
    with pytest.raises(ConfigError, match="no device is called 'abacus'"):
        wb.plots.roofline(device="abacus")
    with pytest.raises(ConfigError, match="size 'tokens_of_mine'"):
        wb.plots.cost(tokens_of_mine=3)
    with pytest.raises(AdkitError, match="step 'match_linear' left no graph"):
        wb.plots.roofline("match_linear")


def test_without_a_graph_costs_are_refused():
    import adkit

    with pytest.raises(AdkitError, match="no graph yet"):
        adkit.Workbench("demo", device="cpu", progress=False).plots.before_after()
