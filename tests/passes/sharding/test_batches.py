"""Batched products with a weight: stacked matrices are shared out, and what is made of them stays in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from adkit.contract import DistConfig, ShardingError
from adkit.graph.placement import ShardingPlan
from tests.passes.sharding.graphs import Net, exported, together
from tests.passes.sharding.tiny import duplicate, hinted, planned, run

ops: Any = torch.ops.adkit
aten: Any = torch.ops.aten
E, T, D, F = 4, 5, 6, 8
STACKS = {"up": (E, D, F), "down": (E, F, D)}


def tokens() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def graph_of(forward: Callable[..., Tensor], **shapes: tuple[int, ...]) -> GraphModule:
    return exported(Net(forward, **shapes), tokens())


def on_ranks(gm: GraphModule, tp: int) -> tuple[list[Tensor], list[GraphModule]]:
    """What every rank of a hinted graph gives, and their graphs."""
    ranks = []
    for rank in range(tp):
        ranks.append(duplicate(gm))
        run(ranks[-1], "apply_sharding_hints", DistConfig.of(tp=tp).at(rank))
    return [out[0] if isinstance(out, tuple) else out for out in together(ranks, tokens())], ranks


def calls(gm: GraphModule, target: Any) -> int:
    return sum(n.target is target for n in gm.graph.nodes)


def decisions(plan: ShardingPlan) -> dict[str, str]:
    return {r.weights[0]: r.decision for r in plan if r.weights}


def proved(
    forward: Callable[..., Tensor], tp: int, **shapes: tuple[int, ...]
) -> tuple[ShardingPlan, list[GraphModule]]:
    """The plan and the ranks' graphs, after they were seen to compute what the uncut graph does."""
    gm = graph_of(forward, **shapes)
    expected = Net(forward, **shapes)(tokens())
    plan = hinted(gm, tp).meta["adkit_plan"]
    (alone,) = together([gm], tokens())
    torch.testing.assert_close(alone[0] if isinstance(alone, tuple) else alone, expected)
    found, ranks = on_ranks(gm, tp)
    for out in found:
        torch.testing.assert_close(out, expected)
    return plan, ranks


def mixture(m: Any, x: Tensor) -> Tensor:
    """Every expert for every token, summed: bmm, elementwise, bmm, sum."""
    h = x.reshape(1, -1, D).expand(E, -1, -1)
    return torch.bmm(torch.nn.functional.silu(torch.bmm(h, m.up)), m.down).sum(0)


