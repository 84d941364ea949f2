"""The fused RoPE kernel against its reference: in triton's interpreter, or on a GPU; test_rope_cache.py runs it."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adkit.ops import pick
from tests.ops.rope_cache_cases import RopeCase

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
assert INTERPRETED or torch.cuda.is_available(), "run through test_rope_cache.py"
DEVICE = "cpu" if INTERPRETED else "cuda"
#: Of the largest output: a few last places in 16 bits (the interpreter cuts bfloat16 off).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


def assert_same(case: RopeCase) -> None:
    case = replace(case, device=DEVICE)
    args, options = case.arguments()
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    wanted = (*pick("rope_kv_cache", "torch")(*wide, **options), *wide[-2:])
    where = [cache.data_ptr() for cache in args[-2:]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = (*pick("rope_kv_cache", "triton")(*args, **options), *args[-2:])
    assert where == [cache.data_ptr() for cache in args[-2:]]
    for got, want in zip(found[:2], wanted[:2], strict=True):
        assert got.is_contiguous()
        assert got.dtype == case.dtype
        assert (got.double() - want).abs().max() <= TOLERANCE[case.dtype] * want.abs().max()
    slots = args[-3]
    for cache, new in ((found[2], found[1]), (found[3], args[2])):
        flat = cache.view(-1, *cache.shape[2:])
        assert torch.equal(flat[slots], new[0].to(cache.dtype))
        rest = torch.ones(len(flat), dtype=torch.bool, device=DEVICE).index_fill(0, slots, False)
        assert (flat[rest] == -7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "rotary"),
    [(64, 64, 64), (128, 128, 64), (80, 80, 80), (96, 64, 48), (256, 256, 256)],
)
def test_head_sizes(
    dtype: torch.dtype, interleaved: bool, head_dim: int, value_dim: int, rotary: int
) -> None:
    assert_same(
        RopeCase(
            tokens=2, heads=6, kv_heads=3, head_dim=head_dim, value_dim=value_dim, rotary=rotary, dtype=dtype,
            interleaved=interleaved, q_norm="weight", k_norm="weight",
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "angles", "cache"),
    [
        (torch.float16, torch.float32, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.float16),
    ],
)
def test_angles_and_caches_of_other_dtypes(
    dtype: torch.dtype, angles: torch.dtype, cache: torch.dtype
) -> None:
    assert_same(RopeCase(dtype=dtype, cos_dtype=angles, cache_dtype=cache, k_norm="weight"))


@st.composite
def cases(draw: Any) -> RopeCase:
    head_dim = draw(st.sampled_from([6, 12, 16]))
    norms = st.sampled_from(["none", "weight", "scale-free"])
    return RopeCase(
        tokens=draw(st.integers(1, 4)),
        heads=draw(st.integers(1, 5)),
        kv_heads=draw(st.integers(1, 3)),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([4, 10, 16])),
        rotary=draw(st.sampled_from([head_dim, 6, 2])),
        page_size=draw(st.sampled_from([1, 4])),
        q_norm=draw(norms),
        k_norm=draw(norms),
        in_float=draw(st.booleans()),
        offset=draw(st.sampled_from([0.0, 1.0])),
        interleaved=draw(st.booleans()),
        seed=draw(st.integers(0, 100)),
    )


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_any_mixture_of_norms_and_sizes(case: RopeCase) -> None:
    assert_same(case)
