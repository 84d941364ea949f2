"""`adkit bench accuracy`: right numbers pass, wrong ones do not."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from adkit import cli
from adkit.bench import accuracy
from adkit.contract import ConfigError
from tests.zoo import tiny_config

QUIET = {"progress": False, "show": lambda line: None}
SMALL = {"layers": 1, "sequences": 2, "prompt": 6, "new": 3, **QUIET}


@pytest.mark.slow
def test_the_demo_model_is_right(tmp_path):
    out = tmp_path / "a.json"
    result = CliRunner().invoke(
        cli.app,
        ["bench", "accuracy", "demo", "--tasks", "6", "--sequences", "10", "--new", "16", "--out", str(out)],
    )
    assert result.exit_code == 0, result.output
    row = json.loads(out.read_text())
    assert row["ok"] is True
    assert row["judged"] == "raw"
    assert "conditioned" not in row
    assert 1e-4 < row["raw"]["rmse_ratio"] < accuracy.DENSE
    assert row["tasks"] == {name: {"problems": 6, "correct": 6} for name in ("addition", "recall")}
    assert row["greedy_float32"] == {"prompts": 4, "tokens": 256, "same": [256] * 4, "equal": True}
    assert "demo" in result.stdout
    assert "its weights: ok, rmse ratio" in result.stdout


@pytest.mark.slow
def test_wrong_logits_are_out_of_bounds(monkeypatch):
    """The engine's logits are shifted by a little of their own size, as a wrong kernel would."""
    right = accuracy._engine_logits

    def wrong(*args):
        logits = right(*args)
        return logits + 0.05 * logits.std() * torch.randn(
            logits.shape, generator=torch.Generator().manual_seed(0)
        )

    monkeypatch.setattr(accuracy, "_engine_logits", wrong)
    lines = []
    row = accuracy.measure("qwen3-0.6b", **{**SMALL, "show": lines.append})
    for kind in ("raw", "conditioned"):
        assert row[kind]["rmse_ratio"] == pytest.approx(0.05, rel=0.1)
        assert row[kind]["hf_rmse_ratio"] < accuracy.DENSE
    assert row["judged"] == "conditioned"
    assert row["ok"] is False
    assert "OUT OF BOUNDS" in lines[0]
    assert row["layers"] == 1


@pytest.mark.slow
def test_a_model_that_cannot_be_conditioned_is_judged_as_it_is():
    lines = []
    row = accuracy.measure(tiny_config("olmo2"), **{**SMALL, "layers": None, "show": lines.append})
    assert row["judged"] == "raw"
    assert "neither an embedding nor the output of a linear layer" in row["not_conditioned"]
    assert "conditioned" not in row
    assert "raw random weights: ok" in lines[0]


def test_agreement_tells_what_a_dtype_and_a_bound_cannot_decide():
    reference = torch.tensor([[4.0, 1.0], [4.0, 4.01], [4.0, 4.2], [1.0, 3.0]])
    ours = torch.tensor([[4.0, 1.0], [4.0, 3.99], [4.0, 3.9], [3.0, 1.0]])
    # rms 4.1: at a bound of 0.02 a difference of 0.35 is needed
    assert accuracy._agreement(reference, ours, torch.bfloat16, 0.02) == {
        "all": 0.25, "decided": 0.33333, "separated": 0.5, "undecided_share": 0.25, "inseparable_share": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"sequences": 0}, {"new": 0}, {"prompt": 0}, {"tasks": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is 0; give at least 1"):
        accuracy.measure("demo", **{**SMALL, **wrong})


def test_sizes_that_a_model_has_no_use_for_are_refused():
    with pytest.raises(ConfigError, match="the demo's prompts are stories and tasks"):
        accuracy.measure("demo", prompt=6, **QUIET)
    with pytest.raises(ConfigError, match="tasks are the demo's"):
        accuracy.measure("qwen3-0.6b", **{**SMALL, "tasks": 3})
    with pytest.raises(
        ConfigError, match="prompt 6 and 1100 new tokens make 1106, and demo has 1024 positions"
    ):
        accuracy.measure("demo", **{**SMALL, "new": 1100})
