"""Weights arrive in the graph: all, none, or the few that a pass touched."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from adkit.contract import DistConfig, EngineConfig, ModelError
from adkit.models import resolve
from adkit.models.export import export_model
from adkit.models.loading import FUSED, graph_tensor_names, load_graph_tensors
from adkit.passes.base import Context
from adkit.passes.registry import get_pass
from tests.models.checkpoints import named, rewrite, save_tiny
from tests.zoo import inputs_for, rmse_ratio, tiny_config


def _graph(module: nn.Module, names: list[str]) -> GraphModule:
    """A graph that reads the named tensors of a module and returns them."""
    graph = Graph()
    graph.output(tuple(graph.get_attr(n) for n in names))
    return GraphModule(module, graph)


def _context(factory, **more):
    return Context(factory, EngineConfig(), torch.device("cpu"), weights=factory.weights, **more)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma2"])
def test_exported_graph_computes_what_hugging_face_does(tmp_path, model_type):
    model = save_tiny(tmp_path, model_type)
    factory = resolve(tmp_path, device="cpu")
    gm = export_model(factory.build())
    seen, log = [], []
    context = _context(factory, progress=lambda *a: seen.append(a), report=log.append)
    info = get_pass("load_weights")().apply(gm, context)
    assert not any(t.is_meta for n, t in named(gm).items() if n in graph_tensor_names(gm))
    feed = inputs_for(gm, 2, 13)
    with torch.no_grad():
        assert rmse_ratio(gm(**feed)[0], model(feed["input_ids"]).logits) < 1e-5
    assert info.num_matches == info.details["tensors"] > 10
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen[-1][2] == "loading"
    assert any("tensors" in line for line in log)


def test_tied_names_share_one_parameter(tmp_path):
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    factory = resolve(tmp_path, device="cpu")
    gm = _graph(factory.build(), ["model.embed_tokens.weight", "lm_head.weight"])
    info = get_pass("load_weights")().apply(gm, _context(factory))
    assert gm.lm_head.weight is gm.model.embed_tokens.weight
    assert info.details["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert info.details["bytes"] == gm.lm_head.weight.numel() * 4


def test_only_what_the_graph_reads_is_loaded(tmp_path):
    save_tiny(tmp_path, "llama")
    factory = resolve(tmp_path, device="cpu")
    gm = _graph(factory.build(), ["model.norm.weight"])
    gm.spare = factory.build()
    info = get_pass("load_weights")().apply(gm, _context(factory))
    assert info.details["tensors"] == 1
    assert not gm.model.norm.weight.is_meta


def test_without_weights_the_pass_is_skipped_with_the_reason():
    factory = resolve(tiny_config("llama"), device="cpu")
    gm = _graph(factory.build(), ["model.norm.weight"])
    info = get_pass("load_weights")().apply(gm, _context(factory))
    assert info.skipped
    assert "shapes only" in info.reason
    assert gm.model.norm.weight.is_meta


def test_memory_is_expected_to_change():
    assert get_pass("load_weights")().config.expect_mem_change


def test_a_few_tensors_are_reloaded_and_the_others_left(tmp_path):
    model = save_tiny(tmp_path, "llama")
    factory = resolve(tmp_path, device="cpu")
    gm = _graph(factory.build(), ["model.norm.weight", "lm_head.weight"])
    load_graph_tensors(gm, factory)
    kept = gm.lm_head.weight
    gm.model.norm.weight.data.zero_()
    result = load_graph_tensors(gm, factory, ["model.norm.weight"])
    assert result.tensors == 1
    assert torch.equal(gm.model.norm.weight, model.model.norm.weight)
    assert gm.lm_head.weight is kept


def test_fused_names_are_concatenated_from_their_parts(tmp_path):
    model = save_tiny(tmp_path, "llama")
    factory = resolve(tmp_path, device="cpu")
    module = factory.build()
    attention = "model.layers.0.self_attn"
    parts = tuple(f"{attention}.{p}_proj.weight" for p in "qkv")
    expected = torch.cat([named(model)[p] for p in parts])
    module.get_submodule(attention).qkv_weight = nn.Parameter(torch.empty(expected.shape, device="meta"))
    # k is read on its own as well: a part may serve twice
    gm = _graph(module, [f"{attention}.qkv_weight", parts[1]])
    gm.meta[FUSED] = {f"{attention}.qkv_weight": parts}
    result = load_graph_tensors(gm, factory)
    assert torch.equal(gm.get_parameter(f"{attention}.qkv_weight"), expected)
    assert torch.equal(gm.get_parameter(parts[1]), named(model)[parts[1]])
    assert result.tensors == 2


def test_constants_of_the_graph_keep_their_data_and_unknown_names_are_refused(tmp_path):
    save_tiny(tmp_path, "llama")
    factory = resolve(tmp_path, device="cpu")
    module = factory.build()
    module.register_buffer("lifted_tensor_0", torch.tensor([1.5, 2.5]))
    gm = _graph(module, ["lifted_tensor_0", "model.norm.weight"])
    result = load_graph_tensors(gm, factory)
    assert result.constants == 1
    assert gm.lifted_tensor_0.tolist() == [1.5, 2.5]
    module.register_buffer("made_up", torch.empty(2, device="meta"))
    gm = _graph(module, ["made_up"])
    with pytest.raises(ModelError, match=r"made_up.*adkit_weights"):
        load_graph_tensors(gm, factory)


def test_random_weights_reload_to_the_same_values():
    factory = resolve(tiny_config("mixtral"), random_weights=True, seed=4, device="cpu")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    gm = _graph(factory.build(), [name, "lm_head.weight"])
    load_graph_tensors(gm, factory)
    before = gm.get_parameter(name).clone()
    load_graph_tensors(gm, factory, [name])
    assert torch.equal(gm.get_parameter(name), before)


def _loaded(directory, **dist):
    factory = resolve(directory, device="cpu")
    more = {"dist": DistConfig.of(**dist)} if dist else {}
    return get_pass("load_weights")().apply(export_model(factory.build()), _context(factory, **more))


def test_tensors_without_a_place_in_the_model_are_told_of_once(tmp_path):
    save_tiny(tmp_path, "llama")
    odd = ["model.layers.0.self_attn.q_proj.bias", *(f"model.layers.9.n{i}" for i in range(4))]
    rewrite(tmp_path, lambda t: t.update({n: torch.zeros(48) for n in odd}))
    with pytest.warns(
        UserWarning, match=r"no place for 5 of .*q_proj\.bias, .*n2 and 1 more\), .* not loaded"
    ) as told:
        info = _loaded(tmp_path)
    assert len(told) == 1
    assert info.details["unexpected"] == odd
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _loaded(tmp_path, tp=2, rank=1).details["unexpected"] == odd  # rank 0 has told


def test_what_hugging_face_ignores_is_no_reason_to_warn(tmp_path):
    """Buffers computed today, tied weights stored twice, and what the class itself lists."""
    save_tiny(tmp_path / "llama", "llama", tie_word_embeddings=True)
    save_tiny(tmp_path / "gpt_neox", "gpt_neox")

    def old(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors |= {f"model.{n}rotary_emb.inv_freq": torch.zeros(6) for n in ("", "layers.0.self_attn.")}

    rewrite(tmp_path / "llama", old)
    listed = "gpt_neox.layers.0.attention.masked_bias"
    rewrite(tmp_path / "gpt_neox", lambda t: t.update({listed: torch.zeros(())}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("llama", "gpt_neox"):
            assert _loaded(tmp_path / name).details["unexpected"] == []
