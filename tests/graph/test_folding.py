"""Repeated layers are found by structure, and every node is in exactly one place."""

from __future__ import annotations

import pytest

from adkit.graph.folding import fold, layers_text
from tests.graph import toys
from tests.graph.samples import sample, snapshot


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])
def test_every_node_is_in_exactly_one_segment(kind: str) -> None:
    graph = snapshot(kind)
    folding = fold(graph)
    placed = [i for s in folding for i in s.nodes]
    placed += [i for s in folding for b in s.blocks for i in (*b.nodes, *b.leaves)]
    assert sorted(placed) == sorted(graph.by_id)
    assert set(folding.representative) == set(graph.by_id)


def test_equal_layers_are_one_variant() -> None:
    (loop,) = [s for s in fold(snapshot("llama")) if s.variants]
    assert loop.layers == (0, 1, 2, 3)
    assert len(loop.variants) == 1
    assert len({len(b.leaves) for b in loop.blocks}) == 1


def test_sliding_and_full_layers_are_two_variants_of_one_loop() -> None:
    (loop,) = [s for s in fold(snapshot("gemma2")) if s.variants]
    assert [v.layers for v in loop.variants] == [(0, 2), (1, 3)]


def test_alternation_is_found_in_a_toy() -> None:
    (loop,) = [s for s in fold(toys.alternating()) if s.variants]
    assert [v.layers for v in loop.variants] == [(0, 2, 4), (1, 3, 5)]


def test_a_representative_stands_for_the_same_place_in_every_layer() -> None:
    graph = snapshot("llama")
    folding = fold(graph)
    attention = graph.find("torch_attention")
    assert {folding.representative[n.id] for n in attention} == {attention[0].id}
    weights = graph.find("q_proj.weight")
    assert folding.same[weights[0].id] == tuple(n.id for n in weights)


def test_caches_of_their_own_do_not_keep_layers_apart() -> None:
    (loop,) = [s for s in fold(toys.cached()) if s.variants]
    assert len(loop.variants) == 1
    assert all(len(b.leaves) == 2 for b in loop.blocks)


def test_carried_values_are_those_the_next_layer_reads() -> None:
    graph = toys.two_carries(3)
    (loop,) = [s for s in fold(graph) if s.variants]
    assert len(loop.carries) == 2
    for reads in loop.carries:
        assert [graph[i].layer for i in reads] == [None, 0, 1]


def test_a_layer_that_differs_is_on_its_own() -> None:
    steps = sample("llama")
    graph = steps["match_rmsnorm_pattern"].after
    assert [v.layers for s in fold(graph) for v in s.variants] == [(0, 1, 2, 3)]
    differs = [n for n in snapshot("qwen3_moe") if n.layer == 0]
    assert differs
    assert fold(snapshot("qwen3_moe")).layers.keys() == {0, 1, 2, 3}


def test_layers_as_text() -> None:
    assert layers_text((3,)) == "layer 3"
    assert layers_text(tuple(range(32))) == "layers 0-31"
    assert layers_text((0, 2, 4)) == "layers 0, 2, 4"
    assert layers_text(tuple(range(1, 26, 2))) == "layers 1, 3, 5, ... 25"
