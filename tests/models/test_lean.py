"""The lean llama computes what Hugging Face's does, whole and over ranks, from the same checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adkit.contract import DistConfig, ModelError
from adkit.models import resolve
from adkit.models.export import export_model
from adkit.models.lean import LEAN
from adkit.workbench import Workbench
from tests.models.checkpoints import named, save_tiny
from tests.zoo import inputs_for, rmse_ratio, tiny_config

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "tied": {"tie_word_embeddings": True},
    "scaled": {"rope_parameters": LLAMA3, "head_dim": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_lean_llama_is_hugging_faces(tmp_path: Any, kind: str) -> None:
    save_tiny(tmp_path, "llama", vocab_size=132, **KINDS[kind])
    factory = resolve(tmp_path, device="cpu", lean=True)
    assert factory.check_checkpoint().ok
    model = factory.build()
    assert type(model) is LEAN["llama"]
    gm = export_model(model)
    for name, tensor in factory.load():
        path, _, leaf = name.rpartition(".")
        setattr(gm.get_submodule(path), leaf, tensor if "inv_freq" in leaf else torch.nn.Parameter(tensor))
    feed = inputs_for(gm, 2, 13)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        want = hf(input_ids=feed["input_ids"], position_ids=feed["position_ids"]).logits
        assert rmse_ratio(gm(**feed)[0], want) < 1e-5


def test_names_ties_and_random_weights_are_hugging_faces() -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    lean, hf = (resolve(config, device="cpu", random_weights=True, seed=4, lean=it) for it in (True, False))
    assert lean.tensor_names() == hf.tensor_names()
    assert lean.tied == hf.tied
    one, other = dict(lean.load()), dict(hf.load())
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert named(lean.build()).keys() == named(hf.build()).keys()


@pytest.mark.parametrize("kind", ["biases", "tied"])
def test_it_is_cut_as_its_hints_say(kind: str) -> None:
    config = tiny_config("llama", vocab_size=128, num_attention_heads=8, **KINDS[kind])
    wb = Workbench(config, lean=True, random_weights=True, device="cpu", max_seq_len=64, progress=False)
    for tp in (2, 8):
        result = wb.shard(tp).check()
        assert result.ok, result


def test_only_some_of_its_layers() -> None:
    config = tiny_config("llama")  # 131 words: no rank count divides them
    options = {"lean": True, "device": "cpu", "max_seq_len": 64, "progress": False}
    wb = Workbench(config, dist=DistConfig.of(2), **options)
    wb.configure("apply_sharding_hints", shard_layers=["mha", "mlp"]).run(until="sharding")
    assert "own hints" in wb.steps["detect_sharding"].info.reason
    assert wb.graph.counts()["adkit.torch_dist_all_reduce"] == 4
    assert not wb.graph.find("torch_dist_all_gather")
    assert wb.graph.find("lm_head.weight")[0].shape == (131, 48)


def test_a_kind_without_a_lean_model() -> None:
    with pytest.raises(ModelError, match=r"no lean model for 'qwen3', only for llama; leave lean out"):
        resolve(tiny_config("qwen3"), device="cpu", lean=True)
    with pytest.raises(ModelError, match="no activation 'gelu_new'"):
        resolve(tiny_config("llama", hidden_act="gelu_new"), device="cpu", lean=True).build()
