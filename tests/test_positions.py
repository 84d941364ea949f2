"""Models that look positions up in a learned table serve no more than it holds."""

from __future__ import annotations

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
