"""`adkit bench accuracy`: right numbers pass, wrong ones do not."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from adkit import cli
from adkit.bench import accuracy
from adkit.contract import ConfigError

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
    assert 1e-4 < row["rmse_ratio"] < accuracy.DENSE
    assert row["tasks"] == {name: {"problems": 6, "correct": 6} for name in ("addition", "recall")}
    assert row["greedy_float32"] == {"prompts": 4, "tokens": 256, "same": [256] * 4, "equal": True}
    assert "demo" in result.stdout
    assert "ok, rmse ratio" in result.stdout


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
    assert row["rmse_ratio"] == pytest.approx(0.05, rel=0.1)
    assert row["ok"] is False
    assert "OUT OF BOUNDS" in lines[0]
    assert row["layers"] == 1


def test_agreement_tells_what_a_dtype_cannot_decide():
    reference = torch.tensor([[4.0, 1.0], [4.0, 4.01], [1.0, 3.0]])
    ours = torch.tensor([[4.0, 1.0], [4.0, 3.99], [3.0, 1.0]])
    assert accuracy._agreement(reference, ours, torch.bfloat16) == {
        "all": 0.33333, "decided": 0.5, "undecided_share": 0.33333,
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"sequences": 0}, {"new": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match="give at least 1"):
        accuracy.measure("demo", **{**SMALL, **wrong})
