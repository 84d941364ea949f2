"""Attention in HF's sdpa and eager code becomes the canonical op that interface mode gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from adkit.models.export import export_model
from tests.zoo import inputs_for, meta_twin, rmse_ratio, tiny, with_weights_of

ATTENTION = torch.ops.adkit.torch_attention.default
INTERFACE = (
    "llama",
    "qwen3",
    "mistral",
    "gemma2",
    "gpt_oss",
    "gpt2",
    "gpt_neox",
    "phi3",
    "opt",
    "llama4_text",
)
OWN_ATTENTION: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {}),
    ("bloom", {"n_head": 6}),  # slopes of a head count that is no power of two
    ("mpt", {}),
    ("mpt", {"n_heads": 6}),
    ("falcon", {}),
    ("falcon", {"alibi": True}),
    ("falcon", {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    ("gptj", {}),
    ("codegen", {}),
    ("gpt_neox_japanese", {}),
    ("openai-gpt", {}),
    ("xglm", {}),
]


def attentions(gm: GraphModule) -> list[Node]:
    return [n for n in gm.graph.nodes if n.target is ATTENTION]


def left_over(gm: GraphModule) -> list[str]:
    """Softmaxes over keys, PyTorch attention and repeated heads that are still in the graph."""
    names = ("scaled_dot_product_attention", "repeat_kv")
    found = [n.name for n in gm.graph.nodes if any(x in str(n.target) for x in names)]
    return found + [n.name for n in gm.graph.nodes if "softmax" in str(n.target) and n.meta["val"].ndim > 2]


def options(node: Node) -> dict[str, Any]:
    """What an attention computes: its keyword arguments, its heads, and the sinks it reads."""
    sinks = node.args[4].target if len(node.args) > 4 and node.args[4] is not None else None  # type: ignore[union-attr]
    heads = tuple(int(n.meta["val"].shape[2]) for n in node.args[:3])  # type: ignore[union-attr]
    return {**node.kwargs, "sinks": sinks, "heads": heads}


SDPA = ("llama", "mistral", "gpt2", "llama4_text")  # HF's sdpa code has no softcap and no sinks


@pytest.mark.parametrize(
    ("model_type", "mode"), [(t, "eager") for t in INTERFACE] + [(t, "sdpa") for t in SDPA]
)
def test_hf_code_gives_the_ops_that_interface_mode_gives(
    model_type: str, mode: str, run_attention_passes: Any
) -> None:
    _, model = tiny(model_type)
    wanted = [options(n) for n in attentions(export_model(model, "interface"))]
    gm, _ = run_attention_passes(export_model(model, mode))
    assert [options(n) for n in attentions(gm)] == wanted
    assert not left_over(gm)
    inputs = inputs_for(gm, 2, 23)
    expected = model(input_ids=inputs["input_ids"], use_cache=False).logits
    assert rmse_ratio(gm(**inputs)[0].detach(), expected.detach()) < 1e-6


@pytest.mark.parametrize(("model_type", "more"), OWN_ATTENTION)
def test_models_outside_the_interface_match(
    model_type: str, more: dict[str, Any], run_attention_passes: Any
) -> None:
    config, model = tiny(model_type, **more)
    gm, _ = run_attention_passes(export_model(model))
    assert len(attentions(gm)) == config.num_hidden_layers
    if "new_decoder_architecture" not in more or "alibi" in more:
        assert not left_over(gm)
    inputs = inputs_for(gm, 2, 23)
    expected = model(input_ids=inputs["input_ids"], use_cache=False).logits
    assert rmse_ratio(gm(**inputs)[0].detach(), expected.detach()) < 1e-6


def test_local_attention_of_gpt_neo_keeps_its_window(run_attention_passes: Any) -> None:
    _, model = tiny("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=8)
    gm, _ = run_attention_passes(export_model(model))
    assert [n.kwargs.get("window") for n in attentions(gm)] == [None, 8]


def test_alibi_slopes_are_those_of_the_paper(run_attention_passes: Any) -> None:
    """arXiv 2108.12409: 2^(-8 i / n) for n heads, n a power of two."""
    _, model = tiny("bloom", n_head=8)
    gm, _ = run_attention_passes(export_model(model))
    for node in attentions(gm):
        slopes = getattr(gm, node.args[5].target)  # type: ignore[union-attr]
        assert torch.allclose(slopes, torch.tensor([2.0**-i for i in range(1, 9)]))


def test_causal_tables_on_meta_are_asked_of_the_factory(run_attention_passes: Any) -> None:
    more = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
    config, model = tiny("gpt_neo", **more)
    buffers = dict(model.named_buffers())
    asked: list[str] = []

    def load(names: list[str], device: torch.device) -> Any:
        asked.extend(names)
        return ((n, buffers[n]) for n in names)

    gm, steps = run_attention_passes(export_model(meta_twin(config)))
    assert not attentions(gm)
    assert steps["match_eager_attention"].info.details["not matched"]
    factory = SimpleNamespace(
        computed=frozenset(buffers), tensors={}, with_random_weights=lambda: SimpleNamespace(load=load)
    )
    gm, _ = run_attention_passes(export_model(meta_twin(config)), factory=factory)
    assert len(attentions(gm)) == 2
    assert asked
    gm = with_weights_of(gm, model)
    inputs = inputs_for(gm, 2, 23)
    assert rmse_ratio(gm(**inputs)[0].detach(), model(input_ids=inputs["input_ids"]).logits.detach()) < 1e-6


def test_every_new_node_tells_which_nodes_it_replaces(run_attention_passes: Any) -> None:
    _, model = tiny("mistral")
    _, steps = run_attention_passes(export_model(model, "eager"))
    (rewrite,) = (r for r in steps["match_eager_attention"].rewrites if r.label == "eager attention")
    assert rewrite.count == 2
    assert rewrite.layers == "0-1"
    assert "aten.softmax.int" in rewrite.before
    assert "adkit.torch_attention" in rewrite.after[0]


@pytest.mark.parametrize("model_type", ["doge"])
def test_a_mask_made_from_token_data_stays_and_the_step_says_so(
    model_type: str, run_attention_passes: Any
) -> None:
    _, model = tiny(model_type)
    gm, steps = run_attention_passes(export_model(model, "eager"))
    assert not attentions(gm)
    assert steps["match_eager_attention"].info.details["not matched"]


def test_graphs_without_attention_are_left_alone(run_attention_passes: Any) -> None:
    _, model = tiny("llama")
    _, steps = run_attention_passes(export_model(model, "interface"))
    assert not any(s.changed for s in steps.values())
    assert all(s.info.num_matches == 0 for s in steps.values())


@pytest.mark.parametrize("dim", [1, 2])
def test_repeat_kv_op_agrees_with_its_fake(dim: int) -> None:
    x = torch.randn(2, 3, 3, 4)
    torch.library.opcheck(torch.ops.adkit.torch_attention_repeat_kv.default, (x, 2, dim))
    assert torch.equal(torch.ops.adkit.torch_attention_repeat_kv(x, 2, dim), x.repeat_interleave(2, dim))


def test_order_of_positions_and_attention_does_not_matter(run_attention_passes: Any) -> None:
    """Position inputs may already stand where an ALiBi mask counted."""
    _, model = tiny("bloom")
    first = ("match_positions", "match_eager_attention", "match_attention_layout")
    gm, _ = run_attention_passes(export_model(model), first)
    assert len(attentions(gm)) == 2
    assert not left_over(gm)
    inputs = inputs_for(gm, 2, 23)
    expected = model(input_ids=inputs["input_ids"], use_cache=False).logits
    assert rmse_ratio(gm(**inputs)[0].detach(), expected.detach()) < 1e-6
