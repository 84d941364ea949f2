"""benchmarks/gpu.py: a case of its table runs on a tiny model, failures do not stop the others."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import gpu


def test_every_case_is_a_command_with_goals():
    names = [c.name for c in gpu.CASES]
    assert len(set(names)) == len(names)
    goals = {(c.name, n): value for c in gpu.CASES for n, _, value in c.goals}
    assert goals == {
        ("llama-3.1-8b", 1): 182, ("llama-3.2-1b", 1): 920, ("qwen3-0.6b", 1): 1000, ("qwen3-0.6b", 32): 20000,
        ("throughput-llama-3.1-8b", 2048): 16000, ("throughput-qwen3-0.6b", 256): 17000, ("qwen3-30b-a3b", 1): 250,
        ("prefill", 1): 570e12,
    }  # fmt: skip


@pytest.mark.slow
def test_a_case_runs_and_a_failing_one_is_told(tmp_path, monkeypatch, capsys):
    arguments = [
        "--tiny",
        "--no-peers",
        "--only",
        "qwen3-0.6b,prefill",
        "--out",
        str(tmp_path),
        "--prefix",
        "t",
    ]
    monkeypatch.setattr(gpu, "CASES", tuple(
        gpu.Case(**{**vars(c), "tiny": ("--prompt", "nonsense")}) if c.name == "prefill" else c for c in gpu.CASES
    ))  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--", "--set", "device=cpu"])
    assert gpu.main() == 1
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0].split()[:4] == ["case", "requests", "target", "reached"]
    assert [line.split()[:3] for line in table[1:3]] == [
        ["qwen3-0.6b", "1", "1,000"],
        ["qwen3-0.6b", "32", "20,000"],
    ]
    assert "FAILED: ended with status" in table[3]
    rows = json.loads((tmp_path / "t_qwen3-0.6b.json").read_text())["rows"]
    assert [r["requests"] for r in rows] == [1, 32]
    assert not (tmp_path / "t_prefill.json").exists()
    assert "decode latency of qwen3-0.6b" in (tmp_path / "t_figures.svg").read_text()


def test_a_wrong_case_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "llama-8b"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "no case llama-8b; known: llama-3.2-1b" in capsys.readouterr().err
