"""Graphs that never saw adkit: shown, matched, compared."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx import Graph, GraphModule, symbolic_trace
from traitlets import TraitError

from adkit.viz import RecordError, diff, draw, show
from adkit.viz.anygraph import BEST_EFFORT, match, snapshot_of
from adkit.viz.record.read import graph_rows, parse_record
from adkit.viz.static import walk_svg
from adkit.viz.static_map import Looked
from tests.graph.samples import sample


class Net(nn.Module):
    def __init__(self, act: str = "relu") -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 4), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(getattr(nn.functional, self.act)(self.a(x))) + x


@pytest.mark.parametrize("make", [symbolic_trace, lambda m: torch.export.export(m, (torch.zeros(2, 4),))])
def test_one_function_swapped_is_one_site(make) -> None:
    found = diff(make(Net()), make(Net("gelu")))
    (rewrite,) = found.rewrites
    assert "relu" in rewrite.before[0]
    assert "gelu" in rewrite.after[0]
    assert len(found.created) == len(found.erased) == 1
    assert "best effort" in repr(found)


def test_a_graph_is_equal_to_itself_and_left_as_it_was() -> None:
    gm = symbolic_trace(Net())
    before = [(n.name, dict(n.meta)) for n in gm.graph.nodes]
    assert diff(gm, gm).empty
    assert [(n.name, dict(n.meta)) for n in gm.graph.nodes] == before


def test_parameters_of_an_exported_program_are_shown_by_name() -> None:
    s = snapshot_of(torch.export.export(Net(), (torch.zeros(2, 4),)))
    assert {n.target for n in s if n.op == "get_attr"} == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_a_node_without_a_place_of_its_own_stands_where_its_predecessor_stood() -> None:
    gm = torch.export.export(Net(), (torch.zeros(2, 4),)).module()
    old = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    before = snapshot_of(gm)
    with gm.graph.inserting_after(old):  # as subgraph_rewriter does: no metadata
        new = gm.graph.call_function(torch.ops.aten.addmm.default, (old.args[2], old.args[0], old.args[1]))
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)
    (rewrite,) = diff(before, gm).rewrites
    assert (rewrite.before, rewrite.after) == (("aten.linear",), ("aten.addmm",))
    assert rewrite.sites[0].module_path == "a"


def test_matching_agrees_with_the_identity_that_a_walk_recorded() -> None:
    steps = sample("llama")
    before, after = steps["match_rmsnorm_pattern"].before, steps["match_rmsnorm_pattern"].after
    found = match(before, after)
    same = {n.id for n in before} & {n.id for n in after}
    wrong = [j for j, i in found.items() if i != j]
    assert not [j for j in wrong if j in same]
    assert len([j for j in found if j in same]) == len(same)


def test_the_viewer_opens_on_any_graph_and_says_what_matching_is() -> None:
    gm = symbolic_trace(Net())
    assert show(gm).data.steps[0].after == 0
    opened = diff(gm, symbolic_trace(Net("gelu"))).explore()
    assert opened.data.note == BEST_EFFORT
    assert opened.mode == "compare"


def test_fx_nodes_are_told_to_the_explorer_as_they_are() -> None:
    one, two = symbolic_trace(Net()), symbolic_trace(Net("gelu"))
    nodes = list(one.graph.nodes)
    explorer = show(one)
    explorer.selection = nodes[2]
    assert explorer.selection == [2]
    assert explorer.goto(0, [nodes[1], "relu", 0]).selection == [1, [n.name for n in nodes].index("relu"), 0]
    with pytest.raises(TraitError, match="no FX node 'gelu' here: this explorer shows other nodes"):
        explorer.selection = [next(n for n in two.graph.nodes if n.name == "gelu")]
    with pytest.raises(TraitError, match="no node 'relu_9' after step 'graph'; did you mean 'relu'"):
        explorer.goto(0, "relu_9")
    found = diff(one, two)
    gelu = next(n for n in two.graph.nodes if n.name == "gelu")
    assert found.explore().goto(1, [gelu]).selection == list(found.created)
    exported = torch.export.export(Net(), (torch.zeros(2, 4),))
    assert show(exported).goto(0, list(exported.graph.nodes)[-1]).selection == [len(exported.graph.nodes) - 1]


def test_values_are_laid_over_fx_nodes_names_and_ids() -> None:
    gm = symbolic_trace(Net())
    nodes = {n.name: n for n in gm.graph.nodes}
    explorer = show(gm).add_overlay("mine", {nodes["a"]: 1.0, "relu": 2.0, 3: 3.0})
    (made,) = explorer.data.overlays
    assert (made.ids, made.values) == (
        [list(nodes).index("a"), list(nodes).index("relu"), 3],
        [1.0, 2.0, 3.0],
    )
    with pytest.raises(
        RecordError, match="overlay 'x': no node 'rel' after step 'graph'; did you mean 'relu'"
    ):
        explorer.add_overlay("x", {"rel": 1.0})
    with pytest.raises(RecordError, match="overlay 'x': no FX node 'a' here"):
        explorer.add_overlay("x", {next(n for n in symbolic_trace(Net()).graph.nodes if n.name == "a"): 1.0})
    with pytest.raises(RecordError, match=r"overlay 'x' has the key 1.5; .* add_overlay takes names"):
        explorer.add_overlay("x", {1.5: 1.0})
    assert explorer.data.overlays == [made]


def test_an_explorer_does_not_keep_the_module() -> None:
    gm = symbolic_trace(Net())
    explorer, alive = show(gm), weakref.ref(gm)
    del gm
    gc.collect()
    assert alive() is None
    assert explorer.goto(0, "relu").selection


class Parts(nn.Module):
    """Modules called as such once traced, a width, and a constant in a branch."""

    def __init__(self, act: type[nn.Module] = nn.ReLU, width: int = 8, step: int = 1) -> None:
        super().__init__()
        self.layers, self.step = nn.Sequential(nn.Linear(4, width), act(), nn.Linear(width, 4)), step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + self.step


class Branches(Parts):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + self.step, lambda x: x - 1, (x,))


def _exported(module: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(module, (torch.zeros(2, 4),))


def test_modules_that_are_called_are_told_by_what_they_are() -> None:
    (rewrite,) = diff(symbolic_trace(Parts()), symbolic_trace(Parts(nn.GELU))).rewrites
    assert (rewrite.before, rewrite.after) == (
        ("call_module ReLU()",),
        ("call_module GELU(approximate='none')",),
    )
    assert rewrite.sites[0].module_path == "layers.1"
    wider = diff(symbolic_trace(Parts()), symbolic_trace(Parts(width=16)))
    assert len(wider.created) == len(wider.erased) == 2
    assert diff(symbolic_trace(Parts()), symbolic_trace(Parts())).empty


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * 2


class Rescaled(nn.Module):
    """Of its calls the first is Scaled's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 3


