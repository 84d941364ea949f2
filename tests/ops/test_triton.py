"""Triton ops: numerics in the interpreter, code for real GPUs, and what happens where no kernel can run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from adkit.ops import OPS, pick
from adkit.ops.triton import ops

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(code: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    return subprocess.run(
        [sys.executable, *code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@needs_triton
def test_kernels_equal_their_references_in_the_interpreter() -> None:
    file = Path(__file__).with_name("triton_against_reference.py")
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.gpu
@needs_triton
def test_kernels_equal_their_references_on_a_gpu() -> None:
    file = Path(__file__).with_name("triton_against_reference.py")
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_triton
def test_attention_compiles_for_gpus_within_their_shared_memory() -> None:
    done = run([str(Path(__file__).with_name("triton_for_gpus.py"))], TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_importing_ops_imports_no_triton() -> None:
    done = run(["-c", "import sys, adkit.ops; sys.exit('triton' in sys.modules)"])
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_an_op_runs_its_reference_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_warned", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight = torch.randn(3, 8), torch.randn(8)
    with pytest.warns(RuntimeWarning, match="triton_rmsnorm runs as torch_rmsnorm"):
        got = pick("rmsnorm", "triton")(x, weight, 1e-6)
    assert torch.equal(got, pick("rmsnorm", "torch")(x, weight, 1e-6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pick("rmsnorm", "triton")(x, weight, 1e-6)


@needs_triton
def test_a_kernel_that_does_not_compile_runs_as_its_reference_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.errors import TritonError

    calls = []

    def rmsnorm(*args: object) -> None:
        calls.append(args)
        raise TritonError("out of resource: shared memory")

    monkeypatch.setitem(sys.modules, "adkit.ops.triton.norm", types.SimpleNamespace(rmsnorm=rmsnorm))
    monkeypatch.setattr(ops, "kernels_can_run", lambda on_cuda: True)
    monkeypatch.setattr(ops, "_refused", {})
    x, weight = torch.randn(3, 8), torch.randn(8)
    expected = pick("rmsnorm", "torch")(x, weight, 1e-6)
    with pytest.warns(RuntimeWarning, match=r"triton_rmsnorm did not compile for .*\[3, 8\].*shared memory"):
        assert torch.equal(pick("rmsnorm", "triton")(x, weight, 1e-6), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(pick("rmsnorm", "triton")(x, weight, 1e-6), expected)
        assert len(calls) == 1, "the same kind is not compiled again"
        pick("rmsnorm", "triton")(torch.randn(2, 16), torch.randn(16), 1e-6)
    assert len(calls) == 2, "another width may compile"
    assert ops.fallen_back() == {"triton_rmsnorm"}


def test_every_triton_op_has_its_twins_schema() -> None:
    names = [name for name in OPS if name.startswith("triton_")]
    assert len(names) >= 6
    for name in names:
        twin = OPS["torch_" + name.removeprefix("triton_")]
        assert OPS[name].schema.split("(", 1)[1] == twin.schema.split("(", 1)[1]
        assert (OPS[name].category, OPS[name].token_local) == (twin.category, twin.token_local)
