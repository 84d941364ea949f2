"""Sampling kernels, each suite in a process of its own, and compiled for a real GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
KERNELS = Path(__file__).with_name("sampling_against_reference.py")
SAMPLER = ROOT / "tests" / "runtime" / "test_sampler.py"


def run(command: list[str], interpret: str) -> str:
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", [KERNELS, SAMPLER], ids=lambda f: f.stem)
def test_in_the_interpreter(file: Path) -> None:
    assert " passed" in run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], "1")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    assert " passed" in run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNELS)], "0")


@pytest.mark.slow
def test_they_and_the_fused_rope_compile_for_a_gpu() -> None:
    run([str(Path(__file__).with_name("rope_and_sampling_for_gpus.py"))], "0")
