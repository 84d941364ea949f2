"""Kernels of experts and routing against float64: in triton's interpreter, or on a GPU; test_moe.py runs it."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adkit.graph.edit import clean
from adkit.models.export import export_model
from adkit.ops import pick
from adkit.ops.triton import moe, moe_grouped
from tests.ops.triton_against_reference import DTYPES, INTERPRETED, TOLERANCE, no_fallback  # noqa: F401  (a fixture)
from tests.passes.graphs import count, run_pass
from tests.zoo import rmse_ratio, tiny

PATHS = {"pair by pair": 10**9, "grouped": 0.0}


@pytest.fixture(params=PATHS)
def path(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of computing, whatever the sizes."""
    monkeypatch.setattr(moe, "_FEW", PATHS[request.param])


def experts(
    tokens: int, k: int, count: int, d: int, f: int, dtype: torch.dtype, *, gated: bool = True,
    transposed: bool = False, biased: bool = False, weights: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Arguments of the op; about one pair in four has no expert, and the first expert gets none."""
    torch.manual_seed(0)

    def matrix(*shape: int) -> Tensor:
        w = (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)
        return w.transpose(1, 2).contiguous() if transposed and w.dim() == 3 else w

    up = 2 * f if gated else f
    ids = torch.rand(tokens, count - 1).topk(k, -1).indices + 1
    ids = torch.where(torch.rand(tokens, k) < 0.25, count, ids)
    return (
        torch.randn(tokens, d).to(dtype),
        ids,
        torch.rand(tokens, k).to(weights or dtype),
        matrix(count, up, d),
        matrix(count, d, f),
        *((matrix(count, up), matrix(count, d)) if biased else (None, None)),
    )


def assert_right(args: tuple[Tensor | None, ...], **options: Any) -> None:
    hidden = args[0]
    assert hidden is not None
    got = pick("moe", "triton")(*args, **options)
    wide = [a.double() if a is not None and a.is_floating_point() else a for a in args]
    want = pick("moe", "torch")(*wide, **options)
    assert (got.dtype, got.shape) == (hidden.dtype, hidden.shape)
    assert (got.double() - want).abs().max() <= TOLERANCE[hidden.dtype] * want.abs().max()
    assert torch.equal(got, pick("moe", "triton")(*args, **options))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_of_any_count(dtype: torch.dtype, tokens: int) -> None:
    assert_right(experts(tokens, 3, 6, 48, 40, dtype))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("dtype", "biased"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "kind", ["plain", "interleaved", "clamped", "gpt-oss", "not gated", "not gated, relu2"]
)
def test_experts_of_any_kind(dtype: torch.dtype, transposed: bool, biased: bool, kind: str) -> None:
    options: dict[str, Any] = {
        "plain": {"act": "gelu_tanh"},
        "interleaved": {"interleaved": True},
        "clamped": {"limit": 0.7},
        "gpt-oss": {"interleaved": True, "alpha": 1.702, "limit": 0.5, "up_offset": 1.0},
        "not gated": {"gated": False, "act": "gelu"},
        "not gated, relu2": {"gated": False, "act": "relu2"},
    }[kind]
    gated = options.get("gated", True)
    args = experts(5, 2, 5, 48, 24, dtype, gated=gated, transposed=transposed, biased=biased)
    assert_right(args, transposed=transposed, **options)


@pytest.mark.usefixtures("path")
def test_routing_weights_may_be_wider_than_tokens() -> None:
    assert_right(experts(4, 2, 5, 64, 32, torch.bfloat16, weights=torch.float32))


@pytest.mark.usefixtures("path")
def test_tokens_without_experts_get_nothing() -> None:
    hidden, ids, *rest = experts(4, 2, 5, 32, 32, torch.float32)
    assert ids is not None
    ids[1:3] = 5
    got = pick("moe", "triton")(hidden, ids, *rest)
    assert got[1:3].abs().max() == 0
    assert pick("moe", "triton")(hidden[:0], ids[:0], rest[0][:0], *rest[1:]).shape == (0, 32)  # type: ignore[index]


def test_blocks_of_several_rows_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks than are placed side by side, widths over one tile, experts with several blocks."""
    monkeypatch.setattr(moe, "_FEW", 0)
    assert_right(experts(200, 2, 4, 136, 72, torch.float32))


@st.composite
def routings(draw: Any) -> tuple[int, list[int]]:
    """How many experts there are, and the expert of each pair; one id stands for none."""
    count = draw(st.integers(1, 9))
    return count, draw(st.lists(st.integers(0, count), min_size=1, max_size=700))


@settings(max_examples=40, deadline=None)
@given(ids=routings(), block_m=st.sampled_from([16, 32, 128]))
def test_pairs_are_sorted_and_cut_into_blocks(ids: tuple[int, list[int]], block_m: int) -> None:
    """Every pair with an expert stands once, in order, in a block of its expert; other blocks say -1."""
    count, chosen = ids
    order, blocks = moe_grouped.arrange(torch.tensor(chosen)[:, None], count, block_m)
    want = [i for e in range(count) for i, c in enumerate(chosen) if c == e]
    assert order[: len(want)].tolist() == want
    covered = []
    done = False
    for expert, first, end in blocks.t().tolist():
        if expert < 0:
            done = True
            continue
        assert not done
        rows = order[first : min(end, first + block_m)].tolist()
        assert rows
        assert {chosen[i] for i in rows} == {expert}
        covered += rows
    assert covered == want


ROUTERS: list[dict[str, Any]] = [
    {},
    {"normalize": True},
    {"normalize": True, "eps": 1e-20, "scale": 2.5, "bias": True},
    {"normalize": True, "floor": 0.9, "dtype": torch.bfloat16},
    {"groups": 2, "top_groups": 1, "bias": True},
    {"groups": 4, "top_groups": 3},
]


def has_room(count: int, k: int, groups: int = 1, top_groups: int = 1, **_: Any) -> bool:
    """Whether the groups divide the experts, and those chosen from hold k."""
    return count % groups == 0 and count // groups * top_groups >= k


@pytest.mark.parametrize(
    ("count", "k", "options"),
    [
        (count, k, options)
        for count, k in ((4, 2), (60, 4), (128, 8), (6, 6))
        for options in ROUTERS
        if has_room(count, k, **options)
    ],
    ids=str,
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "topk_softmax"])
def test_routing(count: int, k: int, score: str, options: dict[str, Any]) -> None:
    groups = options.get("groups", 1)
    torch.manual_seed(0)
    bias = torch.randn(count) * 0.3 if options.get("bias") else None
    options = {"score": score, **{n: v for n, v in options.items() if n != "bias"}}
    for dtype in DTYPES if groups == 1 else DTYPES[:1]:
        # No two of a row are the same, in 16 bits either.
        logits = torch.stack([torch.randperm(512)[:count] - 256 for _ in range(3)]).to(dtype) / 32
        if groups > 1:
            logits = torch.randn(3, count, dtype=dtype)
        got = pick("moe_topk", "triton")(logits, k, bias, **options)
        want = pick("moe_topk", "torch")(logits.double(), k, bias, **options)
        assert torch.equal(got[1], want[1])
        assert got[0].dtype == options.get("dtype", torch.float32)
        rtol = 2**-7 if got[0].dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got[0], want[0].to(got[0].dtype), rtol=rtol, atol=1e-6)


def test_the_first_of_equal_experts_wins() -> None:
    weights, ids = pick("moe_topk", "triton")(torch.zeros(2, 6), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 6))


@pytest.mark.skipif(not INTERPRETED, reason="graphs are made on the CPU; tests/test_gpu.py runs whole models")
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "deepseek_v3"])
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the reference model lives on the CPU")
def test_models_with_both_kernels_give_the_logits_of_hugging_face(kind: str) -> None:
    _, model = tiny(kind)
    gm = export_model(model)
    clean(gm)
    assert run_pass(gm, "match_moe_routing_pattern").num_matches
    run_pass(gm, "fuse_moe", backend="triton")
    ids = torch.arange(3, 21).view(2, 9)
    positions = torch.arange(9).expand(2, 9)
    with torch.no_grad():
        want = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        got = gm(input_ids=ids, position_ids=positions)[0]
    assert count(gm, "triton_moe") == count(gm, "triton_moe_topk") > 0
    assert rmse_ratio(got, want) < 1e-5
