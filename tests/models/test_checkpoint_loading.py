"""Streaming a checkpoint gives, bit for bit, what Hugging Face loads from it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from adkit.contract import CheckpointError, ModelError
from adkit.models import resolve
from adkit.models.checkpoint import Checkpoint
from tests.models.checkpoints import differences, edit_config, hugging_face, named, rewrite, save_tiny
from tests.zoo import tiny

CPU = "cpu"


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mixtral",
        "qwen3_moe",
        "gpt_oss",
        "phimoe",
        "olmoe",
        "deepseek_v3",
        "gemma2",
        "gpt2",
        "gpt_neox",
        "bloom",
        "opt",
        "granitemoe",
    ],
)
def test_sharded_checkpoint_equals_from_pretrained(tmp_path, model_type):
    save_tiny(tmp_path, model_type)
    assert (tmp_path / "model.safetensors.index.json").exists()
    factory = resolve(tmp_path, device=CPU)
    assert differences(dict(factory.load()), hugging_face(tmp_path)) == []
    assert factory.check_checkpoint().ok


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_stored_one_by_one_and_numbered_in_natural_order(tmp_path, model_type):
    """The original layout: one tensor an expert, more than ten of them, so that text order would be wrong."""
    model = save_tiny(tmp_path, model_type, num_local_experts=12, num_experts=12)
    stored = Checkpoint(tmp_path).tensors
    assert any(".experts.11." in name for name in stored)
    assert not any("gate_up_proj" in name for name in stored)
    got = dict(resolve(tmp_path, device=CPU).load())
    assert differences(got, named(model)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_any_dtype_with_what_hugging_face_keeps_in_float32(tmp_path, model_type, dtype):
    save_tiny(tmp_path, model_type)
    factory = resolve(tmp_path, dtype=dtype, device=CPU)
    got, expected = dict(factory.load()), hugging_face(tmp_path, dtype)
    assert differences(got, expected) == []
    built = named(factory.build())
    assert {n: t.dtype for n, t in built.items()} == {n: t.dtype for n, t in expected.items()}
    assert built["model.rotary_emb.inv_freq"].dtype == torch.float32
    if model_type == "deepseek_v3":
        assert got["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_bfloat16_checkpoint_sets_the_dtype_of_a_gpu_and_float32_that_of_a_cpu(tmp_path):
    _, model = tiny("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert resolve(tmp_path, device="cuda").dtype == torch.bfloat16
    assert resolve(tmp_path, device="cpu").dtype == torch.float32
    edit_config(tmp_path, dtype=None)
    assert resolve(tmp_path, device="cuda").dtype == torch.bfloat16


def test_tied_weights_are_one_tensor(tmp_path):
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint(tmp_path).tensors
    factory = resolve(tmp_path, device=CPU)
    got = dict(factory.load())
    assert got["lm_head.weight"] is got["model.embed_tokens.weight"]
    assert factory.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    (only,) = factory.load(["lm_head.weight"])
    assert only[0] == "lm_head.weight"
    assert torch.equal(only[1], got["model.embed_tokens.weight"])


def test_tied_weights_stored_under_the_other_name(tmp_path):
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert differences(dict(resolve(tmp_path, device=CPU).load()), hugging_face(tmp_path)) == []


def test_tied_by_config_but_stored_different_is_untied_as_hugging_face_does(tmp_path):
    save_tiny(tmp_path, "llama", tie_word_embeddings=False)
    edit_config(tmp_path, tie_word_embeddings=True)
    factory = resolve(tmp_path, device=CPU)
    got = dict(factory.load())
    assert differences(got, hugging_face(tmp_path)) == []
    assert not torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    assert factory.check_checkpoint().untied
    assert factory.with_random_weights(1).tied == {}


def test_a_subset_reads_only_the_tensors_it_needs(tmp_path, monkeypatch):
    save_tiny(tmp_path, "mixtral")
    factory = resolve(tmp_path, device=CPU)
    read = []
    original = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name, *a: read.append(name) or original(self, name, *a)
    )
    names = ["model.norm.weight", "model.layers.1.mlp.experts.down_proj", "model.rotary_emb.inv_freq"]
    got = dict(factory.load(names))
    assert set(got) == set(names)
    assert len(read) == 5  # the norm and four experts' w2
    assert all("norm" in name or ".w2." in name for name in read)
    assert differences(got, {n: t for n, t in hugging_face(tmp_path).items() if n in names}) == []


def test_the_host_never_holds_more_than_one_group(tmp_path, monkeypatch):
    """Tensors are handed out as they are read: at no time are more than one converter's inputs alive."""
    import weakref

    save_tiny(tmp_path, "mixtral")
    factory = resolve(tmp_path, device=CPU)
    alive, most = weakref.WeakSet(), 0
    original = Checkpoint.read

    def read(self, name, *rest):
        nonlocal most
        tensor = original(self, name, *rest)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", read)
    for _, tensor in factory.load():
        del tensor
    assert most <= 9  # gate and up of four experts, and the tensor handed out before


