"""Ops over ranks, driven for all ranks of one process; hints change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adkit.contract import Cut, DistConfig, LocalWeight, ShardingError
from adkit.ops import OPS, dist
from adkit.ops.dist import lockstep, over_ranks

ops: Any = torch.ops.adkit


def on(op: Any, pieces: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    return lockstep(op.default, [((piece, *args), kwargs) for piece in pieces])


@pytest.mark.parametrize("in_float", [False, True])
def test_a_norm_over_pieces_is_the_norm_of_the_whole(in_float: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 32, dtype=torch.float64).float(), torch.randn(32)
    calls = [
        ((piece, w, 1e-6, 1.0, in_float), {"world": 4})
        for piece, w in zip(x.chunk(4, -1), weight.chunk(4), strict=True)
    ]
    whole = ops.torch_rmsnorm(x, weight, 1e-6, 1.0, in_float)
    got = torch.cat(lockstep(ops.torch_dist_sharded_rmsnorm.default, calls), -1)
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-6)


def test_a_norm_over_pieces_that_ranks_hold_twice() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    pieces = [x[:, :8], x[:, :8], x[:, 8:], x[:, 8:]]
    got = on(ops.torch_dist_sharded_rmsnorm, pieces, None, 1e-6, world=4)
    torch.testing.assert_close(torch.cat([got[0], got[3]], -1), ops.torch_rmsnorm(x, None, 1e-6))


def test_sums_and_joins() -> None:
    xs = [torch.full((2, 3), float(r)) for r in range(3)]
    assert all(torch.equal(t, torch.full((2, 3), 3.0)) for t in on(ops.torch_dist_all_reduce, xs))
    joined = on(ops.torch_dist_all_gather, xs, -1, 3)
    assert all(torch.equal(t, torch.cat(xs, -1)) for t in joined)


def test_ranks_that_ask_for_different_things_are_told() -> None:
    with pytest.raises(ShardingError, match="do not agree"):
        on(ops.torch_dist_all_reduce, [torch.zeros(2, 3), torch.zeros(2, 4)])


def test_a_rank_alone_says_how_to_run_it() -> None:
    with pytest.raises(ShardingError, match="--tp"):
        ops.torch_dist_all_reduce(torch.zeros(2))
    assert over_ranks(ops.torch_dist_all_reduce.default)
    assert not over_ranks(ops.torch_linear_simple.default)


def test_hints_compute_what_the_plain_op_does() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 8), torch.randn(12, 8)
    assert torch.equal(ops.view(x, [2, 3, 2, 4], tp_scaled_dim=2), x.view(2, 3, 2, 4))
    assert all(map(torch.equal, ops.split_with_sizes(x, [4, 4], -1, layer_type="mha"), x.split([4, 4], -1)))
    assert torch.equal(ops.all_reduce(x), x)
    assert torch.equal(ops.all_gather(x, -1), x)
    assert torch.equal(ops.reduce_scatter(x, 0), x)
    assert torch.equal(ops.shard(x, 0, tp_min_local_shape=4), x)
    assert torch.equal(ops.embedding(w, torch.tensor([[3, 1]])), w[torch.tensor([[3, 1]])])
    assert torch.equal(ops.rmsnorm(x, None, 1e-6), ops.torch_rmsnorm(x, None, 1e-6))
    hinted = ops.torch_linear_simple(x, w, tp_mode="colwise", output_sizes=[8, 4], layer_type="mha")
    assert torch.equal(hinted, ops.torch_linear_simple(x, w))


@pytest.mark.parametrize("name", [n for n, i in OPS.items() if i.category == "hint"])
def test_hints_know_their_shapes(name: str) -> None:
    x = torch.randn(2, 4, 8)
    args = {
        "view": (x, [2, 4, 2, 4]), "split_with_sizes": (x, [4, 4]), "all_gather": (x, -1), "shard": (x, 0),
        "reduce_scatter": (x, 0),
        "embedding": (x[0], torch.tensor([[1, 0]])), "rmsnorm": (x, None, 1e-6),
    }.get(name, (x,))  # fmt: skip
    torch.library.opcheck(OPS[name].overload, args, test_utils=("test_schema", "test_faketensor"))


def test_worlds_that_contradict_themselves() -> None:
    assert DistConfig.of(8, moe_ep=4, rank=5).moe_ep_rank == 2
    assert DistConfig.of(8, moe_ep=4, rank=5).moe_tp_rank == 1
    for fields, word in (
        ({"world_size": 4, "tp_size": 2}, "world_size"),
        ({"world_size": 2, "tp_size": 2, "moe_ep_size": 4}, "moe_ep_size"),
        ({"world_size": 2, "tp_size": 2, "moe_ep_size": 2, "rank": 2}, "rank"),
        ({"pp_size": 2}, "pp_size"),
    ):
        with pytest.raises(ShardingError, match=word):
            DistConfig(**fields)
    with pytest.raises(ShardingError, match="does not divide"):
        DistConfig.of(4, moe_ep=3)


def test_the_part_of_a_weight() -> None:
    w = torch.arange(48).view(12, 4)
    part = LocalWeight("w", (Cut(0, ((2, 4), (8, 10))), Cut(1, ((0, 2),))))
    assert part.shape(w.shape) == (4, 2)
    assert torch.equal(part.take(w), torch.cat([w[2:4], w[8:10]])[:, :2])
    assert LocalWeight("w", ()).take(w) is w


def test_an_op_that_the_communicator_does_at_once_is_not_done_step_by_step() -> None:
    class Through:
        rank, size, able = 0, 2, True

        def all_reduce(self, x: torch.Tensor, strategy: str) -> torch.Tensor:
            return 2 * x

        def allreduce_residual_rmsnorm(
            self, x, residual, weight, eps, offset=0.0, in_float=False, out_dtype=None, *, strategy
        ):
            return ((x + 10).to(out_dtype), residual + 10) if self.able else None

    op = torch.ops.adkit.torch_dist_allreduce_residual_rmsnorm
    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    args = (None, 1e-6, 0.0, False, torch.bfloat16)
    through = Through()
    with dist.use(through):  # type: ignore[arg-type]
        normed, total = op(x, residual, *args, strategy="ONESHOT")
        assert torch.equal(normed, (x + 10).bfloat16())
        assert torch.equal(total, residual + 10)
        through.able = False
        normed, total = op(x, residual, *args, strategy="ONESHOT")
    want = torch.ops.adkit.torch_fused_add_rmsnorm(2 * x, residual, *args)
    assert torch.equal(normed, want[0])
    assert torch.equal(total, want[1])


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("in_float", [False, True])
def test_a_sum_over_ranks_joins_a_wider_residual_without_narrowing_it(
    out_dtype: torch.dtype | None, in_float: bool
) -> None:
    torch.manual_seed(0)
    xs = [torch.randn(5, 16).bfloat16() for _ in range(2)]
    residual, weight = torch.randn(5, 16), torch.randn(16).bfloat16()
    op = ops.torch_dist_allreduce_residual_rmsnorm
    found = on(op, xs, residual, weight, 1e-6, 1.0, in_float, out_dtype)
    for normed, total in found:
        assert torch.equal(total, (xs[0] + xs[1]).float() + residual)
        want = ops.torch_rmsnorm(total, weight, 1e-6, 1.0, in_float, out_dtype)
        assert normed.dtype == (out_dtype or torch.float32)
        assert torch.equal(normed, want)
    shapes = op(*(t.to("meta") for t in (xs[0], residual, weight)), 1e-6, 1.0, in_float, out_dtype)
    assert [(t.shape, t.dtype) for t in shapes] == [(t.shape, t.dtype) for t in found[0]]
