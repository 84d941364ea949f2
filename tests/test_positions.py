"""Learned positions end where their table does; rotary ones may go on, and it is said."""

from __future__ import annotations

import warnings

import pytest

import adkit
from adkit.contract import RequestError
from tests.zoo import tiny


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_prompts_and_outputs_end_at_the_last_learned_position(kind, tmp_path):
    _, model = tiny(kind, n_positions=32, max_position_embeddings=32)
    model.save_pretrained(tmp_path)
    wb = adkit.Workbench(tmp_path, device="cpu", dtype="float32", max_seq_len=128, progress=False)
    llm = wb.llm()
    with pytest.raises(RequestError, match="33 tokens; the model has learned 32 positions"):
        llm.generate([list(range(1, 34))])
    params = adkit.SamplingParams(max_tokens=100, ignore_eos=True)
    done = llm.generate(list(range(1, 31)), params)
    assert len(done.token_ids) == 3  # two more positions, and the token after the last
    assert done.finish_reason == "length"


def test_a_model_with_rotary_positions_has_no_such_limit(tmp_path):
    _, model = tiny("llama")
    model.save_pretrained(tmp_path)
    wb = adkit.Workbench(tmp_path, device="cpu", max_seq_len=64, progress=False).run()
    assert wb._state.compiled.max_positions is None


def test_passing_the_positions_that_the_config_names_is_told_once(tmp_path):
    _, model = tiny("llama", max_position_embeddings=24)
    model.save_pretrained(tmp_path)
    llm = adkit.LLM(tmp_path, device="cpu", max_seq_len=64, progress=False)
    within = adkit.SamplingParams(max_tokens=5, ignore_eos=True)  # the last token has no position
    beyond = adkit.SamplingParams(max_tokens=6, ignore_eos=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.generate([list(range(1, 21))] * 2, within)
    with pytest.warns(RuntimeWarning, match="passed position 24.*max_seq_len=24") as told:
        done = llm.generate([list(range(1, 21))] * 2, beyond)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.generate([list(range(1, 31))], beyond)
    assert [len(d.token_ids) for d in done] == [6, 6]


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        (None, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        # Qwen's way to write YaRN, and DeepSeek's: the scaled length is not, and is, the one that the config names.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 16,
          "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 64),
    ],
)  # fmt: skip
def test_positions_that_a_config_names(rope, positions):
    scaled = {} if rope is None else {"rope_parameters": {"rope_theta": 1e4, **rope}}
    config = tiny("llama", max_position_embeddings=64, **scaled)[0]
    assert adkit.Workbench(config, progress=False).factory.positions == positions


def test_a_config_without_positions():
    assert adkit.Workbench(tiny("bloom")[0], progress=False).factory.positions is None
