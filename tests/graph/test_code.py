"""The program view: every node once, valid Python, stable where nothing changed."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from adkit.graph.code import lines
from tests.graph import toys
from tests.graph.samples import sample, snapshot

KINDS = ["llama", "gemma2", "qwen3_moe"]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_call_input_and_output_is_on_one_line(kind: str, fold: bool) -> None:
    graph = snapshot(kind)
    shown = Counter(i for line in lines(graph, fold=fold) for i in line.ids)
    wanted = [n.id for n in graph if n.op != "get_attr"]
    assert {i: shown[i] for i in wanted} == dict.fromkeys(wanted, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_python_whose_names_are_defined_before_use(kind: str) -> None:
    for options in ({}, {"fold": False}, {"layer": 1}, {"types": False}):
        tree = ast.parse(snapshot(kind).code(**options))
        (function,) = tree.body
        assert isinstance(function, ast.FunctionDef)
        known = {a.arg for a in function.args.args}
        undefined = set()
        for node in ast.walk(function):  # names bound anywhere in the function
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                known.add(node.func.id)
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in known:
                undefined.add(node.id)
        assert undefined <= {"float32", "int32", "range", "transformers", "END"}


def test_no_name_is_given_twice_to_different_values() -> None:
    tree = ast.parse(snapshot("llama").code(fold=False))
    stored = Counter(n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    assert max(stored.values()) == 1


def test_layers_fold_to_one_loop_with_shapes_and_symbols() -> None:
    text = snapshot("llama").code()
    assert "for i in range(4):  # 4 layers" in text
    assert "q_proj = linear(input_layernorm, layer.self_attn.q_proj.weight)  # [B, S, 64] f32" in text
    assert "hidden = embed_tokens\n" in text
    assert "layers[1]" not in text


def test_variants_share_a_loop() -> None:
    text = toys.alternating().code()
    assert "if i in range(0, 5, 2):" in text
    assert "else:  # layers 1, 3, 5" in text


def test_own_caches_are_indexed_by_layer() -> None:
    text = toys.cached().code()
    assert "    k_cache,  # 3 x [4, 8] f32" in text
    assert "+ k_cache[i]" in text


def test_a_toy_loop_computes_what_the_graph_computes() -> None:
    import torch

    graph = toys.two_carries(4)
    source = graph.code(types=False)
    names = {"neg": torch.neg, "abs": torch.abs}
    names |= {"range": range}
    exec(source, names)
    x, r = torch.tensor([0.3, -1.2]), torch.tensor([2.0, 0.5])
    (out,) = names["forward"](None, x, r)
    a, b = -x, r.abs()
    for _ in range(4):
        a, b = a * b, a + b
    assert torch.equal(out, a + b)


def test_one_layer_reads_as_a_function() -> None:
    text = snapshot("llama").code(layer=2)
    assert text.startswith("def layer_2(")
    assert "self.model.layers[2].self_attn.q_proj.weight" in text
    with pytest.raises(KeyError, match=r"no layer 9 in this graph, which has layers 0 to 3"):
        snapshot("llama").code(layer=9)


def test_a_fused_norm_leaves_the_lines_around_it_alone() -> None:
    diff = sample("llama")["match_rmsnorm_pattern"].text_diff(context=0)
    added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(added) == 3
    assert all("torch_rmsnorm(" in line for line in added)


def test_text_is_the_same_each_time() -> None:
    from adkit.graph.code import render

    graph = snapshot("gemma2")
    assert render(graph) == render(graph)