@pytest.mark.parametrize("tp", [2, 4])
def test_pieces_go_up_to_the_sum_over_the_batch(tp: int) -> None:
    plan, ranks = proved(mixture, tp, **STACKS)
    assert decisions(plan) == {"up": "batch", "down": "batch"}
    assert [(r.dim, str(r.placement), r.layer_type) for r in plan if r.weights] == [(0, "cut(0)", "moe")] * 2
    assert [r.reduce for r in plan] == [False, False, True]
    for rank, gm in enumerate(ranks):
        assert gm.up.shape == (E // tp, D, F)
        assert gm.meta["adkit_local"]["down"].cuts[0].ranges == ((rank * E // tp, (rank + 1) * E // tp),)
        assert calls(gm, ops.torch_dist_all_reduce.default) == 1
        assert calls(gm, ops.torch_dist_all_gather.default) == 0


def test_what_no_rule_takes_in_pieces_is_joined_behind_the_product() -> None:
    def largest(m: Any, x: Tensor) -> Tensor:
        return torch.matmul(x, m.up).amax(0)

    plan, ranks = proved(largest, 2, up=(E, D, F))
    (row,) = plan
    assert (row.decision, str(row.placement)) == ("gather", "replicated")
    assert ranks[0].up.shape == (2, D, F)
    assert calls(ranks[0], ops.torch_dist_all_gather.default) == 1


def test_only_the_last_product_is_joined() -> None:
    def chain(m: Any, x: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(x, m.up).relu(), m.down).amax(0)

    plan, ranks = proved(chain, 4, **STACKS)
    assert decisions(plan) == {"up": "batch", "down": "gather"}
    assert [ranks[1].up.shape[0], ranks[1].down.shape[0]] == [1, 1]


def test_a_bias_that_is_added_with_the_product_goes_with_it() -> None:
    def biased(m: Any, x: Tensor) -> Tensor:
        return torch.baddbmm(m.bias, x.reshape(1, -1, D).expand(E, -1, -1), m.up).sum(0)

    plan, ranks = proved(biased, 2, up=(E, D, F), bias=(E, 1, F))
    assert plan.rows[0].weights == ("up", "bias")
    assert ranks[1].bias.shape == (2, 1, F)


def test_a_stack_stored_turned_around_or_as_one_matrix_is_loaded_in_parts() -> None:
    def turned(m: Any, x: Tensor) -> Tensor:
        h = torch.matmul(x, m.up.transpose(1, 2))
        return torch.matmul(h, m.down.view(E, F, D)).sum(0)

    plan, ranks = proved(turned, 2, up=(E, F, D), down=(E * F, D))
    assert decisions(plan) == {"up": "batch", "down": "batch"}
    assert ranks[0].up.shape == (2, F, D)
    assert ranks[0].down.shape == (2 * F, D)
    assert next(r for r in plan if r.weights == ("down",)).min_local == F


def test_the_other_side_is_a_ranks_part_where_it_has_the_batch() -> None:
    def own(m: Any, x: Tensor) -> Tensor:
        return torch.bmm(x.reshape(-1, 2, D // 2).transpose(0, 1), m.up).transpose(0, 1).reshape(-1, 2 * F)

    plan, ranks = proved(own, 2, up=(2, D // 2, F))
    assert decisions(plan) == {"up": "gather"}
    assert calls(ranks[0], aten.slice.Tensor) == 1


@pytest.mark.parametrize("tp", [2, 4])
def test_einsums_are_read_by_their_letters(tp: int) -> None:
    def weighed(m: Any, x: Tensor) -> Tensor:
        h = torch.einsum("td, edf -> tef", x, m.up).relu()
        gates = torch.softmax(x[:, :E], -1)
        return torch.einsum("te,ted->td", gates, torch.einsum("tef,efd->ted", h, m.down))

    plan, ranks = proved(weighed, tp, **STACKS)
    assert decisions(plan) == {"up": "batch", "down": "batch"}
    assert [r.reduce for r in plan] == [False, False, True]
    assert ranks[0].down.shape == (E // tp, F, D)
    assert calls(ranks[0], ops.torch_dist_all_gather.default) == 0


def test_einsums_over_heads() -> None:
    def heads(m: Any, x: Tensor) -> Tensor:
        return torch.einsum("tnh,nhd->td", torch.einsum("td,dnh->tnh", x, m.q).tanh(), m.o).softmax(-1)

    plan, ranks = proved(heads, 2, q=(D, 4, 3), o=(4, 3, D))
    assert [(r.weights, r.decision, r.dim) for r in plan if r.weights] == [
        (("q",), "batch", 1), (("o",), "follow", 0),
    ]  # fmt: skip
    assert plan.rows[0].layer_type == "unknown"  # nothing tells that these are heads
    assert ranks[1].q.shape == (D, 2, 3)
    assert ranks[1].o.shape == (2, 3, D)


@pytest.mark.parametrize("equation", ["...d,edf->...ef", "td,edf", "td,edd->te"])
def test_einsums_that_leave_letters_open_stay_whole(equation: str) -> None:
    gm = graph_of(lambda m, x: torch.einsum(equation, x, m.up), up=(E, D, D))
    (row,) = planned(gm, 2)
    assert (row.decision, row.weights) == ("whole", ("up",))


def test_a_weighted_sum_as_a_product_takes_a_ranks_weights() -> None:
    def weighed(m: Any, x: Tensor) -> Tensor:
        y = torch.matmul(x, m.up).transpose(0, 1)
        return torch.matmul(torch.softmax(x[:, :E], -1).unsqueeze(1), y).squeeze(1)

    plan, ranks = proved(weighed, 4, up=(E, D, F))
    assert decisions(plan) == {"up": "batch"}
    assert calls(ranks[0], ops.torch_dist_all_reduce.default) == 1


def test_a_linear_that_reads_the_pieces_becomes_rowwise() -> None:
    def grouped(m: Any, x: Tensor) -> Tensor:
        y = torch.bmm(x.reshape(-1, 2, D // 2).transpose(0, 1), m.up).transpose(0, 1)
        return ops.torch_linear_simple(y.reshape(-1, 2 * F), m.out).softmax(-1)

    plan, ranks = proved(grouped, 2, up=(2, D // 2, F), out=(D, 2 * F))
    assert decisions(plan) == {"up": "batch", "out": "rowwise"}
    assert "up" in plan.find("out")[0].why
    assert ranks[0].out.shape == (D, F)
    gm = graph_of(grouped, up=(2, D // 2, F), out=(D, 2 * F))
    assert decisions(planned(gm, 2, sharding_dims=["bmm"])) == {"up": "gather", "out": "whole"}


def test_a_batch_that_does_not_divide_stays_whole_and_says_so() -> None:
    plan = planned(graph_of(mixture, **STACKS), 3)
    assert {r.decision for r in plan} == {"whole"}
    assert {r.why for r in plan} == {"4 stacked matrices are not shared equally by 3 ranks"}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"sharding_dims": ["tp", "ep"]}, "sharding_dims has no bmm"),
        ({"shard_layers": ["mlp"]}, "shard_layers leaves moe layers whole"),
        ({"sharding_source": ["manual"]}, "no source of decisions names it: manual_config is empty"),
    ],
)
def test_settings_leave_stacks_whole(config: dict[str, Any], why: str) -> None:
    plan = planned(graph_of(mixture, **STACKS), 2, **config)
    assert {(r.decision, r.why) for r in plan} == {("whole", why)}


def test_with_sequences_of_their_own_ranks_hold_stacks_whole() -> None:
    plan = planned(
        graph_of(mixture, **STACKS), DistConfig.of(tp=2, enable_attention_dp=True), shard_layers=["moe"]
    )
    assert all("sequences of its own" in r.why for r in plan)


def test_by_hand_a_stack_is_named_by_its_weight() -> None:
    gm = graph_of(mixture, **STACKS)
    plan = planned(gm, 2, manual_config={"up": "gather", "down": "whole"})
    assert decisions(plan) == {"up": "gather", "down": "whole"}
    assert plan.to_manual() == {"up": "gather", "down": "whole"}
    with pytest.raises(ShardingError, match=r"'colwise', which does not fit a product with stacked matrices"):
        planned(gm, 2, manual_config={"up": "colwise"})
    with pytest.raises(ShardingError, match=r"4 stacked matrices of .* cannot be shared by tp=3 ranks"):
        planned(gm, 3, manual_config={"up": "batch", "down": "batch"})
    with pytest.raises(ShardingError, match="contradicts itself"):
        planned(
            graph_of(lambda m, x: torch.matmul(x, m.up).amax(0), up=(E, D, F)),
            2,
            manual_config={"up": "batch"},
        )


def test_an_edited_plan_joins_what_was_in_pieces() -> None:
    gm = graph_of(mixture, **STACKS)
    gm.meta["adkit_plan"] = planned(gm, 2).edit("up", "gather")
    run(gm, "sharding_transform_executor", DistConfig.of(tp=2))
    found, ranks = on_ranks(gm, 2)
    assert calls(ranks[0], ops.torch_dist_all_gather.default) == 1
    for out in found:
        torch.testing.assert_close(out, Net(mixture, **STACKS)(tokens()))


def test_products_of_values_and_of_plain_matrices_are_no_stacks() -> None:
    def plain(m: Any, x: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(x, m.one), torch.matmul(x, m.one).transpose(0, 1))

    plan = planned(graph_of(plain, one=(D, F)), 2)
    assert {r.why for r in plan} == {"matmul is no torch_linear_simple, so nothing is known about its weight"}
