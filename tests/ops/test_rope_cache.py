"""RoPE with cache write: the reference against its parts, in place; the kernel in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adkit.ops import pick
from tests.ops.rope_cache_cases import RopeCase

OP = torch.ops.adkit.torch_rope_kv_cache.default
ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [12, 6])
@pytest.mark.parametrize(
    ("q_norm", "k_norm"), [("none", "none"), ("weight", "scale-free"), ("none", "weight")]
)
def test_it_is_norm_rope_and_write_one_after_another(
    interleaved: bool, rotary: int, q_norm: str, k_norm: str
) -> None:
    case = RopeCase(
        head_dim=12, rotary=rotary, q_norm=q_norm, k_norm=k_norm, interleaved=interleaved, offset=1.0,
        dtype=torch.float64,
    )  # fmt: skip
    args, options = case.arguments()
    q, k, v, wq, wk, cos, sin, slots, k_cache, v_cache = args

    def turned(x: torch.Tensor, norm: str, weight: torch.Tensor | None) -> torch.Tensor:
        if norm != "none":
            x = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
            x = x.double() * (1.0 if weight is None else weight + 1.0)
        pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + rotary // 2) for i in range(rotary // 2)]
        out = x.clone()
        for a, b in pairs:
            for at, other, sign in ((a, b, -1), (b, a, 1)):
                out[..., at] = x[..., at] * cos[..., None, at] + sign * x[..., other] * sin[..., None, at]
        return out

    got_q, got_k = OP(*args, **options)
    torch.testing.assert_close(got_q, turned(q, q_norm, wq), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_k, turned(k, k_norm, wk), rtol=1e-6, atol=1e-6)
    assert torch.equal(k_cache.flatten(0, 1)[slots], got_k[0])
    assert torch.equal(v_cache.flatten(0, 1)[slots], v[0])
    untouched = torch.ones(len(k_cache.flatten(0, 1)), dtype=torch.bool).index_fill(0, slots, False)
    assert (k_cache.flatten(0, 1)[untouched] == -7.0).all()
    assert (v_cache.flatten(0, 1)[untouched] == -7.0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore:triton_")
def test_schema_and_fake_agree_with_the_op(backend: str) -> None:
    args, options = RopeCase(q_norm="weight", k_norm="weight", value_dim=10).arguments()
    op = pick("rope_kv_cache", backend)
    torch.library.opcheck(op, tuple(args), options, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_by_inductor_it_writes_the_callers_cache_and_copies_none() -> None:
    from torch._inductor.utils import run_and_get_code

    attend = pick("attention_with_paged_cache", "torch")
    tables = [
        torch.tensor([0, 5], dtype=torch.int32),
        torch.tensor([0], dtype=torch.int32),
        torch.tensor([[1, 2]], dtype=torch.int32),
    ]

    def layer(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        q, k = OP(q * 2, k, v, *rest)
        return attend(q, k, v, None, None, None, *tables, None, *rest[-2:]) + 1

    args, _ = RopeCase().arguments()
    args[7] = torch.arange(4, 9)
    eager = [*args[:-2], *(c.clone() for c in args[-2:])]
    want = layer(*eager)
    where = [c.data_ptr() for c in args[-2:]]
    got, code = run_and_get_code(torch.compile(layer), *args)
    torch.testing.assert_close(got, want)
    for cache, expected, at in zip(args[-2:], eager[-2:], where, strict=True):
        assert torch.equal(cache, expected)
        assert cache.data_ptr() == at
    shape = ", ".join(map(str, args[-1].shape))
    allocated = [line for line in "\n".join(code).splitlines() if "= empty_strided" in line]
    assert allocated
    assert not any(f"({shape})" in line for line in allocated)


def run_kernels(interpret: str) -> None:
    path = os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])))
    file = Path(__file__).with_name("rope_cache_against_reference.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpret},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_triton
def test_the_kernel_equals_its_reference_in_the_interpreter() -> None:
    run_kernels("1")


@pytest.mark.gpu
@needs_triton
def test_the_kernel_equals_its_reference_on_a_gpu() -> None:
    run_kernels("0")
