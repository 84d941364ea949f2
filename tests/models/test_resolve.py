"""What a user names becomes a factory, or one clear error."""

from __future__ import annotations

import json
import time

import huggingface_hub
import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, T5Config, ViTConfig

from adkit.contract import ModelError
from adkit.models import bundled_names, resolve
from tests.models.checkpoints import edit_config, save_tiny
from tests.zoo import tiny, tiny_config

COUNTS = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-2-9b": 9_241_705_984,
    "gpt-oss-20b": 20_914_757_184,
    "deepseek-v3": 671_026_404_352,  # the model card's 671B, without the multi-token-prediction module
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Nothing here may ask the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_ten_bundled_configs_are_there():
    assert set(bundled_names()) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_bundled_config_builds_on_meta_at_full_size(name):
    factory = resolve(name.upper(), dtype="bfloat16", device="cpu")
    model = factory.build()
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert all(p.is_meta for p in model.parameters())
    assert not model.training
    assert factory.name == name
    assert factory.weights == "none"
    assert "random_weights=True" in factory.why_no_weights
    assert factory.eos_token_ids
    assert factory.tokenizer() is None
    kept = {n for n, t in factory.tensors.items() if t.dtype == torch.float32}
    assert all("inv_freq" in n or "e_score_correction_bias" in n for n in kept)
    assert any("inv_freq" in n for n in kept)


def test_a_factory_without_weights_refuses_to_load():
    with pytest.raises(ModelError, match=r"has no weights.*shapes only"):
        next(resolve("llama-3.2-1b", device="cpu").load())


def test_a_model_directory_comes_before_a_bundled_name(tmp_path, monkeypatch):
    save_tiny(tmp_path / "llama-3.2-1b", "llama")
    monkeypatch.chdir(tmp_path)
    assert resolve("llama-3.2-1b").weights == "checkpoint"
    monkeypatch.chdir("/")
    assert resolve("llama-3.2-1b").weights == "none"


def test_a_config_that_is_refused_says_which_field_and_why():
    with pytest.raises(ModelError, match=r"hidden_size.*int"):
        resolve({"model_type": "llama", "hidden_size": "x"})


def test_config_object_and_dictionary():
    config = tiny_config("qwen3")
    by_object = resolve(config, device="cpu")
    by_dict = resolve(config.to_dict(), device="cpu")
    assert by_object.weights == by_dict.weights == "none"
    shapes = {n: t.shape for n, t in by_object.tensors.items()}
    assert shapes == {n: t.shape for n, t in by_dict.tensors.items()}


def test_the_users_config_is_left_alone():
    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    before = config.to_json_string()
    resolve(config, dtype="bfloat16", device="cpu").build()
    assert config.to_json_string() == before


@pytest.mark.parametrize(
    ("given", "meant"), [("llama-3.1-8", "llama-3.1-8b"), ("Qwen3-06b", "qwen3-0.6b"), ("dmo", "demo")]
)
def test_a_misspelt_name_gets_the_nearest_one(given, meant):
    with pytest.raises(ModelError, match=f"did you mean '{meant}'"):
        resolve(given)


def test_a_hub_id_without_network_fails_fast_and_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(
        ModelError,
        match=r"'owner/model' is not in the local Hugging Face cache.*HF_HUB_OFFLINE.*local directory",
    ):
        resolve("owner/model")
    assert time.monotonic() - began < 30
    with pytest.raises(ModelError, match=r"bundled: demo, deepseek-v3"):
        resolve("zzzz")


def _hub_error(kind, **more):
    import httpx

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x/y"))
    return getattr(huggingface_hub.errors, kind)("no", response=response)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GatedRepoError", "gated.*accept its terms.*log in"),
        ("RepositoryNotFoundError", "no repository 'owner/model'.*spelling"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
    ],
)
def test_hub_refusals_are_one_sentence_each(monkeypatch, kind, says):
    def refuse(*args, **kwargs):
        raise _hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=says):
        resolve("owner/model", revision="v9")


