"""Ranks cut by hand: values agree with the uncut block's, and each mistake is named where it happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from adkit.contract import ShardingError
from adkit.graph.placement import PARTIAL, REPLICATED, cut
from adkit.sharding.agreement import Blocks, explain
from adkit.sharding.lockstep import Together
from tests.sharding.by_hand import World, build, ops, weights


def node(gm: GraphModule, name: str) -> Any:
    return next(n for n in gm.graph.nodes if n.name == name)


def drop(name: str) -> Any:
    """Take a collective out."""

    def change(gm: GraphModule, rank: int) -> None:
        n = node(gm, name)
        n.replace_all_uses_with(n.args[0])
        gm.graph.erase_node(n)

    return change


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_hand_cut_ranks_compute_what_the_whole_computes(tp: int) -> None:
    world = World(tp)
    found = world.agreement()
    assert found.divergence is None
    assert len(found.held) > 15
    for logits in world.found:
        torch.testing.assert_close(logits, world.expected, rtol=1e-5, atol=1e-5)
    ids = {n.name: n.id for n in world.snapshots()[1]}
    assert found.held[ids["q_view"]] == cut(2)
    assert found.held[ids["k_view"]] == cut(2)  # copies at tp 8
    assert found.held[ids["o_proj"]] == found.held[ids["embedding"]] == PARTIAL
    assert found.held[ids["o_proj_sum"]] == REPLICATED


@pytest.mark.parametrize(
    ("dropped", "first", "unsummed"),
    [
        ("o_proj_sum", "add", "o_proj"),
        ("down_proj_sum", "out", "down_proj"),
        ("embedding_sum", "q_proj", "norm"),
    ],
)
def test_a_dropped_sum_is_named_where_it_is_missed(dropped: str, first: str, unsummed: str) -> None:
    d = World(2, drop(dropped)).agreement().divergence
    assert d is not None
    assert d.node == first
    assert unsummed in d.why
    assert "all_reduce" in repr(d)


def test_a_wrong_head_count_fails_at_the_view() -> None:
    def change(gm: GraphModule, rank: int) -> None:
        node(gm, "q_view").update_arg(1, [2, 7, 8, 6])

    d = World(2, change).agreement().divergence
    assert d is not None
    assert (d.node, d.rank) == ("q_view", 0)
    assert "RuntimeError" in d.why


def test_a_view_of_other_heads_that_happens_to_run_is_caught() -> None:
    def change(gm: GraphModule, rank: int) -> None:
        node(gm, "q_view").update_arg(1, [2, 7, 2, 12])

    d = World(2, change).agreement().divergence
    assert d is not None
    assert d.node == "q_view"
    assert "no share" in d.why


def test_swapped_shards_are_found_at_the_layer_that_has_them() -> None:
    def change(gm: GraphModule, rank: int) -> None:
        if rank < 2:
            part = weights()["gate"].chunk(4)[1 - rank]
            gm.register_buffer("gate", part)

    d = World(4, change).agreement().divergence
    assert d is not None
    assert d.node == "gate_proj"
    assert d.rank in (0, 1)
    assert d.placement == cut(2)


def test_a_norm_that_does_not_add_up_over_ranks_is_found() -> None:
    def change(gm: GraphModule, rank: int) -> None:
        n = node(gm, "q_norm")
        n.target, n.kwargs = ops.torch_rmsnorm.default, {}

    d = World(2, change).agreement().divergence
    assert d is not None
    assert d.node == "q_norm"


def test_a_wrong_vocabulary_offset_is_found_at_the_embedding() -> None:
    d = World(2, offset=lambda r: 0).agreement().divergence
    assert d is not None
    assert d.node == "embedding"


def test_graphs_that_differ_are_refused() -> None:
    world = World(2)
    drop("o_proj_sum")(world.ranks[1], 1)
    with pytest.raises(ShardingError, match="o_proj_sum"):
        Together(world.ranks)
    with pytest.raises(ShardingError, match="graphs differ"):
        Together([build(weights()), world.ranks[0]])


def test_values_are_freed_after_their_last_use() -> None:
    world = World(2)
    together = Together(world.ranks)
    freed = [n.name for nodes in together._last_use[0].values() for n in nodes]
    assert sorted(freed) == sorted(n.name for n in world.ranks[0].graph.nodes)


def test_shapes_tell_what_ranks_hold() -> None:
    whole = torch.arange(24.0).view(2, 12)
    thirds = list(whole.chunk(3, 1))
    assert explain(whole, thirds, None, 1e-5).placement == cut(1)  # type: ignore[union-attr]
    copies = [whole[:, :6], whole[:, :6], whole[:, 6:], whole[:, 6:]]
    assert explain(whole, copies, None, 1e-5).rmse_ratio == 0  # type: ignore[union-attr]
    wrong = explain(whole, [copies[0], copies[2], copies[0], copies[2]], None, 1e-5)
    assert wrong is not None
    assert wrong.rank in (1, 2)
    assert wrong.rmse_ratio > 0.1
    assert explain(whole, [whole[:, :5], whole[:, 5:10]], None, 1e-5) is None
    assert explain(whole, [whole[:1, :6]] * 4, None, 1e-5) is None


def test_blocks_are_cut_each() -> None:
    """q of 8 and k, v of 2 side by side: two ranks hold half of each, four ranks copies of k and v."""
    whole = torch.arange(12.0).view(1, 12)
    halves = [whole[:, [0, 1, 2, 3, 8, 10]], whole[:, [4, 5, 6, 7, 9, 11]]]
    blocks = Blocks((8, 2, 2))
    assert explain(whole, halves, blocks, 1e-5).rmse_ratio == 0  # type: ignore[union-attr]
    assert explain(whole, halves, None, 1e-5).rmse_ratio > 0.1  # type: ignore[union-attr]
    quarters = [whole[:, [2 * r, 2 * r + 1, 8 + r // 2, 10 + r // 2]] for r in range(4)]
    assert explain(whole, quarters, Blocks((8, 2, 2), 1), 1e-5).rmse_ratio == 0  # type: ignore[union-attr]
