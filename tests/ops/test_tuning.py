"""Settings are measured once, remembered on disk, and never a reason to stop."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.errors import TritonError

from adkit.ops.triton import tuning

WAYS = [{"BLOCK": 16}, {"BLOCK": 32}, {"BLOCK": 64}]
FILE = "A_GPU-triton_3.6.json"


class Machine:
    """A stand-in for a GPU on which larger blocks are faster; ``runs`` counts measured launches."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def run(self, settings: dict[str, Any], *streamed: torch.Tensor) -> None:
        self.runs.append(settings)

    def seconds(self, calls: Any) -> float:
        calls[0]()
        return 1 / float(self.runs[-1]["BLOCK"])

    def best(self, *key: Any, ways: Any = WAYS, **options: Any) -> dict[str, Any]:
        return tuning.best("kernel", key, ways, self.run, **options)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine()
    monkeypatch.setenv("ADKIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_device", lambda: FILE)
    monkeypatch.setattr(tuning, "seconds", made.seconds)
    monkeypatch.setattr(tuning, "_cache_bytes", lambda: 100)
    monkeypatch.setattr(tuning.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget(monkeypatch)
    return made


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(tuning, "_found", {})
    tuning._read.cache_clear()


def test_the_fastest_is_measured_once(machine: Machine) -> None:
    assert machine.best(64, "bfloat16") == {"BLOCK": 64}
    measured = len(machine.runs)
    assert machine.best(64, "bfloat16") == {"BLOCK": 64}
    assert len(machine.runs) == measured
    machine.best(128, "bfloat16")
    assert len(machine.runs) == 2 * measured


def test_candidates_compile_side_by_side(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.os, "cpu_count", lambda: 3)
    all_there = threading.Barrier(3)
    first: set[int] = set()

    def run(settings: dict[str, Any]) -> None:
        machine.run(settings)
        if settings["BLOCK"] not in first:
            first.add(settings["BLOCK"])
            all_there.wait(timeout=60)

    assert tuning.best("kernel", (64,), WAYS, run) == {"BLOCK": 64}
    assert not all_there.broken


def test_nothing_is_measured_where_a_quick_start_is_asked_for(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADKIT_TUNE", "0")
    assert machine.best(64) == WAYS[0]
    assert machine.runs == []
    monkeypatch.delenv("ADKIT_TUNE")
    assert machine.best(64) == {"BLOCK": 64}
    monkeypatch.setenv("ADKIT_TUNE", "0")
    assert machine.best(64) == {"BLOCK": 64}, "what is known is used"


def test_a_new_process_reads_what_the_last_one_found(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine.best(64)
    assert json.loads((tmp_path / "tuned" / FILE).read_text()) == {"kernel 64": {"BLOCK": 64}}
    forget(monkeypatch)
    machine.runs.clear()
    assert machine.best(64) == {"BLOCK": 64}
    assert machine.runs == []


def test_settings_that_are_no_candidates_any_more_are_measured_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.best(64)
    forget(monkeypatch)
    assert machine.best(64, ways=WAYS[:2]) == {"BLOCK": 32}


def test_what_comes_with_adkit_needs_no_measuring(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = tmp_path / "shipped.json"
    shipped.write_text(json.dumps({"kernel 64": {"BLOCK": 16}}))
    monkeypatch.setattr(tuning, "_packaged_file", lambda: shipped)
    assert machine.best(64) == {"BLOCK": 16}
    assert machine.runs == []


def test_the_interpreter_takes_the_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.triton.knobs.runtime, "interpret", True)
    assert machine.best(64) == WAYS[0]
    assert machine.runs == []


def test_while_a_graph_is_captured_nothing_is_measured_or_kept(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert machine.best(64) == WAYS[0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert machine.best(64) == {"BLOCK": 64}


@pytest.mark.parametrize("content", ["", '{"kernel 64": {"BLO', "[1]", '{"kernel 64": 3}'])
def test_a_damaged_file_is_written_anew(machine: Machine, tmp_path: Path, content: str) -> None:
    file = tmp_path / "tuned" / FILE
    file.parent.mkdir()
    file.write_text(content)
    assert machine.best(64) == {"BLOCK": 64}
    assert json.loads(file.read_text())["kernel 64"] == {"BLOCK": 64}


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    monkeypatch.setenv("ADKIT_CACHE_DIR", str(in_the_way))
    assert machine.best(64) == {"BLOCK": 64}


def test_settings_that_do_not_compile_are_left_out(machine: Machine) -> None:
    def run(settings: dict[str, Any]) -> None:
        if settings["BLOCK"] > limit:
            raise TritonError("too large")
        machine.run(settings)

    limit = 32
    assert tuning.measure(WAYS, run) == [1 / 16, 1 / 32, math.inf]
    assert tuning.best("kernel", (1,), WAYS, run) == {"BLOCK": 32}
    limit = 0
    with pytest.raises(TritonError, match="too large"):
        tuning.best("kernel", (2,), WAYS, run)


def test_timed_calls_go_round_copies_that_no_cache_holds(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.arange(10, dtype=torch.int8)
    seen: list[int] = []

    def run(settings: dict[str, Any], given: torch.Tensor) -> None:
        assert torch.equal(given, weight)
        seen.append(given.data_ptr())

    monkeypatch.setattr(tuning, "seconds", lambda calls: float(len([c() for c in calls])))
    assert tuning.measure(WAYS[:1], run, (weight,)) == [20]  # twice the cache of 100 bytes
    assert len(set(seen)) == 20
    assert seen[0] == weight.data_ptr()
    large = torch.zeros(1000, dtype=torch.int8)
    weight = large
    assert tuning.measure(WAYS[:1], run, (large,)) == [1]


@pytest.mark.parametrize(
    "file", sorted(Path(tuning.__file__).parent.glob("tuned/*.json")), ids=lambda p: p.stem
)
def test_shipped_settings_of_linears_are_such_that_tuning_would_try(file: Path) -> None:
    """What is no candidate any more would be measured anew at every start, and nobody told."""
    from adkit.ops.triton import linear

    shipped = {tuple(name.split()): s for name, s in json.loads(file.read_text()).items()}
    found = {name[1:]: s for name, s in shipped.items() if name[0] == "linear"}
    assert found
    for (rows, features, width, around, dtype), settings in found.items():
        weight = torch.empty(int(features), int(width), dtype=getattr(torch, dtype), device="meta")
        parts = around.split("+")
        wide = parts[0] == "norm(float32)"
        x = torch.empty(int(rows), int(width), dtype=torch.float32 if wide else weight.dtype, device="meta")
        act = next((p for p in parts if p in ("silu", "gelu", "gelu_tanh")), None)
        outs = int(features) // (1 if act is None else 2)
        layer = linear.Layer(
            x,
            bias=weight[:, 0] if "bias" in parts else None,
            norm_weight=None,
            residual=x.new_empty(int(rows), outs) if "sum" in parts else None,
            eps=1e-6 if parts[0].startswith("norm") else None,
            offset=0.0,
            in_float=False,
            act=act,
        )
        assert tuple(map(str, linear.key(layer, weight))) == (rows, features, width, around, dtype)
        assert settings in linear.ways(layer, weight), (around, rows, features, width, settings)