def test_a_cached_hub_model_works_offline_and_takes_only_the_index_files(monkeypatch, tmp_path):
    """snapshot_download is the only door to the hub: small files first, the weights at the first read."""
    model = save_tiny(tmp_path, "llama")
    asked = []

    def snapshot(repo, *, revision, allow_patterns, **rest):
        asked.append((repo, revision, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    factory = resolve("owner/model", device="cpu")
    factory.build()
    assert len(asked) == 1
    assert not any("safetensors" in p and not p.endswith(".json") for p in asked[0][2])
    assert torch.equal(
        dict(factory.load(["model.norm.weight"]))["model.norm.weight"], model.model.norm.weight
    )
    shards = sorted(p.name for p in tmp_path.glob("model-*.safetensors"))
    assert asked[1] == ("owner/model", tmp_path.name, tuple(shards))


@pytest.mark.parametrize("given", ["./nowhere", "/no/such/dir", "a/b/c", "~/nowhere/"])
def test_paths_that_are_not_there(given):
    with pytest.raises(ModelError, match="no directory"):
        resolve(given)


@pytest.mark.parametrize("given", ["", " "])
def test_an_empty_name_is_called_empty(given):
    with pytest.raises(ModelError, match="the model's name is empty: give 'demo'"):
        resolve(given)


@pytest.mark.parametrize("rest", ["", "/", "/tree/main", "?x=1"])
def test_the_address_of_a_model_gives_its_id(rest):
    with pytest.raises(ModelError, match=r"is an address, not a model: give the hub id 'Org/Name-1\.5'$"):
        resolve(f"https://example.com/Org/Name-1.5{rest}")
    with pytest.raises(ModelError, match="no directory"):
        resolve(f"https://example.com/Org{rest.replace('/', '')}")


def test_files_and_directories_that_are_no_model(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match="not valid JSON"):
        resolve(tmp_path)
    with pytest.raises(ModelError, match="is a file"):
        resolve(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ModelError, match="'no_such_type'"):
        resolve(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        resolve(tmp_path)


@pytest.mark.parametrize("config", [ViTConfig(), T5Config()])
def test_configs_without_a_causal_language_model(config):
    with pytest.raises(ModelError, match="no causal language model"):
        resolve(config)


@pytest.mark.parametrize("given", [3, None, torch.nn.Linear(1, 1)])
def test_things_that_are_not_models(given):
    with pytest.raises(ModelError, match=r"not (int|NoneType|Linear)"):
        resolve(given)


def test_unknown_dtype_gets_the_nearest():
    with pytest.raises(ModelError, match="did you mean 'bfloat16'"):
        resolve("llama-3.2-1b", dtype="bfloat")
    assert resolve("llama-3.2-1b", dtype=torch.float16).dtype == torch.float16


def test_impossible_sizes_are_a_model_error():
    values = {**GPT2Config().to_dict(), "n_embd": 10, "n_head": 3}
    with pytest.raises(ModelError, match="cannot build"):
        resolve(values, device="cpu").build()


def test_eos_ids_come_from_the_generation_config_first(tmp_path):
    save_tiny(tmp_path, "llama")
    assert resolve(tmp_path, device="cpu").eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert resolve(tmp_path, device="cpu").eos_token_ids == (5, 7)


# --- tokenizers


def _save_tokenizer(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>").save_pretrained(directory)


def test_tokenizer_of_a_directory(tmp_path):
    save_tiny(tmp_path, "llama")
    edit_config(tmp_path)
    _save_tokenizer(tmp_path)
    assert resolve(tmp_path, device="cpu").tokenizer()("a b a")["input_ids"] == [1, 2, 1]


def test_a_missing_or_broken_tokenizer_is_a_warning_with_its_reason(tmp_path):
    save_tiny(tmp_path, "llama")
    factory = resolve(tmp_path, device="cpu")
    with pytest.warns(UserWarning, match=r"has no tokenizer files.*token ids"):
        assert factory.tokenizer() is None
    _save_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    factory = resolve(tmp_path, device="cpu")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert factory.tokenizer() is None
    assert str(tmp_path) in factory.why_no_tokenizer


def test_a_config_that_was_read_from_a_directory_tells_no_path(tmp_path):
    save_tiny(tmp_path / "mine", "llama")
    config = AutoConfig.from_pretrained(tmp_path / "mine")
    assert resolve(config).name == "mine"
    config.name_or_path = "some/hub-id"
    assert resolve(config).name == "some/hub-id"


def test_the_demo_model_comes_with_weights_and_tokenizer():
    factory = resolve("demo", device="cpu")
    assert factory.weights == "checkpoint"
    assert factory.name == "demo"
    assert factory.check_checkpoint().ok
    assert factory.tokenizer() is not None
    assert factory.eos_token_ids
    assert {t.device.type for _, t in factory.load()} == {"cpu"}


def test_the_whole_models_config_decides_on_tied_embeddings():
    whole = tiny_config("gemma3")
    whole.tie_word_embeddings, whole.text_config.tie_word_embeddings = True, False
    factory = resolve(whole)
    assert factory.config.tie_word_embeddings
    assert factory.tied
    assert not whole.text_config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["emu3", "mllama"])
def test_a_text_model_that_only_its_whole_model_is_mapped_for(kind, tmp_path):
    config, model = tiny(kind)
    model.save_pretrained(tmp_path)
    text = model.config
    assert type(text) is not type(config)
    for given in (tmp_path, text):
        assert type(resolve(given).build()) is type(model)
    whole = resolve(config)
    assert whole.nested
    assert type(whole.build()) is type(model)
