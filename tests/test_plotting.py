"""Figures of a Workbench's walk."""

from __future__ import annotations

import pandas as pd
import pytest

from adkit.contract import AdkitError, ConfigError
from adkit.graph.step import Step
from adkit.viz.plots import before_after, memory, roofline, time_by_pass


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


def test_memory_is_told_after_each_step_that_changed_it():
    def step(name: str, count: int) -> Step:
        return Step(name, "weight_load", {}, "", "done", memory_bytes=count)

    figure = memory(
        [step("load", 3 * 2**30), step("look", 500), step("fuse", -(2**30)), step("cache", 2**32)]
    )
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["load", "fuse", "cache"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([3, 2, 6], abs=1e-6)
    assert "(-1)" in figure.svg()
    assert "or the device is a CPU" in memory([step("load", 0)]).svg()


def test_large_costs_are_told_in_large_units():
    figure = before_after([("a", 2.5e7), ("b", 2e6)])
    assert [bar.get_width() for bar in figure.axes[0].patches] == [25.0, 2.0]
    assert figure.axes[0].get_xlabel() == "roofline s"
    assert before_after([("a", 9_999.0)]).axes[0].get_xlabel() == "roofline us"


def test_passes_that_took_no_time_are_one_bar():
    steps = [
        Step(n, "export", {}, "", "done", seconds=t) for n, t in (("slow", 2.0), ("x", 1e-4), ("y", 2e-4))
    ]
    axes = time_by_pass(steps).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["slow", "2 others"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([2.0, 3e-4])


def test_equal_operations_are_one_dot_of_their_shares():
    costs = pd.DataFrame(
        {"target": ["adkit.mm"] * 3 + ["add"], "flops": [8.0] * 3 + [1.0], "bytes": [2.0] * 3 + [8.0]}
    )
    axes = roofline(costs, peak_flops=100.0, bandwidth=1.0).axes[0]
    dots = {c.get_label(): c for c in axes.collections}
    assert list(dots) == ["add  57%", "mm  43%"]
    assert [len(c.get_offsets()) for c in dots.values()] == [1, 1]
    assert dots["mm  43%"].get_sizes() == pytest.approx(18 + 900 * 6 / 14)


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
