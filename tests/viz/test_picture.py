"""Pictures as data and as drawings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from adkit.viz import diff, dot
from adkit.viz.category import COLOURS, category_of
from adkit.viz.dot import Drawing, draw, draw_rewrite
from adkit.viz.picture import MOST_NODES, PictureTooLarge
from tests.graph import toys
from tests.graph.samples import sample, snapshot

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz's dot is not installed")


def test_layers_fold_to_one_cluster_that_says_how_many() -> None:
    picture = draw(snapshot("llama")).picture
    assert picture.clusters[("layer0",)] == "layers 0-3   ×4"
    assert sum(b.title == "torch_attention" for b in picture.boxes) == 1
    assert sum(b.title == "torch_attention" for b in draw(snapshot("llama"), fold=False).picture.boxes) == 4


def test_every_arrow_joins_two_boxes() -> None:
    for options in ({}, {"fold": False}, {"layer": 2}, {"depth": 0}, {"depth": 1}):
        picture = draw(snapshot("gemma2"), **options).picture
        keys = [b.key for b in picture.boxes]
        assert len(keys) == len(set(keys))
        assert all(a.tail in keys and a.head in keys for a in picture.arrows)


def test_times_are_summed_over_what_a_box_stands_for() -> None:
    graph = snapshot("llama")
    times = {n.id: 2.0 if "attention" in n.target_name else 0.5 for n in graph if n.op == "call_function"}
    whole = sum(times.values())
    picture = draw(graph, times=times).picture
    attention = next(b for b in picture.boxes if b.title == "torch_attention")
    assert attention.detail[0] == f"8 s  {8 / whole:.1%}"  # four layers
    assert attention.heat == 1.0
    for b in picture.boxes:
        if b.category == "linear" and b.cluster:
            assert b.heat == 4 * 0.5 / 8
            assert b.detail[0].startswith("2 s ")
    one = draw(graph, layer=2, times=times).picture
    assert next(b for b in one.boxes if b.title == "torch_attention").detail[0] == f"2 s  {2 / whole:.1%}"
    modules = draw(graph, depth=0, times=times).picture
    inside = sum(s for i, s in times.items() if ".self_attn" in graph[i].module_path)
    assert next(b for b in modules.boxes if b.title == "self_attn").detail[0].startswith(f"{inside:.3g} s ")
    assert all(b.heat is None for b in draw(graph).picture.boxes)


def test_heat_gets_darker_and_never_too_dark_to_read() -> None:
    steps = [dot.heat_colour(k / 10) for k in range(11)]
    light = [0.2126 * int(c[1:3], 16) + 0.7152 * int(c[3:5], 16) + 0.0722 * int(c[5:7], 16) for c in steps]
    assert light == sorted(light, reverse=True)
    assert light[-1] > 130
    assert dot.heat_colour(-1) == steps[0]
    assert dot.heat_colour(2) == steps[-1]


def test_depth_collapses_modules() -> None:
    picture = draw(snapshot("llama"), depth=0).picture
    assert {"self_attn", "mlp", "input_layernorm"} <= {b.title for b in picture.boxes}
    assert next(b for b in picture.boxes if b.title == "self_attn").category == "attention"


def test_a_picture_too_large_is_refused_with_a_hint() -> None:
    graph = toys.alternating(MOST_NODES)
    with pytest.raises(PictureTooLarge, match=r"802 nodes.*fold=True"):
        draw(graph, fold=False)
    assert len(draw(graph).picture.boxes) < 10


def test_a_missing_layer_is_told() -> None:
    with pytest.raises(KeyError, match="no layer 7"):
        draw(snapshot("llama"), layer=7)


def test_highlighting_a_folded_node_lights_its_representative() -> None:
    graph = snapshot("llama")
    last = graph.find("torch_attention")[-1]
    boxes = draw(graph, highlight=[last.id]).picture.boxes
    assert [b.title for b in boxes if b.highlight] == ["torch_attention"]


def test_tooltips_lead_to_the_source_line() -> None:
    boxes = draw(snapshot("llama")).picture.boxes
    assert "from modeling_llama.py:" in next(b for b in boxes if b.title == "rsqrt").tooltip


def test_categories_have_colours_and_name_the_work() -> None:
    found = {n.target_name: category_of(n) for n in sample("llama")["match_swiglu_pattern"].after}
    assert set(found.values()) <= set(COLOURS)
    assert found["adkit.torch_attention"] == "attention"
    assert found["adkit.torch_rmsnorm"] == "norm"
    assert found["adkit.torch_swiglu"] == "mlp"
    assert found["aten.linear"] == "linear"


class _Wide(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(torch.sigmoid(x).to(self.dtype)).float()


def test_a_rewrite_that_brings_a_dtype_says_dtypes() -> None:
    half, double = (
        torch.export.export(_Wide(d), (torch.ones(2, 3),)) for d in (torch.float16, torch.float64)
    )
    labels = [
        {a.label for r in found.rewrites for a in draw_rewrite(found, r).picture.arrows} - {""}
        for found in (diff(half, double), diff(half, half))
    ]
    assert labels[0] == {"[2, 3] f32", "[2, 3] f16", "[2, 3] f64"}
    assert labels[1] == set()
    step = sample("llama")["match_rmsnorm_pattern"]  # which brings none
    assert {a.label for a in draw_rewrite(step).picture.arrows} == {"", "[B, S, 64]", "[B, S, 1]"}


def test_a_rewrite_shows_erased_and_created_nodes_between_their_neighbours() -> None:
    step = sample("llama")["match_rmsnorm_pattern"]
    boxes = draw_rewrite(step, step.rewrites[0]).picture.boxes
    marks = [(b.cluster[0], b.mark) for b in boxes]
    assert marks.count(("before", "erased")) == 7
    assert marks.count(("after", "created")) == 1
    assert ("before", "context") in marks
    assert ("after", "context") in marks
    made = next(b for b in boxes if b.mark == "created")
    assert made.tooltip.count("from modeling_llama.py:") == 3


def test_without_dot_there_is_text_and_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dot, "_pipe", lambda source, kind: None)
    drawing = draw(snapshot("llama"), depth=0)
    bundle = drawing._repr_mimebundle_()
    assert set(bundle) == {"text/plain"}
    assert "apt-get install graphviz" in bundle["text/plain"]
    assert "self_attn" in bundle["text/plain"]
    with pytest.raises(RuntimeError, match="apt-get install graphviz"):
        drawing.save("nowhere.png")


def test_source_is_the_same_each_time_and_quotes_what_it_must() -> None:
    assert draw(snapshot("llama")).source == draw(snapshot("llama")).source
    picture = draw(snapshot("llama"), depth=0).picture
    picture.boxes[0].title = 'a <b> & "c"'
    assert "a &lt;b&gt; &amp; &quot;c&quot;" in Drawing(picture).source


@needs_dot
def test_saves_by_extension(tmp_path: Path) -> None:
    drawing = draw(snapshot("llama"), depth=0)
    heads = {"svg": b"<svg", "png": b"\x89PNG", "pdf": b"%PDF", "dot": b"digraph"}
    for kind, head in heads.items():
        assert drawing.save(tmp_path / f"g.{kind}").read_bytes().startswith(head)
    with pytest.raises(ValueError, match=r"must be \.svg"):
        drawing.save(tmp_path / "g.jpg")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"g.{k}" for k in heads)


@needs_dot
def test_svg_is_one_element_with_tooltips_and_no_ids() -> None:
    import xml.etree.ElementTree as tree

    svg = draw(snapshot("llama")).svg
    assert svg is not None
    root = tree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "modeling_llama.py" in svg
    assert not [e for e in root.iter() if "id" in e.attrib]