def test_progress_counts_bytes_to_the_total(tmp_path):
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    seen = []
    factory = resolve(tmp_path, device=CPU)
    got = dict(factory.load(progress=lambda done, total: seen.append((done, total))))
    once = {id(t): t.numel() * t.element_size() for t in got.values()}
    assert seen[-1] == (sum(once.values()), sum(once.values()))
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_loaded_model_computes_the_same_logits(tmp_path):
    model = save_tiny(tmp_path, "qwen3_moe")
    factory = resolve(tmp_path, device=CPU)
    ours = factory.build()
    for name, tensor in factory.load():
        path, _, leaf = name.rpartition(".")
        owner = ours.get_submodule(path)
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
        else:
            owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = model.to(torch.float32)(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)


def _vision(**more):
    return dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        **more,
    )


_TEXT = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
}  # fmt: skip


def _gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=_TEXT, vision_config=_vision(), mm_tokens_per_image=4)
    )


def _llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**_TEXT, tie_word_embeddings=False)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**_vision(projection_dim=16)))
    )


@pytest.mark.parametrize("make", [_gemma3, _llava])
def test_multi_modal_checkpoint_gives_its_language_model(tmp_path, make):
    whole = make()
    whole.save_pretrained(tmp_path)
    factory = resolve(tmp_path, device=CPU)
    assert factory.nested
    assert "ForCausalLM" in type(factory.build()).__name__
    got = dict(factory.load())
    expected = {f"model.{n}": t for n, t in named(whole.model.language_model).items()}
    expected["lm_head.weight"] = whole.lm_head.weight.detach()
    assert differences(got, expected) == []
    assert factory.check_checkpoint().unexpected == []
    # what its language model has no place for is told apart from the other modalities' parts
    stored = {n for n in factory.stored_names() if ".layers.1." in n and "vision" not in n}
    edit_text = json.loads((tmp_path / "config.json").read_text())["text_config"] | {"num_hidden_layers": 1}
    edit_text["layer_types"] = (edit_text.get("layer_types") or [])[:1] or None
    edit_config(tmp_path, text_config=edit_text)
    assert stored
    assert set(resolve(tmp_path, device=CPU).check_checkpoint().unexpected) == stored


# --- what can be wrong with a checkpoint


def _message(directory, names=None):
    with pytest.raises(CheckpointError) as caught:
        list(resolve(directory, device=CPU).load(names))
    return str(caught.value)


def test_missing_misshaped_and_unexpected_tensors_come_in_one_error(tmp_path):
    save_tiny(tmp_path, "llama")

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 5)
        tensors["model.layers.9.surprise"] = torch.zeros(2)

    rewrite(tmp_path, change)
    message = _message(tmp_path)
    assert "missing (1): model.norm.weight" in message
    assert "mis-shaped (1): model.layers.0.mlp.up_proj.weight: [3, 5]" in message
    assert "[80, 48]" in message
    assert "unexpected (1): model.layers.9.surprise" in message
    # Tensors that fit can still be read by name.
    assert dict(resolve(tmp_path, device=CPU).load(["lm_head.weight"]))


def test_unexpected_tensors_alone_are_reported_not_refused(tmp_path):
    model = save_tiny(tmp_path, "llama")
    rewrite(
        tmp_path,
        lambda t: t.update({"extra.weight": torch.zeros(2), "model.rotary_emb.inv_freq": torch.zeros(6)}),
    )
    factory = resolve(tmp_path, device=CPU)
    assert differences(dict(factory.load()), named(model)) == []
    assert factory.check_checkpoint().unexpected == [
        "extra.weight"
    ]  # old inv_freq buffers are known and ignored


