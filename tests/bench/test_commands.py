"""`adkit bench` on small models: every figure is there, peers included, and bad input is one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from adkit import cli
from adkit.bench import latency, peers, prefill, throughput
from adkit.bench.subject import Subject
from adkit.bench.timeline import Timeline, throughput_figures
from adkit.bench.workload import Lengths, Room, make_workload
from adkit.contract import ConfigError
from adkit.models import resolve

QUIET = {"progress": False, "show": lambda line: None}


def call(*args):
    result = CliRunner().invoke(cli.app, ["bench", *map(str, args)])
    return result, "" if result.exception is None else str(result.exception)


@pytest.mark.slow
def test_latency_beside_peers(tmp_path):
    out, plot = tmp_path / "x.json", tmp_path / "x.svg"
    result, _ = call(
        "latency", "demo", "--batch", 1, "--batch", 3, "--prompt", 8, "--new", 6, "--vs", "hf, hf-static-compile",
        "--set", "max_batch_size=4", "--out", out, "--plot", plot,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    found = [(r["engine"], r["requests"]) for r in data["rows"]]
    assert found == [(e, b) for e in ("adkit", "hf", "hf-static-compile") for b in (1, 3)]
    for row in data["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["steps_per_second"] * row["requests"], rel=0.01)
        assert 0 < row["first_token_seconds"]["p50"] <= row["first_token_seconds"]["p99"]
        assert 0 < row["inter_token_seconds"]["p50"] <= row["inter_token_seconds"]["p99"]
        share = row["steps_per_second"] * data["work"]["weight_bytes_one_token"]
        share /= data["ceilings"]["read_bytes_per_second"]
        assert row["read_bandwidth_share"] == pytest.approx(share, abs=2e-3)
    assert data["settings"]["max_batch_size"] == 4
    assert data["command"].startswith("adkit")
    assert str(tmp_path) not in out.read_text()
    lines = result.stdout.splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("decode latency of demo, prompt 8, 6 new tokens: float32 on ")
    assert lines[0].endswith("TFLOP/s), weights: checkpoint")
    assert [line for line in lines if "not compiled" in line] == lines[5:]
    assert plot.read_text().count("hf-static-compile, batch 3") == 1


@pytest.mark.slow
def test_throughput_drains_every_request(tmp_path):
    result = throughput.measure("demo", requests=9, prompt="4-20", new="2-12", vs=["hf"], **QUIET)
    ours, theirs = result["rows"]
    assert ours["output_tokens"] == theirs["output_tokens"] == result["workload"]["new_tokens"]
    assert result["settings"]["max_batch_size"] == 9
    assert ours["preemptions"] == 0
    assert 1 < ours["batch_occupancy"] <= 9
    rate = ours["output_tokens_per_second"]
    assert ours["limit_share"] == pytest.approx(rate / result["limit_output_tokens_per_second"], abs=1e-3)
    total = result["workload"]["prompt_tokens"] + result["workload"]["new_tokens"]
    assert ours["total_tokens_per_second"] == pytest.approx(total / ours["seconds"], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "cut"), [(60.0, False), (0.2, True)])
def test_continuous_batching_is_a_peer_and_can_be_stopped(limit, cut):
    load = make_workload(4, Lengths(6, 9), Lengths(100, 120), 300, seed=0)

    def figures(run, load):
        return throughput_figures(run(load), [len(p) for p in load.prompts])

    rows = []
    peers.measure(
        ["hf-continuous"], resolve("demo", device="cpu"), torch.device("cpu"), [load], figures, limit=limit,
        progress=False, add=rows.append,
    )  # fmt: skip
    [row] = rows
    assert "error" not in row
    assert row.get("cut", False) is cut
    assert 0 < row["output_tokens"] <= load.new_tokens
    assert (row["output_tokens"] == load.new_tokens) is not cut


def test_prefill_counts_the_models_own_work():
    result = prefill.measure("demo", prompt=32, vs=["hf"], **QUIET)
    for row in result["rows"]:
        flops = row["flops_per_second"] * row["seconds"]
        assert flops == pytest.approx(result["workload"]["model_flops"], rel=0.01)
    assert [r["engine"] for r in result["rows"]] == ["adkit", "hf"]


def test_a_peer_that_fails_is_reported_and_the_rest_goes_on(monkeypatch):
    @contextmanager
    def broken(model, load, limit, progress):
        raise RuntimeError("no such kernel")
        yield

    monkeypatch.setitem(peers.PEERS, "hf-continuous", broken)
    lines = []
    result = throughput.measure(
        "demo", requests=2, prompt=4, new=2, vs=["hf-continuous", "hf"], progress=False, show=lines.append
    )
    assert result["rows"][1]["error"] == "RuntimeError: no such kernel"
    assert result["rows"][2]["output_tokens"] == 4
    assert "failed: RuntimeError: no such kernel" in lines[2]


def test_a_peer_of_whom_no_token_came_says_so(monkeypatch):
    @contextmanager
    def late(model, load, limit, progress):
        yield lambda load: Timeline(0.0, [[] for _ in load.prompts], cut=True)

    monkeypatch.setitem(peers.PEERS, "hf", late)
    result = latency.measure("demo", prompt=4, new=2, vs=["hf"], peer_seconds=0.5, **QUIET)
    assert result["rows"][1]["error"] == (
        "TimeoutError: no token came in the 0.5 s that a peer may take (--peer-seconds)"
    )


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["throughput", "demo", "--requests", "0"], "requests is 0"),
        (["throughput", "demo", "--prompt", "20-10"], "20 is more than 10"),
        (["throughput", "demo", "--new", "some"], "new is 'some'"),
        (["throughput", "demo", "--vs", "hf-continous"], "did you mean 'hf-continuous'"),
        (["latency", "demo", "--batch", "0"], "batch is"),
        (["latency", "demo", "--batch", "3", "--set", "max_batch_size=2"], "batch 3 is to decode at once"),
        (["latency", "demo", "--vs", "hf", "--peer-seconds", "0"], "peer_seconds is 0; give a peer more"),
        (["latency", "demo", "--new", "1"], "new is 1; a rate needs 2 tokens"),
        (["latency", "demo", "--prompt", "100000"], "100000 and 128 new tokens make 100128, and demo has 1024"),
        (["latency", "demo", "--prompt", "1024"], "make 1152, and demo has 1024 positions; ask for less"),
        (["latency", "demo", "--set", "max_seq_len=2"], "make 256, and max_seq_len is 2; ask for less"),
        (["throughput", "demo", "--prompt", "10-100000"], "make 100128, and demo has 1024 positions"),
        (["throughput", "demo", "--new", "2000"], "make 2128, and demo has 1024 positions"),
        (["prefill", "demo", "--prompt", "1025"], "1025 and 1 new tokens make 1026, and demo has 1024 positions"),
        (["prefill", "demo", "--prompt", "64", "--set", "max_seq_len=64"], "make 65, and max_seq_len is 64"),
        (["prefill", "demo", "--prompt", "0"], "prompt is 0"),
        (["prefill", "demo", "--vs", "hf-continuous"], "no peer 'hf-continuous'"),
        (["latency", "demo", "--set", "max_batch_sice=3"], "did you mean 'max_batch_size'"),
        (["latency", "demo", "--plot", "x.gif"], "the extension must be"),
        (["latency", "demo", "--out", "no/such/folder/x.json"], "its folder does not exist"),
        (["latency", "demo", "--out", "."], "it is a folder; give a file name in it"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(args, why):
    result, error = call(*args)
    assert isinstance(result.exception, ConfigError), result.output
    assert why in error
    assert "\n" not in error


@pytest.mark.slow
def test_settings_that_cut_answers_short_are_refused():
    with pytest.raises(ConfigError, match="prompt 4 and 12 new tokens make 16, and max_seq_len is 8"):
        throughput.measure("demo", requests=2, prompt=4, new=12, overrides=["max_seq_len=8"], **QUIET)
    subject = Subject("demo", {"max_seq_len": 8}, overrides=["device=cpu"])
    subject.build()
    with pytest.raises(ConfigError, match="16 new tokens were asked for and 8 came"):
        subject.run(make_workload(2, Lengths(4, 4), Lengths(8, 8), 300, seed=0))


@pytest.mark.parametrize("measure", [latency.measure, throughput.measure, prefill.measure])
def test_lengths_that_nobody_gave_fit_the_model(measure, monkeypatch):
    """The usual 8,192 and 128 tokens are as many as there is room for, and the output says so."""
    monkeypatch.setattr(latency, "WARM_UPS", 0)
    lines = []
    sizes = {"requests": 2} if measure is throughput.measure else {}
    result = measure("demo", overrides=["max_seq_len=9"], progress=False, show=lines.append, **sizes)
    took = result["workload"]["prompt"], result["workload"].get("new")
    if measure is prefill.measure:
        assert took == (8, None)
        assert lines[:-2] == ["prompt: 8 tokens and not the usual 8192, as max_seq_len is 9"]
    else:
        assert tuple(map(int, took)) == (4, 5)
        assert lines[:-2] == [f"{of}: {n} tokens and not the usual 128, as max_seq_len is 9"
                              for of, n in (("prompt", 4), ("new", 5))]  # fmt: skip
    assert result["rows"][0]["engine"] == "adkit"


def test_only_what_was_left_open_is_fitted():
    room = Room.of("demo", [], [])
    said = []
    assert (room.tokens, room.why) == (1025, "demo has 1024 positions")
    assert Room.of("demo", [], [], sampled=False).tokens == 1024  # every token is fed in
    assert room.fit(None, 1, (8192, 1), said.append) == (1024, 1)
    assert room.fit(1000, None, (128, 128), said.append) == (1000, 25)
    assert room.fit(None, 1000, (128, 128), said.append) == (25, 1000)
    assert [line.split(" tokens")[0] for line in said] == ["prompt: 1024", "new: 25", "prompt: 25"]
    assert room.fit(None, None, (128, 128), said.append) == (128, 128)
    assert len(said) == 3
    with pytest.raises(ConfigError, match="prompt 1024 and 128 new tokens make 1152"):
        room.fit(1024, None, (128, 128), said.append, least_new=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("latency", ["--batch", "3", "--prompt", "8", "--new", "4"]),
        ("throughput", ["--requests", "5", "--prompt", "4-9", "--new", "2-6"]),
    ],
)
def test_ranks_that_have_sequences_of_their_own_are_measured(repo_root, tmp_path, kind, sizes):
    out = tmp_path / "x.json"
    command = ["adkit", "bench", kind, "demo", "--tp", "2", "--attention-dp", *sizes, "--set", "device=cpu"]
    strategy = ["--set", "transforms.apply_sharding_hints.allreduce_strategy=NCCL", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", *command, *strategy],
        cwd=repo_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert (result["ranks"], result["attention_dp"], row["attention_dp"]) == (2, True, True)
    assert result["settings"]["strategies"] == {"all_reduce": "NCCL", "all_gather": "AUTO"}
    assert "attention dp" in done.stdout
    made = row["output_tokens"] if kind == "throughput" else row["batch"]
    assert made == (result["workload"]["new_tokens"] if kind == "throughput" else 3)
    assert row["first_token_seconds"]["p50"] > 0
