"""Triton kernels against their references: in triton's interpreter, or on a GPU; test_triton.py runs it apart."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adkit.ops import pick
from tests.ops.paged import Case, serve, whole

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
assert INTERPRETED or torch.cuda.is_available(), "run through test_triton.py"
if not INTERPRETED:
    torch.set_default_device("cuda")
else:
    # Triton 3.6's interpreter takes int() of an array of one element where a loop ends; NumPy 2.4 refuses.
    from triton.runtime import interpreter

    def _patch(tensor: Any, *scope: Any, patch: Any = interpreter._patch_lang_tensor) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = _patch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Of the largest output: order of sums, and a few last places in 16 bits (bfloat16 is cut off there).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-9}


def assert_same(got: Any, want: Any, dtype: torch.dtype) -> None:
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.is_contiguous()
        limit = TOLERANCE[dtype] * b.float().abs().max()
        assert (a.float() - b.float()).abs().max() <= limit


@pytest.fixture(autouse=True)
def no_fallback() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80, 300])
@pytest.mark.parametrize("kind", ["plain", "scale-free", "offset", "float", "float-offset", "float32-weight"])
def test_rmsnorm(dtype: torch.dtype, width: int, kind: str) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 3, width, dtype=dtype), torch.randn(2, 3, width, dtype=dtype)
    weight = (
        None
        if kind == "scale-free"
        else torch.randn(width, dtype=torch.float32 if kind == "float32-weight" else dtype)
    )
    args = (weight, 1e-5, 1.0 if "offset" in kind else 0.0, kind in ("float", "float-offset"))
    assert_same(pick("rmsnorm", "triton")(x, *args), pick("rmsnorm", "torch")(x, *args), dtype)
    fused = pick("fused_add_rmsnorm", "triton")(x, residual, *args)
    assert_same(fused, pick("fused_add_rmsnorm", "torch")(x, residual, *args), dtype)
    if dtype != torch.bfloat16:
        assert torch.equal(fused[1], x + residual)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("in_float", [False, True])
def test_rmsnorm_of_a_wide_stream(dtype: torch.dtype, in_float: bool) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(6, 80, dtype=dtype), torch.randn(6, 80), torch.randn(80, dtype=dtype)
    args = (weight, 1e-5, 1.0, in_float, dtype)
    assert_same(pick("rmsnorm", "triton")(residual, *args), pick("rmsnorm", "torch")(residual, *args), dtype)
    normed, total = pick("fused_add_rmsnorm", "triton")(x, residual, *args)
    assert torch.equal(total, x + residual)
    assert_same(normed, pick("rmsnorm", "torch")(total, *args), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid"])
def test_swiglu_packed(dtype: torch.dtype, act: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2 * 1100, dtype=dtype) * 2
    assert_same(pick("swiglu_packed", "triton")(x, act), pick("swiglu_packed", "torch")(x, act), dtype)


def linear_case(rows: int, outs: int, width: int, dtype: torch.dtype, around: str) -> tuple[Any, ...]:
    """Arguments of ``fused_linear``: what ``around`` names stands around the product."""
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype)

    act = "silu" if "silu" in around else "gelu_tanh" if "gelu" in around else None
    weight = (random(outs * (2 if act else 1), width).float() * width**-0.5).to(dtype)
    return (
        random(1, rows, width),
        weight,
        random(weight.shape[0]) if "bias" in around else None,
        random(width) if "norm" in around and "free" not in around else None,
        random(1, rows, outs) if "sum" in around else None,
        1e-5 if "norm" in around else None,
        1.0 if "offset" in around else 0.0,
        "float" in around,
        act,
    )


def assert_linear(got: torch.Tensor, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    exact = pick("fused_linear", "torch")(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    assert_same(got, exact.to(dtype), dtype)


AROUND = ["", "bias", "norm silu", "norm-free sum", "norm-float-offset bias gelu", "norm bias silu sum"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("around", AROUND)
def test_fused_linear(dtype: torch.dtype, rows: int, around: str) -> None:
    args = linear_case(rows, 70, 136, dtype, around)
    assert_linear(pick("fused_linear", "triton")(*args), args, dtype)


@pytest.mark.parametrize("rows", [1, 20])
def test_a_layer_of_one_output(rows: int) -> None:
    args = linear_case(rows, 1, 64, torch.float32, "norm silu")
    assert_linear(pick("fused_linear", "triton")(*args), args, torch.float32)


def test_many_rows_go_to_the_library() -> None:
    args = linear_case(70, 70, 136, torch.float32, "norm bias silu sum")
    assert_linear(pick("fused_linear", "triton")(*args), args, torch.float32)


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, DTYPES[1]), (7, DTYPES[0]), (17, DTYPES[1]), (64, DTYPES[2])]
)
@pytest.mark.parametrize("around", ["sum", "norm silu"])
def test_every_way_to_compute_a_linear(dtype: torch.dtype, rows: int, around: str) -> None:
    """Whole blocks and rests, columns split over programs: all that tuning may choose, twice in a row."""
    from adkit.ops.triton import linear

    args = linear_case(rows, 40, 300, dtype, around)
    ways = linear.candidates(1 << (rows - 1).bit_length(), 40, 300, "norm" in around, dtype)
    assert len(ways) > 4
    for way in ways:
        for _ in range(2):  # the count of finished programs starts from zero again
            layer = linear.Layer(args[0][0], *args[2:4], None if args[4] is None else args[4][0], *args[5:])
            assert_linear(layer.run(way, args[1])[None], args, dtype)


@pytest.mark.parametrize(("rows", "dtype"), [(1, DTYPES[1]), (7, DTYPES[2]), (17, DTYPES[1])])
@pytest.mark.parametrize("around", ["sum", "norm silu", "norm"])
def test_every_way_to_compute_a_linear_of_a_wide_stream(dtype: torch.dtype, rows: int, around: str) -> None:
    """float32 in, out or both, as the tensors around a half-precision weight are."""
    from adkit.ops.triton import linear

    x, *rest = linear_case(rows, 40, 300, dtype, around)
    x = x.float() + 1e-4 * torch.randn(x.shape) if "norm" in around else x
    rest[3] = None if rest[3] is None else rest[3].float() * 1.0001
    wide = {"out_dtype": torch.float32} if around == "norm" else {}
    want = torch.float32 if around in ("sum", "norm") else dtype
    exact = pick("fused_linear", "torch")(
        x.double(), *(t.double() if isinstance(t, torch.Tensor) else t for t in rest)
    )
    for way in linear.candidates(1 << (rows - 1).bit_length(), 40, 300, "norm" in around, dtype):
        layer = linear.Layer(x[0], *rest[1:3], None if rest[3] is None else rest[3][0], *rest[4:], **wide)
        got = layer.run(way, rest[0])
        assert got.dtype == want
        assert_same(got[None].to(dtype), exact.to(dtype), dtype)
        if around == "sum":  # nothing on the way is rounded to the weight's dtype
            assert (got - exact[0]).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    ("rows", "dtype", "wide"),
    [
        (1, DTYPES[1], True),
        (7, DTYPES[2], False),
        (2, DTYPES[2], True),
        (17, DTYPES[1], True),
        (70, DTYPES[0], False),
    ],
)
@pytest.mark.parametrize("around", ["sum", "norm bias silu sum"])
def test_a_sum_in_place_is_the_sum(rows: int, dtype: torch.dtype, wide: bool, around: str) -> None:
    from adkit.ops.triton import linear

    x, weight, bias, norm, residual, *rest = linear_case(rows, 40, 300, dtype, around)
    assert residual is not None
    residual = residual.float() if wide else residual
    layer = linear.Layer(x[0], bias, norm, residual[0], *rest)
    few = linear.candidates(1 << (rows - 1).bit_length(), 40, 300, "norm" in around, dtype)
    for way in few if rows <= linear.MOST_ROWS else [linear.LIBRARY]:
        over = residual[0].clone()
        placed = linear.Layer(x[0], bias, norm, over, *rest, out=over)
        assert placed.run(way, weight) is over
        assert torch.equal(over, layer.run(way, weight))
    over = torch.zeros(1, 40, rows, dtype=residual.dtype).transpose(1, 2)  # rows do not lie side by side
    over.copy_(residual)
    want = pick("fused_linear", "triton")(x, weight, bias, norm, residual, *rest)
    for into in (over, residual):
        pick("fused_linear_", "triton")(into, x, weight, bias, norm, *rest)
        assert torch.equal(into, want)
    several = torch.zeros(40, 2, rows, dtype=residual.dtype).permute(
        1, 2, 0
    )  # nor can they be viewed as rows
    several.copy_(want)
    pick("fused_linear_", "triton")(several, x.expand(2, -1, -1), weight, bias, norm, *rest)
    assert_same(
        several[:1].contiguous(), pick("fused_linear", "triton")(x, weight, bias, norm, want, *rest), dtype
    )
    assert torch.equal(several[0], several[1])


def test_a_norm_of_large_values_stays_in_the_range_of_float16() -> None:
    args = list(linear_case(4, 16, 64, torch.float16, "norm"))
    args[0], args[3] = args[0] * 1000, args[3] * 30
    assert_linear(pick("fused_linear", "triton")(*args), tuple(args), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["rope_with_explicit_cos_sin", "rope_with_qk_interleaving"])
@pytest.mark.parametrize(("head_dim", "rotary"), [(32, 32), (80, 80), (40, 12)])
@pytest.mark.parametrize("bsnd", [True, False])
def test_rope(dtype: torch.dtype, op: str, head_dim: int, rotary: int, bsnd: bool) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, n, head_dim, dtype=dtype) for n in (5, 2))
    if not bsnd:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    angle = torch.randn(2, 3, rotary)
    args = (q, k, angle.cos().to(dtype), angle.sin().to(dtype), 2 if bsnd else 1)
    wide = [t.float() if isinstance(t, torch.Tensor) else t for t in args]
    want = tuple(t.to(dtype) for t in pick(op, "torch")(*wide))
    assert_same(pick(op, "triton")(*args), want, dtype)


def assert_attention(case: Case) -> None:
    served = serve(case, pick("attention_with_paged_cache", "triton"))
    for got, want in zip(served.outputs, whole(case, pick("attention", "torch"), torch.float64), strict=True):
        assert (got.double() - want).abs().max() <= TOLERANCE[case.dtype] * want.abs().max()
    same = serve(case, pick("attention_with_paged_cache", "torch"))
    # Page 0 takes every padding token, in no particular order.
    assert torch.equal(served.k_cache[1:], same.k_cache[1:])
    assert torch.equal(served.v_cache[1:], same.v_cache[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (64, 64), (80, 80), (96, 64), (256, 256)])
def test_attention_head_sizes(dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    assert_attention(Case([[7, 1, 2], [1, 1]], head_dim=head_dim, value_dim=value_dim, dtype=dtype))


def test_attention_over_many_blocks_of_queries_and_keys() -> None:
    options = {"window": 70}
    assert_attention(
        Case([[100, 40, 1], [3]], heads=6, kv_heads=1, page_size=16, options=options, sinks=True)
    )


@pytest.mark.parametrize("options", [{}, {"window": 150}, {"chunk": 128}, {"softcap": 3.0, "scale": -0.4}])
def test_decode_cuts_long_histories_and_leaves_short_ones_whole(options: dict[str, Any]) -> None:
    chunks = [[n, 1, 1] for n in (400, 1, 64, 63, 130, 257)]
    assert_attention(
        Case(
            chunks, page_size=16, table_width=80, options=options, sinks=True, alibi=True, dtype=torch.float16
        )
    )


def test_prompts_histories_and_decodes_in_one_batch() -> None:
    chunks = [[150, 1, 1], [1, 140, 1], [1, 1, 3], [30, 100, 60], [2, 1, 129], [70, 2, 1]]
    assert_attention(Case(chunks, heads=6, page_size=16, table_width=30, padding=3, dtype=torch.bfloat16))


@pytest.mark.parametrize("window", [None, 9])
def test_keys_that_an_earlier_op_has_written(window: int | None) -> None:
    assert_attention(Case([[9, 1, 1], [1, 20], [3, 30, 1]], written=True, options={"window": window}))


@pytest.mark.parametrize("counts", [[3, 0, 0], [0, 2, 1, 1, 0], [2, 0], [5, 0, 1], [0, 0, 7]])
def test_sequences_without_tokens(counts: list[int]) -> None:
    torch.manual_seed(0)
    ends = torch.tensor([0, *counts]).cumsum(0).int()
    args = [
        torch.randn(1, sum(counts) + (3 in counts), 4, 16),
        *torch.randn(2, 1, sum(counts) + (3 in counts), 2, 16),
        None,
        None,
        None,
        ends,
        torch.arange(len(counts), dtype=torch.int32) * 5,
        torch.arange(len(counts) * 8, dtype=torch.int32).view(-1, 8),
        None,
        *torch.randn(2, len(counts) * 8, 4, 2, 16),
    ]
    for r, count in enumerate(counts):
        for i in range(count):
            for cache, new in zip(args[-2:], args[1:3], strict=True):
                cache[r * 8 + (5 * r + i) // 4, (5 * r + i) % 4] = new[0, int(ends[r]) + i]
    want = pick("attention_with_paged_cache", "torch")(*args)
    assert_same(pick("attention_with_paged_cache", "triton")(*args), want, torch.float32)


def test_a_neighbours_nan_stays_its_own() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 40, 4, 16), torch.randn(1, 40, 2, 16), torch.randn(1, 40, 2, 16)
    v[:, 35:] = float("nan")
    caches = torch.stack((torch.zeros(4, 16, 2, 16), torch.full((4, 16, 2, 16), float("nan"))))
    slots = torch.cat((torch.arange(16, 51), torch.arange(5)))
    ends, cached = torch.tensor([0, 35, 40]).int(), torch.zeros(2, dtype=torch.int32)
    table = torch.tensor([[1, 2, 3], [0, 0, 0]]).int()
    out = pick("attention_with_paged_cache", "triton")(
        q, k, v, None, None, None, ends, cached, table, slots, *caches
    )
    assert out[:, :35].isfinite().all()
    assert out[:, 35:].isnan().all()


@st.composite
def cases(draw: Any) -> Case:
    kv_heads = draw(st.sampled_from([1, 2]))
    return Case(
        chunks=draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3)),
        heads=kv_heads * draw(st.sampled_from([1, 3, 4])),
        kv_heads=kv_heads,
        page_size=draw(st.sampled_from([1, 4, 5])),
        options={
            "scale": draw(st.sampled_from([None, 0.5])),
            "window": draw(st.sampled_from([None, 1, 4])),
            "chunk": draw(st.sampled_from([None, 3])),
            "softcap": draw(st.sampled_from([None, 5.0])),
        },
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        padding=draw(st.sampled_from([0, 2])),
        written=draw(st.booleans()),
        seed=draw(st.integers(0, 100)),
    )


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_attention_of_any_kind(case: Case) -> None:
    assert_attention(case)
