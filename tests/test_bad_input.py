"""Issue 2's list of bad input, each through the Workbench: one clear error, and everything usable
afterwards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import adkit
from adkit import SamplingParams
from adkit.contract import CheckpointError, ConfigError, MemoryLimitError, ModelError, RequestError


@pytest.fixture(scope="module")
def llm(exported):
    return exported(max_batch_size=4).llm()


@pytest.fixture
def broken(llama_dir, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(llama_dir, tmp_path / "broken")


def bench(model, **options):
    return adkit.Workbench(model, device="cpu", max_seq_len=64, page_size=4, progress=False, **options)


def test_an_unknown_model_name():
    with pytest.raises(ModelError, match=r"'qwen3-8c'; did you mean 'qwen3-8b'"):
        bench("qwen3-8c")


def test_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"'someone/some-model' is not in the local .*give a local directory"
    ):
        bench("someone/some-model")


def test_an_object_that_is_no_model():
    with pytest.raises(ModelError, match="a model is a name, a directory"):
        bench(42)


def test_a_gated_repository(monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, **kwargs):
        raise GatedRepoError(
            "403", response=httpx.Response(403, request=httpx.Request("GET", "https://example.org"))
        )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match="gated repository: accept its terms"):
        bench("someone/gated")


def test_a_missing_tokenizer_leaves_token_ids(llm):
    with pytest.raises(RequestError, match=r"has no tokenizer files .*; give a list of token ids"):
        llm.generate("hello")
    assert llm.generate([5, 6, 7], SamplingParams(max_tokens=3), progress=False).token_ids


@pytest.mark.parametrize(
    "damage", ["truncated", "garbage", "missing tensor", "wrong shape", "integers", "no file"]
)
def test_a_damaged_checkpoint_keeps_the_graph(broken, llama_dir, damage):
    from safetensors.torch import load_file, save_file

    path = broken / "model.safetensors"
    name = "model.layers.0.mlp.down_proj.weight"
    match damage:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1000])
        case "garbage":
            path.write_bytes(b"\xff" * 100)
        case "no file":
            path.unlink()
        case _:
            tensors = load_file(path)
            if damage == "missing tensor":
                del tensors[name]
            else:
                tensors[name] = (
                    tensors[name][:3].clone() if damage == "wrong shape" else tensors[name].to(torch.int8)
                )
            save_file(tensors, path, metadata={"format": "pt"})
    made = []

    def load():
        made.append(bench(broken))
        made[0].run()

    with pytest.raises(CheckpointError) as caught:
        load()
    message = str(caught.value)
    assert "Traceback" not in message
    assert name in message if damage in ("missing tensor", "wrong shape", "integers") else "broken" in message
    if made:
        wb = made[0]
        assert wb.steps[wb.position].name == "load_weights"
        assert not wb.loaded
        shutil.copy(llama_dir / "model.safetensors", path)
        # A Workbench remembers the file's table of contents, so the mended file takes a new one.
        assert bench(broken).run(until="load_weights").loaded


def test_a_broken_config_file(broken):
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        bench(broken)
    (broken / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"config\.json holds a list, and a config\.json is an object"):
        bench(broken)


@pytest.mark.parametrize("dtype", ["float8", "int8", "bf16"])
def test_a_wrong_dtype(llama_dir, dtype):
    with pytest.raises(ConfigError, match=f"dtype = '{dtype}'"):
        bench(llama_dir, dtype=dtype)


def test_an_unknown_option(llama_dir):
    with pytest.raises(ConfigError, match="unknown setting 'max_seq_length'; did you mean 'max_seq_len'"):
        bench(llama_dir, max_seq_length=5)


def test_an_unknown_transform_or_field(llama_dir):
    with pytest.raises(ConfigError, match="did you mean 'fuse_gemms'"):
        bench(llama_dir, overrides=["transforms.fuse_gemm.enabled=false"])
    with pytest.raises(ConfigError, match="did you mean 'enabled'"):
        bench(llama_dir, overrides=["transforms.fuse_gemms.enable=false"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5] * 64, "The prompt has 64 tokens; max_seq_len is 64"),
        ([], "empty"),
        ([[5], []], "Prompt 1: The prompt is empty"),
        ("", "empty string"),
        ([5, 131], r"Token id 131 at position 1 .* \(0 to 130\)"),
        ([-1], "Token id -1 at position 0"),
        ([[5.5]], "integers"),
        ([True, False], r"token ids \(integers\): True is none"),
        ([[5, 6], [5, False]], r"Prompt 1: .*token ids \(integers\): False is none"),
        (torch.tensor([True, True]), "True is none"),
        ({"a": 1}, "prompts is a dict"),
    ],
)
def test_a_prompt_that_cannot_be_served(llm, prompt, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, progress=False)
    assert llm.generate([5, 6, 7], SamplingParams(max_tokens=3), progress=False).token_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("logprobs", 21),
        ("stop", ("",)),
    ],
)
def test_sampling_values_out_of_range(field, value):
    with pytest.raises(RequestError, match=f"SamplingParams.{field} is .*; expected"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ({"page_size": 10**9}, "a shorter max_seq_len or smaller pages"),
        ({"max_batch_size": 10**8}, "a smaller max_batch_size"),
        ({"max_batch_size": 1, "max_num_tokens": 1, "max_seq_len": 1}, "a smaller dtype"),
    ],
)
def test_advice_on_memory_begins_with_the_largest_part(sizes, advice):
    estimate = adkit.Workbench("demo", device="cpu", progress=False, **sizes).memory_estimate()
    with pytest.raises(MemoryLimitError, match=f"free: use {advice}"):
        replace(estimate, free=10_000).require()


def test_out_of_memory_for_the_weights(exported, monkeypatch):
    monkeypatch.setattr("adkit.models.memory.free_bytes", lambda device: 10_000)
    wb = exported()
    with pytest.raises(
        MemoryLimitError,
        match=r"tiny-llama needs at least .* and cpu has 10.0 kB free: use .*a smaller dtype",
    ):
        wb.llm()
    assert wb.steps["match_linear"].status == "done"
    assert wb.check("match_linear").ok
    monkeypatch.undo()
    assert wb.llm().generate([5], SamplingParams(max_tokens=2), progress=False).token_ids


@pytest.mark.parametrize(
    ("target", "step", "message"),
    [
        (
            "adkit.passes.weight_load.load_weights.load_graph_tensors",
            "load_weights",
            "to load the weights: use a smaller dtype.*3 GiB",
        ),
        (
            "adkit.contract.CachePool.allocate",
            "initialize_cache",
            "for the cache: lower free_gpu_memory_fraction.*3 GiB",
        ),
    ],
)
def test_out_of_memory_that_no_estimate_foresaw(exported, monkeypatch, target, step, message):
    def full(*args):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(target, full)
    wb = exported()
    with pytest.raises(MemoryLimitError, match=f"no memory left on cpu {message}"):
        wb.llm()
    assert wb.steps[wb.position].name == step
    monkeypatch.undo()
    assert wb.llm().generate([5], SamplingParams(max_tokens=2), progress=False).token_ids


def test_out_of_memory_for_the_cache(exported, monkeypatch):
    wb = exported().run(until="insert_cached_attention")
    monkeypatch.setattr("adkit.models.memory.free_bytes", lambda device: 10_000)
    with pytest.raises(
        MemoryLimitError, match=r"max_seq_len=64 tokens takes .* kB and 9.0 kB may be used on cpu.*lower"
    ):
        wb.llm()
    assert wb.steps[wb.position].name == "initialize_cache"
    monkeypatch.undo()
    assert wb.llm().generate([5], SamplingParams(max_tokens=2), progress=False).token_ids


def test_generating_without_weights():
    wb = bench("llama-3.2-1b")
    with pytest.raises(ModelError, match=r"'llama-3.2-1b' has no weights.*random_weights=True"):
        wb.llm()
    assert wb.run(until="factory").position == 1


def test_without_compilation_there_is_no_engine(exported):
    wb = exported().disable("compile_model")
    with pytest.raises(adkit.AdkitError, match=r"compile_model did not run \(disabled\)"):
        wb.llm()
    wb.enable("compile_model")
    assert wb.llm().generate([5], SamplingParams(max_tokens=2), progress=False).token_ids


def test_a_pickle_checkpoint_is_refused_unless_asked_for(broken):
    from safetensors.torch import load_file

    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(tensors, broken / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        bench(broken).run(until="load_weights")
    assert bench(broken, allow_pickle=True).run(until="load_weights").loaded


def test_code_of_the_model_is_not_run_by_default(broken, tmp_path):
    ran = tmp_path / "ran"
    config = json.loads((broken / "config.json").read_text())
    config.update(
        model_type="my_own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
    )
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        bench(broken)
    assert not ran.exists()