def test_a_missing_expert_is_a_misshaped_merge(tmp_path):
    save_tiny(tmp_path, "mixtral")
    rewrite(tmp_path, lambda t: [t.pop(n) for n in list(t) if "layers.1" in n and ".experts.3.w2." in n])
    message = _message(tmp_path)
    assert "model.layers.1.mlp.experts.down_proj" in message
    assert "[3, " in message


def test_half_of_a_merge_missing_is_reported(tmp_path):
    save_tiny(tmp_path, "mixtral")
    rewrite(tmp_path, lambda t: [t.pop(n) for n in list(t) if "layers.1" in n and ".w3." in n])
    assert "model.layers.1.mlp.experts.gate_up_proj" in _message(tmp_path)


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn])
def test_integer_and_quantised_weights_are_refused(tmp_path, stored):
    save_tiny(tmp_path, "llama")
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(stored)}))
    message = _message(tmp_path)
    assert "lm_head.weight: stored as" in message


def test_quantisation_config_is_refused_with_what_to_do(tmp_path):
    save_tiny(tmp_path, "llama")
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match=r"quantised.*mxfp4.*random_weights=True"):
        resolve(tmp_path, device=CPU)
    assert resolve(tmp_path, device=CPU, random_weights=True).weights == "random"


@pytest.mark.parametrize("cut", [0, 4, 200, -1])
def test_truncated_safetensors(tmp_path, cut):
    save_tiny(tmp_path, "llama", shard="1GB")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    message = _message(tmp_path)
    assert "model.safetensors" in message
    assert "truncated or corrupt" in message


def test_corrupt_header_and_lfs_pointer(tmp_path):
    save_tiny(tmp_path, "llama", shard="1GB")
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"#" * 32
    file.write_bytes(data)
    assert "truncated or corrupt" in _message(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    assert "git lfs pull" in _message(tmp_path)


def test_index_with_absent_shards_or_nonsense(tmp_path):
    save_tiny(tmp_path, "llama")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[0].unlink()
    message = _message(tmp_path)
    assert shards[0].name in message
    assert f"names {len(shards)} shards, of which 1 are absent" in message
    (tmp_path / "model.safetensors.index.json").write_text("{nonsense")
    assert "not a weight index" in _message(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    assert "not a weight index" in _message(tmp_path)


def test_directory_without_weights(tmp_path):
    save_tiny(tmp_path, "llama", shard="1GB")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights.*random_weights=True"):
        resolve(tmp_path, device=CPU)
    assert resolve(tmp_path, device=CPU, random_weights=True).weights == "random"


def test_safetensors_of_another_name_are_not_guessed_at(tmp_path):
    save_tiny(tmp_path, "llama", shard="1GB")
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert "weights.safetensors" in _message(tmp_path)


def test_pickle_is_refused_unless_asked_for(tmp_path):
    model = save_tiny(tmp_path, "llama", shard="1GB")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "allow_pickle=True" in _message(tmp_path)
    factory = resolve(tmp_path, device=CPU, allow_pickle=True)
    assert differences(dict(factory.load()), named(model)) == []
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        list(resolve(tmp_path, device=CPU, allow_pickle=True).load())


def test_pickle_that_holds_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    save_tiny(tmp_path, "llama", shard="1GB")
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        list(resolve(tmp_path, device=CPU, allow_pickle=True).load())


def test_names_that_the_model_has_not(tmp_path):
    save_tiny(tmp_path, "llama")
    with pytest.raises(ModelError, match=r"has no tensor model\.nowhere"):
        list(resolve(tmp_path, device=CPU).load(["model.nowhere"]))


def test_read_returns_memory_of_its_own(tmp_path):
    """A tensor must not keep a whole shard mapped, nor die with the file."""
    save_tiny(tmp_path, "llama", shard="1GB")
    tensor = Checkpoint(tmp_path).read("lm_head.weight")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as f:
        kept = f.get_tensor("lm_head.weight").clone()
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert torch.equal(tensor, kept)
    assert tensor.untyped_storage().nbytes() == tensor.numel() * 4


def test_parameters_that_a_model_makes_with_values_are_still_loaded():
    """DiffLlama makes its lambdas with ``torch.normal``, which heeds no default device."""
    config, _ = tiny("diffllama")
    model = resolve(config, dtype="float32", device=torch.device("cpu")).build()
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
