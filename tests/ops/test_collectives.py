"""Collective kernels: ranks in processes that share memory, code for real GPUs, what cannot travel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.ops.test_triton import ROOT, needs_triton, run


@pytest.mark.slow
@needs_triton
def test_kernels_add_up_and_gather_between_processes_with_the_same_bits_everywhere() -> None:
    file = Path(__file__).with_name("collectives_between_processes.py")
    done = run([str(file)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_gpus() -> None:
    done = run([str(Path(__file__).with_name("collectives_for_gpus.py"))], TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="ranks need a GPU each: run it on a host with two")
def test_every_strategy_on_gpus_adds_up_with_the_same_bits_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    script = str(ROOT / "benchmarks" / "collectives.py")
    done = run([script, "--json", str(file), "--seconds", "20"], TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows = [r for r in json.loads(file.read_text())["rows"] if not r["strategy"].startswith("torch")]
    assert {"ONESHOT", "TWOSHOT", "NCCL"} <= {r["strategy"] for r in rows}
    for row in rows:
        assert (row["same_bits"], row["same_again"]) == (True, True), row
        assert row["error"] < 2**-7, row


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="ranks need a GPU each: run it on a host with two")
def test_the_kernel_with_a_norm_on_gpus_rounds_where_the_ops_do() -> None:
    done = run([str(Path(__file__).with_name("collectives_on_gpus.py"))], TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(
    ("x", "shares", "why"),
    [
        (torch.zeros(8, dtype=torch.bfloat16), 1, ""),
        (torch.zeros(64, dtype=torch.float32), 4, ""),
        (torch.zeros(68, dtype=torch.float32), 1, "272 bytes are more than the 256 that fit"),
        (torch.zeros(6, dtype=torch.bfloat16), 1, "12 bytes are not 1 times a multiple of 16"),
        (torch.zeros(8, dtype=torch.bfloat16), 2, "16 bytes are not 2 times a multiple of 16"),
        (torch.zeros(8, dtype=torch.int64), 1, "torch.int64 is not one of float32, bfloat16, float16"),
    ],
)
def test_what_can_travel(x: torch.Tensor, shares: int, why: str) -> None:
    from adkit.ops.triton.collectives import refused

    assert refused(x, 64, shares) == why
