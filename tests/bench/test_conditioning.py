"""Residual branches are found in any kind of graph, and scaled so that each adds its share."""

from __future__ import annotations

import pytest
import torch

import adkit
from adkit.bench import conditioning, peers
from adkit.models import resolve
from tests.zoo import tiny_config

#: Pre-norm, tied, parallel branches, a multiplier on each branch, Conv1D, experts with and without biases.
TYPES = ["llama", "starcoder2", "gptj", "granite", "gpt2", "mixtral", "gpt_oss", "deepseek_v3"]


def _stream(config):
    wb = adkit.Workbench(config, device="cpu", progress=False, random_weights=True)
    return wb.run(until="pattern_matcher").factory, conditioning.residual_stream(wb.graph)


def _conditioned(config):
    factory, stream = _stream(config)
    model = peers.load_model(factory, torch.device("cpu"), torch.float32)
    tokens = torch.randint(131, (48,), generator=torch.Generator().manual_seed(3))
    found = conditioning.factors(model, stream, tokens, factory.tied)
    return model, stream, tokens, found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_branch_adds_its_share_to_a_stream_of_size_one(model_type):
    config = tiny_config(model_type)
    model, stream, tokens, found = _conditioned(config)
    conditioning.scale(dict(model.named_parameters(remove_duplicate=False)), found)
    layers = config.get_text_config().num_hidden_layers
    assert len(stream.branches) >= 2 * layers
    sizes = {}
    for term in stream.branches:
        owner = model.get_submodule(term.names[0].rpartition(".")[0])
        owner.register_forward_hook(
            lambda _, __, y, t=term: sizes.update({t: y.square().mean().sqrt() * t.factor})
        )
    with torch.no_grad():
        model(tokens[None], use_cache=False)
    assert len(sizes) == len(stream.branches)
    for size in sizes.values():
        share = float(size) * len(stream.branches) ** 0.5
        assert 2**-0.51 < share < 2**0.51
    for term in stream.embeddings:
        rms = float(model.get_parameter(term.names[0]).square().mean().sqrt()) * term.factor
        assert 2**-0.51 < rms < 2**0.51


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "routers"), [("qwen3_moe", 2), ("gpt_oss", 2), ("deepseek_v3", 0)])
def test_routers_tell_their_experts_apart(model_type, routers):
    """Of those whose scores go through a softmax; the spread is measured at the router's own module."""
    config = tiny_config(model_type)
    model, stream, tokens, found = _conditioned(config)
    assert len(stream.routers) == routers
    conditioning.scale(dict(model.named_parameters(remove_duplicate=False)), found)
    spreads = []

    def measure(router, inputs):
        bias = getattr(router, "bias", None)
        scores = torch.nn.functional.linear(inputs[0], router.weight, bias)
        spreads.append(float(scores.std(-1, unbiased=False).square().mean().sqrt()))

    for term in stream.routers:
        model.get_submodule(term.names[0].rpartition(".")[0]).register_forward_pre_hook(measure)
    with torch.no_grad():
        model(tokens[None], use_cache=False)
    assert len(spreads) == routers
    for spread in spreads:
        assert 2**-0.51 < spread / conditioning.ROUTER_SPREAD < 2**0.51


@pytest.mark.slow
def test_factors_are_powers_of_two_and_the_model_stays_as_it_is():
    factory, stream = _stream(tiny_config("mixtral", tie_word_embeddings=True))
    model = peers.load_model(factory, torch.device("cpu"), torch.float32)
    before = {n: t.clone() for n, t in model.named_parameters(remove_duplicate=False)}
    found = conditioning.factors(model, stream, torch.arange(20), factory.tied)
    assert all(f == 2.0 ** round(torch.tensor(f).log2().item()) for f in found.values())
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] != 1
    for name, tensor in model.named_parameters(remove_duplicate=False):
        assert torch.equal(tensor, before[name]), name


def test_a_tensor_with_two_names_is_scaled_once():
    one = torch.ones(3)
    other = torch.ones(3)
    conditioning.scale({"a": one, "b": one, "c": other, "d": torch.ones(3)}, {"a": 2.0, "b": 2.0, "c": 4.0})
    assert one.tolist() == [2.0] * 3
    assert other.tolist() == [4.0] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "what"), [("olmo2", "torch_rmsnorm"), ("bloom", "layer_norm")])
def test_a_stream_without_weights_to_scale_is_refused(model_type, what):
    wb = adkit.Workbench(tiny_config(model_type), device="cpu", progress=False)
    wb.run(until="pattern_matcher")
    with pytest.raises(conditioning.NoStream, match=what):
        conditioning.residual_stream(wb.graph)


@pytest.mark.slow
def test_conditioned_weights_do_not_amplify_rounding():
    """A deep narrow llama with the linear layers' gain of an 8B one: raw it is out of bounds, conditioned within."""
    config = resolve("llama-3.2-1b").config
    text = {
        "num_hidden_layers": 24, "hidden_size": 128, "intermediate_size": 448, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "initializer_range": 1.28 / 128**0.5,
    }  # fmt: skip
    for key, value in text.items():
        setattr(config, key, value)
    factory, stream = _stream(config)
    tokens = torch.randint(512, (64,), generator=torch.Generator().manual_seed(3))
    narrow, wide = (
        peers.load_model(factory, torch.device("cpu"), d) for d in (torch.bfloat16, torch.float32)
    )

    def error():
        with torch.no_grad():
            a, b = (m(tokens[None]).logits.double() for m in (wide, narrow))
        return float((a - b).square().mean().sqrt() / a.square().mean().sqrt())

    raw = error()
    found = conditioning.factors(wide, stream, tokens, factory.tied)
    for model in (narrow, wide):
        conditioning.scale(dict(model.named_parameters(remove_duplicate=False)), found)
    assert raw > 0.035
    assert error() < 0.02
