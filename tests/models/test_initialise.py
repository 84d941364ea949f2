"""Computed buffers equal a normally constructed model's; random weights depend on seed and name alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from adkit.contract import ModelError
from adkit.models import initialise, resolve
from tests.models.checkpoints import differences, named
from tests.zoo import tiny_config

TYPES = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text",
    "phi", "phi3", "phimoe", "gpt2", "gpt_neox", "gptj", "codegen", "bloom", "mpt", "falcon", "opt",
    "gpt_oss", "deepseek_v3", "llama4_text", "cohere2", "smollm3", "exaone4", "granite", "stablelm",
    "persimmon", "olmo2", "glm4", "biogpt", "xglm", "bart", "mamba",
]  # fmt: skip
SCALINGS = {
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
}


def _constructed(config):
    torch.manual_seed(0)
    return named(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@pytest.mark.parametrize("model_type", TYPES)
def test_computed_buffers_equal_a_constructed_model(model_type):
    config = tiny_config(model_type)
    factory = resolve(config, random_weights=True, device="cpu")
    expected = {n: t for n, t in _constructed(config).items() if n in factory.computed}
    assert differences(dict(factory.load(factory.computed)), expected) == []


@pytest.mark.parametrize("kind", SCALINGS)
def test_every_rope_scaling(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS[kind]}
    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, rope_parameters=rope,
    )  # fmt: skip
    factory = resolve(config, random_weights=True, device="cpu", dtype="bfloat16")
    assert "model.rotary_emb.inv_freq" in factory.computed
    expected = {n: t for n, t in _constructed(config).items() if n in factory.computed}
    assert differences(dict(factory.load(factory.computed)), expected) == []


def test_most_models_have_computed_buffers():
    """The comparison above must compare something."""
    having = [t for t in TYPES if resolve(tiny_config(t), device="cpu").computed]
    assert len(having) >= 25


class _Odd(PreTrainedModel):
    """Buffers that the initialiser does not know: the constructor is the only source."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = nn.Module()
        self.inner.register_buffer("table", torch.arange(6) * 3, persistent=False)
        self.inner.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.weight = nn.Parameter(torch.ones(4))
        self.post_init()


def test_buffers_that_the_initialiser_ignores_come_from_the_constructor():
    with torch.device("meta"):
        model = _Odd(PretrainedConfig())
    made = initialise.computed_buffers(
        model, ["inner.table", "inner.scale"], lambda: _Odd(PretrainedConfig())
    )
    assert made["inner.table"].tolist() == [0, 3, 6, 9, 12, 15]
    assert float(made["inner.scale"]) == 0.5


def test_a_buffer_that_nothing_gives_is_an_error():
    def meta():
        with torch.device("meta"):
            return _Odd(PretrainedConfig())

    with pytest.raises(ModelError, match=r"inner\.scale.*checkpoint that stores it"):
        initialise.computed_buffers(meta(), ["inner.scale"], meta)


def test_parameters_on_meta_leaves_buffers_real_and_restores_torch():
    before = nn.Module.register_parameter
    with initialise.parameters_on_meta():
        norm = nn.BatchNorm1d(3)
    assert norm.weight.is_meta
    assert not norm.running_mean.is_meta
    assert nn.Module.register_parameter is before


def test_random_tensors_do_not_depend_on_order_or_subset():
    factory = resolve(tiny_config("mixtral"), random_weights=True, seed=3, device="cpu")
    whole = dict(factory.load())
    backwards = dict(factory.load(list(reversed(whole))))
    assert differences(whole, backwards) == []
    for name in ("model.layers.1.mlp.experts.down_proj", "lm_head.weight"):
        ((_, alone),) = factory.load([name])
        assert torch.equal(alone, whole[name])


def test_random_tensors_follow_the_seed_and_leave_the_generator_alone():
    config = tiny_config("llama")
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = dict(resolve(config, random_weights=True, seed=1, device="cpu").load())
    assert torch.equal(torch.rand(3), expected)
    other = dict(resolve(config, random_weights=True, seed=2, device="cpu").load())
    again = dict(resolve(config, device="cpu").with_random_weights(1).load())
    assert differences(one, again) == []
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    layers = [one[f"model.layers.{i}.self_attn.q_proj.weight"] for i in (0, 1)]
    assert not torch.equal(*layers)


@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "bloom", "phimoe", "opt"]
)
def test_random_values_are_distributed_as_hugging_face_initialises(model_type):
    config = tiny_config(model_type)
    ours = dict(resolve(config, random_weights=True, device="cpu").load())
    theirs = _constructed(config)
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        if not expected.is_floating_point():
            continue
        assert bool(ours[name].isfinite().all()) == bool(expected.isfinite().all()), name
        if expected.numel() < 200 and expected.unique().numel() == 1:
            assert torch.equal(ours[name], expected), name  # norms 1 (or 0), biases 0
        elif expected.numel() > 1000:
            assert float(ours[name].std()) == pytest.approx(float(expected.std()), rel=0.3, abs=1e-6), name


def test_tied_random_weights_are_one_tensor():
    got = dict(
        resolve(tiny_config("llama", tie_word_embeddings=True), random_weights=True, device="cpu").load()
    )
    assert got["lm_head.weight"] is got["model.embed_tokens.weight"]


@pytest.mark.gpu
def test_random_weights_are_made_on_the_gpu():
    factory = resolve(tiny_config("mixtral"), random_weights=True, device="cuda")
    state = torch.cuda.get_rng_state()
    whole = dict(factory.load(device="cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert {t.device.type for t in whole.values()} == {"cuda"}
    assert differences(whole, dict(factory.load(list(reversed(whole)), device="cuda"))) == []
