"""Norms, rotary embeddings, gates and linears of real Hugging Face models, counted exactly and compared in
numbers."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule, Node

from tests.passes.graphs import check_values, count, logits, rmse_ratio, run_pass, tiny_graph

MATCHERS = (
    "match_rope_pattern",
    "match_rmsnorm_pattern",
    "match_l2norm_pattern",
    "match_rope_layout",
    "eliminate_redundant_transposes",
    "match_swiglu_pattern",
    "match_linear",
)
HALF, INTERLEAVED, COMPLEX = "explicit_cos_sin", "qk_interleaving", "complex_freqs"

# two layers each: RMS norms, RoPE'd pairs and their form, gated activations, linear layers
EXPECTED = {
    "llama": (5, 2, HALF, 2, 15),
    "mistral": (5, 2, HALF, 2, 15),
    "qwen2": (5, 2, HALF, 2, 15),
    "qwen3": (9, 2, HALF, 2, 15),
    "gemma": (5, 2, HALF, 2, 15),
    "gemma2": (9, 2, HALF, 2, 15),
    "gemma3_text": (13, 2, HALF, 2, 15),
    "phi3": (5, 2, HALF, 2, 9),
    "olmo2": (9, 2, HALF, 2, 15),
    "olmo3": (9, 2, HALF, 2, 15),
    "glm4": (9, 2, INTERLEAVED, 2, 13),
    "cohere2": (0, 1, INTERLEAVED, 2, 15),  # layer norms; the full-attention layer has no positions
    "gpt_neox": (0, 2, HALF, 0, 9),
    "phi": (0, 2, HALF, 0, 13),
    "smollm3": (5, 1, HALF, 2, 15),  # one layer without positions
    "exaone4": (9, 1, HALF, 2, 15),
    "granite": (5, 2, HALF, 2, 15),
    "mixtral": (5, 2, HALF, 0, 11),  # experts are one torch_moe a layer
    "qwen3_moe": (9, 2, HALF, 0, 11),
    "gpt_oss": (5, 2, HALF, 0, 11),
    "deepseek_v3": (9, 2, HALF, 2, 18),
    "llama4_text": (7, 1, COMPLEX, 4, 17),
    "nanochat": (10, 2, HALF, 0, 13),  # scale-free norms, signs of the rotation swapped
    "gptj": (0, 2, INTERLEAVED, 0, 13),
    "falcon": (0, 2, HALF, 0, 9),  # products with a weight turned around
    "gpt2": (0, 0, HALF, 0, 9),  # weights stored turned around; learned positions
}


def counts(gm: GraphModule) -> tuple[int, int, int, int]:
    """Canonical ops of the four kinds."""
    rope = sum(count(gm, f"torch_rope_with_{form}") for form in (HALF, INTERLEAVED, COMPLEX))
    return count(gm, "torch_rmsnorm"), rope, count(gm, "torch_swiglu"), count(gm, "torch_linear_simple")


@pytest.mark.parametrize("kind", EXPECTED)
def test_blocks_are_found_and_compute_the_same(kind: str) -> None:
    gm = tiny_graph(kind)
    before = {batch: logits(gm, batch) for batch in (2, 1)}
    for key in MATCHERS:
        run_pass(gm, key)
        for batch, expected in before.items():
            assert rmse_ratio(logits(gm, batch), expected) < 1e-6, key
    norms, pairs, form, gates, linears = EXPECTED[kind]
    assert counts(gm) == (norms, pairs, gates, linears)
    assert count(gm, f"torch_rope_with_{form}") == pairs
    check_values(gm)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2", "glm4", "cohere2", "gpt_oss", "phi"])
def test_rounding_is_kept_in_bfloat16(kind: str) -> None:
    gm = tiny_graph(kind, torch.bfloat16)
    before = logits(gm)
    for key in MATCHERS:
        run_pass(gm, key)
        assert rmse_ratio(logits(gm), before) < 1e-3, key
    norms, pairs, _, gates, linears = EXPECTED[kind]
    assert counts(gm) == (norms, pairs, gates, linears)
    check_values(gm)


def test_counts_follow_the_layers() -> None:
    gm = tiny_graph("llama", num_hidden_layers=4)
    for key in MATCHERS:
        run_pass(gm, key)
    assert counts(gm) == (9, 4, 4, 29)


@pytest.mark.parametrize("kind", ["gemma3_text", "hunyuan_v1_dense"])
def test_attention_needs_no_transposes(kind: str) -> None:
    """Norms before the rotation, and norms after it."""
    gm = tiny_graph(kind)

    def of_heads() -> list[Node]:  # transformers 5.17 transposes its rotary tables too, of three dimensions
        swaps = [n for n in gm.graph.nodes if n.target is torch.ops.aten.transpose.int]
        return [n for n in swaps if n.meta["val"].ndim == 4]

    assert of_heads()
    for key in MATCHERS:
        run_pass(gm, key)
    assert not of_heads()


def test_expanded_tables_are_shared_between_layers() -> None:
    gm = tiny_graph("glm4", num_hidden_layers=3)
    run_pass(gm, "match_rope_pattern")
    tables = {
        n.args[2:4]
        for n in gm.graph.nodes
        if n.target is torch.ops.adkit.torch_rope_with_qk_interleaving.default
    }
    assert len(tables) == 1
    assert sum(n.target is torch.ops.aten.repeat_interleave.self_int for n in gm.graph.nodes) == 2


def test_nothing_to_match_leaves_the_graph_alone() -> None:
    gm = tiny_graph("gpt2")
    before = str(gm.graph)
    assert run_pass(gm, "match_swiglu_pattern").num_matches == 0
    for key in ("match_rope_pattern", "match_rope_layout", "match_rmsnorm_pattern", "match_l2norm_pattern"):
        assert run_pass(gm, key).num_matches == 0
    assert str(gm.graph) == before


def test_a_layer_stored_turned_around_loses_its_views_and_what_only_looks_like_one_stays() -> None:
    gm = tiny_graph("gpt2")
    layers = [n for n in gm.graph.nodes if n.target is torch.ops.aten.addmm.default]
    assert len(layers) == 8
    layers[0].kwargs = {"beta": 2.0}
    weight = layers[1].args[2]
    with gm.graph.inserting_before(layers[1]):
        computed = gm.graph.call_function(torch.ops.aten.mul.Tensor, (weight, 2.0))
        computed.meta["val"] = weight.meta["val"]
    layers[1].replace_input_with(weight, computed)
    gm.recompile()
    before = logits(gm)
    assert run_pass(gm, "match_linear").num_matches == 7  # six layers and the head
    assert [n for n in gm.graph.nodes if n.target is torch.ops.aten.addmm.default] == layers[:2]
    made = [n for n in gm.graph.nodes if n.target is torch.ops.adkit.torch_linear_simple.default]
    assert all(n.args[0].meta["val"].dim() == 3 for n in made)
    check_values(gm)
    assert rmse_ratio(logits(gm), before) < 1e-6