@pytest.mark.parametrize(
    ("trace", "old", "new"),
    [
        (symbolic_trace, nn.ReLU, nn.GELU),
        (lambda m: torch.export.export(m, (torch.zeros(2, 4),)), Scaled, Rescaled),
    ],
)
def test_a_module_is_of_the_class_that_it_has_in_the_graph_looked_at(trace, old, new) -> None:
    record = diff(trace(Parts(old)), trace(Parts(new))).record()
    kinds = []
    for rows in graph_rows(record):
        at = {record.rows.module[r] for r in rows}
        here = [m for m in at if record.texts[record.modules.path[m]] == "layers.1"]
        kinds.append([record.texts[record.modules.type[m]] for m in here])
    assert kinds == [[old.__name__], [new.__name__]]
    assert parse_record(record.model_dump_json().encode()) == record
    for step, kind in enumerate((old, new)):
        assert f"1: {kind.__name__}<" in walk_svg(record, Looked(step))


def test_graphs_within_a_graph_are_compared() -> None:
    assert diff(_exported(Branches()), _exported(Branches())).empty
    (rewrite,) = diff(_exported(Branches()), _exported(Branches(step=2))).rewrites
    assert "true_graph_0" in rewrite.before[0]


def test_other_shapes_are_a_difference_and_shown_as_they_are() -> None:
    found = diff(_exported(Parts()), _exported(Parts(width=16)))
    assert not found.empty
    assert "nothing changed" not in repr(found)
    assert "[8, 4] float32 -> [16, 4] float32" in repr(found)
    changed = {found.after[i].name for i in found.reshaped}
    assert {"linear", "relu"} <= changed
    assert "add" not in changed
    values = found.record().values
    assert {"[2, 8] f32", "[2, 16] f32"} <= {v.text for v in values}
    # Open sizes are named anew by each export.
    sized = [
        torch.export.export(Parts(), (torch.zeros(n, 4),), dynamic_shapes=({0: torch.export.Dim("b")},))
        for n in (2, 3)
    ]
    assert diff(*sized).empty


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(TypeError, match="GraphModule or an ExportedProgram"):
        show(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="GraphModule or an ExportedProgram"):
        draw(nn.Linear(1, 1))  # type: ignore[arg-type]


def test_any_graph_is_drawn_with_the_kinds_of_work_it_does() -> None:
    traced = draw(symbolic_trace(Parts())).picture
    assert "linear" in {b.category for b in traced.boxes}
    assert "shape" not in {b.category for b in traced.boxes}
    assert "relu" in draw(_exported(Parts())).text


_OPS = (torch.relu, torch.neg, torch.abs, torch.add)


def _graph(plan: list[tuple[int, int]]) -> GraphModule:
    graph = Graph()
    made = [graph.placeholder("x")]
    for op, source in plan:
        x = made[source % len(made)]
        made.append(graph.call_function(_OPS[op], (x, made[-1]) if _OPS[op] is torch.add else (x,)))
    graph.output(made[-1])
    return GraphModule(nn.Module(), graph)


plans = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=12)


@given(plans, plans)
def test_a_difference_of_any_two_graphs_adds_up(
    one: list[tuple[int, int]], two: list[tuple[int, int]]
) -> None:
    a, b = _graph(one), _graph(two)
    found = diff(a, b)
    assert (
        len(found.before) - len(found.erased) + len(found.created) == len(found.after) == len(b.graph.nodes)
    )
    kept = {n.id for n in found.before} & {n.id for n in found.after}
    for i in kept:
        assert found.before[i].op == found.after[i].op
        if i not in found.changed:
            assert found.before[i].target == found.after[i].target
    assert [str(n.target_name) for n in found.after] == [str(n.target_name) for n in snapshot_of(b)]
    assert diff(a, a).empty
