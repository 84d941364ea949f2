"""Figures of a world of ranks, from plain data."""

from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from adkit.graph.placement import PARTIAL, PlanRow, ShardingPlan
from adkit.viz.mesh import Slice, Tensor, comm_by_layer, memory_by_rank, mesh, scaling
from adkit.viz.plots import CYCLE, GRID


def rectangles(figure):
    return [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]


def told(figure):
    return [t.get_text() for t in figure.axes[0].texts]


def test_slices_tile_their_tensor_in_the_colours_of_their_ranks():
    halves = tuple(Slice((r,), {0: ((4 * r, 4 * r + 4),)}) for r in range(2))
    figure = mesh([Tensor("q_proj", (8, 6), halves, "colwise")], 2, "who")
    upper, lower = rectangles(figure)
    assert [to_hex(r.get_facecolor()) for r in (upper, lower)] == [CYCLE[0], CYCLE[1]]
    assert upper.get_height() == pytest.approx(lower.get_height())
    assert upper.get_y() == pytest.approx(lower.get_y() + lower.get_height())  # dim 0 goes downwards
    assert upper.get_width() == lower.get_width()
    assert told(figure) == ["q_proj", "[8, 6]  colwise", "0", "1"]


def test_copies_tell_all_their_ranks_and_what_all_have_is_grey():
    pairs = tuple(Slice((2 * k, 2 * k + 1), {0: ((3 * k, 3 * k + 3),)}) for k in range(2))
    every = (Slice((0, 1, 2, 3), {}),)
    figure = mesh([Tensor("k_proj", (6, 4), pairs), Tensor("norm", (4,), every)], 4, "who")
    assert told(figure)[2:4] == ["0,1", "2,3"]
    assert told(figure)[-1] == "all"
    assert to_hex(rectangles(figure)[-1].get_facecolor(), keep_alpha=True) == GRID


def test_a_slice_of_several_blocks_is_several_rectangles():
    fused = tuple(Slice((r,), {0: ((2 * r, 2 * r + 2), (4 + r, 5 + r))}) for r in range(2))
    assert len(rectangles(mesh([Tensor("qkv", (6, 4), fused)], 2, "who"))) == 4


def test_experts_go_from_left_to_right():
    cuts = tuple(
        Slice((2 * e + f,), {0: ((4 * e, 4 * e + 4),), 1: ((8 * f, 8 * f + 8),)})
        for e in range(2)
        for f in range(2)
    )
    found = rectangles(mesh([Tensor("experts.up", (8, 16, 32), cuts)], 4, "who"))
    assert found[0].get_x() == found[1].get_x() < found[2].get_x()
    assert found[0].get_y() > found[1].get_y()


def test_memory_is_stacked_beside_the_limits_that_matter():
    ranks = [{"mlp": 6e9, "attention": 2e9}, {"mlp": 5e9}]
    figure = memory_by_rank(ranks, 12e9, {"near": 10e9, "far": 900e9})
    assert [b.get_width() for b in figure.axes[0].patches] == pytest.approx([6, 5, 2, 0])
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [6, 10]
    assert figure._repr_mimebundle_()["image/svg+xml"].startswith("<svg")


def test_time_of_exchanges_is_latency_and_bytes():
    figure = comm_by_layer([("embedding", 2e3, 8.0, 1.0), ("each of 6 layers", 4e3, 16.0, 2.0)], "talk")
    assert [b.get_width() for b in figure.axes[0].patches] == [8, 16, 1, 2]
    assert told(figure) == ["9 us, 2 kB", "18 us, 4 kB"]


def test_scaling_beside_the_ideal_line_leaves_out_what_cannot_be():
    table = pd.DataFrame(
        {"tokens/s (b1)": [10.0, 18.0, None], "tokens/s (b32)": [100.0, 150.0, None]}, index=[1, 2, 3]
    )
    lines = {line.get_label(): list(line.get_ydata()) for line in scaling(table, "speed").axes[0].lines}
    assert lines["batch 1"] == [10, 18]
    assert lines["batch 32"] == [100, 150]
    ideal = [list(line.get_ydata()) for line in scaling(table, "speed").axes[0].lines[::2]]
    assert ideal[:2] == [[10, 20], [100, 200]]


def test_a_plan_shows_rows_alike_once():
    def row(k: int) -> PlanRow:
        where = f"model.layers.{k}.mlp.down_proj"
        return PlanRow(
            k, f"n{k}", where, "linear", "rowwise", dim=1, reduce=True, placement=PARTIAL, why="a < b"
        )

    html = ShardingPlan(tuple(row(k) for k in range(3)), tp=2)._repr_mimebundle_()["text/html"]
    assert html.count("model.layers.*.mlp.down_proj") == 1
    assert "×3" in html
    assert "a &lt; b" in html
