"""Every hint, cut for one, two and eight ranks: all ranks together compute what the uncut graph does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from adkit.contract import Cut, DistConfig, LocalWeight, ShardingError
from tests.passes.sharding.graphs import Net, cut, exported, ops, together, whole_and_cut

WORLDS = (1, 2, 8)
F64 = torch.float64


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=F64)


def same(whole: torch.Tensor, ranks: list[torch.Tensor]) -> None:
    for out in ranks:
        torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)


def hints_left(gm: Any) -> list[str]:
    words = {"tp_mode", "layer_type", "shardable", "output_sizes", "tp_min_local_shape"}
    return [n.name for n in gm.graph.nodes if words & set(n.kwargs) or "adkit.all_" in str(n.target)]


def mlp(n: Any, x: torch.Tensor) -> torch.Tensor:
    h = ops.torch_linear_simple(x, n.up, n.up_bias, tp_mode="colwise", layer_type="mlp")
    y = ops.torch_linear_simple(torch.relu(h), n.down, n.down_bias, tp_mode="rowwise", layer_type="mlp")
    return ops.all_reduce(y, layer_type="mlp")


MLP = {"up": (16, 6), "up_bias": (16,), "down": (6, 16), "down_bias": (6,)}


@pytest.mark.parametrize("tp", WORLDS)
def test_colwise_and_rowwise_with_biases(tp: int) -> None:
    whole, ranks, graphs, info = whole_and_cut(mlp, x(3, 6), DistConfig.of(tp), **MLP)
    same(whole, ranks)
    assert info.details["nodes processed"] == 3
    net = Net(mlp, **MLP)
    for rank, gm in enumerate(graphs):
        a, b = 16 * rank // tp, 16 * (rank + 1) // tp
        assert torch.equal(gm.up, net.up[a:b])
        assert torch.equal(gm.up_bias, net.up_bias[a:b])
        assert torch.equal(gm.down, net.down[:, a:b])
        assert torch.equal(gm.down_bias, net.down_bias if rank == 0 else torch.zeros_like(net.down_bias))
        assert not hints_left(gm)
        assert ("adkit_local" in gm.meta) == (tp > 1)
    if tp == 8:
        assert graphs[3].meta["adkit_local"]["up"] == LocalWeight("up", (Cut(0, ((6, 8),)),))


@pytest.mark.parametrize("tp", WORLDS)
def test_gather(tp: int) -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        return ops.torch_linear_simple(x, n.w, n.b, tp_mode="gather", layer_type="vocab")

    whole, ranks, *_ = whole_and_cut(net, x(3, 6), DistConfig.of(tp), w=(24, 6), b=(24,))
    same(whole, ranks)


def attention(n: Any, x: torch.Tensor) -> torch.Tensor:
    """8 query heads, 2 key and value heads of 4, fused; sinks and a norm over all of a token's query heads."""
    qkv = ops.torch_linear_simple(
        x, n.qkv, None, tp_mode="colwise", output_sizes=[32, 8, 8], tp_min_local_shape=4, layer_type="mha"
    )
    q, k, v = ops.split_with_sizes(qkv, [32, 8, 8], -1, tp_min_local_shape=4, layer_type="mha")
    q = ops.rmsnorm(q, n.q_norm, 1e-6, layer_type="mha")
    weight = ops.shard(n.k_norm, 0, tp_min_local_shape=4, layer_type="mha")
    k = ops.rmsnorm(k, weight, 1e-6, layer_type="mha")
    b = x.shape[0]
    q = ops.view(q, [b, 5, 8, 4], tp_scaled_dim=2, layer_type="mha")
    k, v = (ops.view(t, [b, 5, 2, 4], tp_scaled_dim=-2, layer_type="mha") for t in (k, v))
    sinks = ops.shard(n.sinks, 0, layer_type="mha")
    o = ops.torch_attention(q, k, v, sinks=sinks)
    o = ops.view(o, [b, 5, -1], tp_scaled_dim=2, layer_type="mha")
    return ops.all_reduce(
        ops.torch_linear_simple(o, n.o, tp_mode="rowwise", layer_type="mha"), layer_type="mha"
    )


ATTENTION = {"qkv": (48, 6), "o": (6, 32), "q_norm": (32,), "k_norm": (8,), "sinks": (8,)}


@pytest.mark.parametrize("tp", WORLDS)
def test_attention_whose_key_heads_are_fewer_than_ranks(tp: int) -> None:
    whole, ranks, graphs, _ = whole_and_cut(attention, x(3, 5, 6), DistConfig.of(tp), **ATTENTION)
    for out in ranks:
        torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-6)  # norms compute in float32
    if tp == 8:
        net = Net(attention, **ATTENTION)
        rows = [net.qkv[20:24], net.qkv[36:40], net.qkv[44:48]]  # rank 5: query head 5, key and value head 1
        assert torch.equal(graphs[5].qkv, torch.cat(rows))
        assert torch.equal(graphs[5].k_norm, net.k_norm[4:])
        assert torch.equal(graphs[5].sinks, net.sinks[5:6])


@pytest.mark.parametrize("tp", WORLDS)
def test_vocabulary(tp: int) -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        ids = (x * 7).abs().to(torch.int64).clamp(max=23)
        return ops.all_reduce(ops.embedding(n.table, ids), layer_type="vocab")

    whole, ranks, graphs, _ = whole_and_cut(net, x(4, 9), DistConfig.of(tp), table=(24, 6))
    same(whole, ranks)
    assert graphs[-1].table.shape == (24 // tp, 6)


@pytest.mark.parametrize("tp", WORLDS)
def test_a_computed_value_is_sliced(tp: int) -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        scaled = n.w * 2.0
        h = ops.torch_linear_simple(x, scaled, tp_mode="colwise", layer_type="mlp")
        y = ops.torch_linear_simple(h, n.down, n.bias.neg(), tp_mode="rowwise", layer_type="mlp")
        gathered = ops.all_gather(ops.shard(x, 1, layer_type="mlp"), 1, layer_type="mlp")
        return ops.all_reduce(y, layer_type="mlp") + gathered.sum()

    whole, ranks, *_ = whole_and_cut(net, x(3, 8), DistConfig.of(tp), w=(16, 8), down=(8, 16), bias=(8,))
    same(whole, ranks)


# --- experts


def moe(**options: Any) -> Any:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.softmax(x @ n.router.t(), -1).topk(3, -1)
        extra = [getattr(n, name) for name in ("gate_up_bias", "down_bias") if hasattr(n, name)]
        out = ops.torch_moe(
            x, ids, weights, n.gate_up, n.down, *extra, **options, shardable=True, layer_type="moe"
        )
        return ops.all_reduce(out, layer_type="moe")

    return net


GATED = {"router": (8, 6), "gate_up": (8, 32, 6), "down": (8, 6, 16)}


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (2, 2), (8, 1), (8, 2), (8, 4), (8, 8)])
@pytest.mark.parametrize("kind", ["plain", "transposed", "interleaved", "ungated"])
def test_experts_by_number_and_by_feature(tp: int, ep: int, kind: str) -> None:
    shapes = dict(GATED, gate_up_bias=(8, 32), down_bias=(8, 6))
    options: dict[str, Any] = {}
    if kind in ("transposed", "interleaved"):
        options |= {"transposed": True, "interleaved": kind == "interleaved"}
        shapes |= {"gate_up": (8, 6, 32), "down": (8, 16, 6)}
    if kind == "ungated":
        options |= {"gated": False}
        shapes |= {"gate_up": (8, 16, 6), "gate_up_bias": (8, 16)}
    whole, ranks, graphs, _ = whole_and_cut(moe(**options), x(11, 6), DistConfig.of(tp, ep), **shapes)
    same(whole, ranks)
    assert sum(gm.down.numel() for gm in graphs) == 8 * 6 * 16
    assert sum(gm.gate_up.numel() for gm in graphs) == 8 * 6 * 16 * (1 if kind == "ungated" else 2)
    held = sum(bool(gm.down_bias.any()) * gm.down_bias.shape[0] for gm in graphs)
    assert held == 8  # every expert's bias is added by one rank


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_with_tokens_of_ones_own(ep: int) -> None:
    """Attention data parallelism: only experts are shared; each rank brings tokens and gets theirs back."""
    dist = DistConfig.of(2, ep, enable_attention_dp=True)
    net = Net(lambda n, x: mlp(n.dense, moe()(n, x)), **GATED)
    net.dense = Net(mlp, **MLP)
    tokens = x(8, 6)
    graphs = []
    for rank in range(2):
        gm = exported(net, tokens[:4])
        cut(gm, dist.at(rank))
        assert gm.dense.up.shape == (16, 6)
        graphs.append(gm)

    whole = net(tokens)
    halves = [o[0] for o in together(graphs, tokens.chunk(2), apart=True)]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-12, atol=1e-12)


def test_experts_that_are_to_stay_whole() -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.softmax(x @ n.router.t(), -1).topk(3, -1)
        return ops.torch_moe(x, ids, weights, n.gate_up, n.down, shardable=False, layer_type="moe")

    whole, ranks, graphs, _ = whole_and_cut(net, x(3, 6), DistConfig.of(2), **GATED)
    same(whole, ranks)
    assert graphs[0].gate_up.shape == (8, 32, 6)


# --- names of weights


def test_a_weight_read_whole_and_cut_gets_a_second_name() -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        h = ops.torch_linear_simple(x, n.w, tp_mode="colwise", layer_type="mlp")
        y = ops.torch_linear_simple(h, n.w, tp_mode="rowwise", layer_type="mlp")
        return ops.all_reduce(y, layer_type="mlp") + n.w.sum()

    whole, ranks, graphs, _ = whole_and_cut(net, x(3, 8), DistConfig.of(2), w=(8, 8))
    same(whole, ranks)
    local = graphs[1].meta["adkit_local"]
    assert local == {
        "w_local": LocalWeight("w", (Cut(0, ((4, 8),)),)),
        "w_local2": LocalWeight("w", (Cut(1, ((4, 8),)),)),
    }
    assert graphs[1].w.shape == (8, 8)


def test_tied_weights_stay_one_tensor() -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        ids = x.abs().to(torch.int64)
        h = ops.all_reduce(ops.embedding(n.table, ids), layer_type="vocab")
        return ops.torch_linear_simple(h, n.head, tp_mode="gather", layer_type="vocab")

    made = Net(net, table=(24, 6))
    made.head = made.table
    graphs = [exported(made, x(4, 9)) for _ in range(2)]
    for rank, gm in enumerate(graphs):
        cut(gm, DistConfig.of(2, rank=rank))
    same(made(x(4, 9)), [o[0] for o in together(graphs, x(4, 9))])
    reads = [n.target for n in graphs[1].graph.nodes if n.op == "get_attr"]
    assert len({id(getattr(graphs[1], name)) for name in reads}) == 1
    assert graphs[1].get_parameter(reads[0]).shape == (12, 6)


# --- which layers


@pytest.mark.parametrize("tp", [2, 8])
def test_only_layers_that_are_named_are_cut(tp: int) -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        h = mlp(n, x) + ops.all_reduce(ops.torch_linear_simple(x, n.other, tp_mode="rowwise"))
        return ops.torch_linear_simple(h, n.head)

    shapes = dict(MLP, down=(8, 16), down_bias=(8,), up=(16, 8), other=(8, 8), head=(24, 8))
    dist = DistConfig.of(tp)
    whole, ranks, graphs, _ = whole_and_cut(net, x(3, 8), dist, {"shard_layers": ["mlp"]}, **shapes)
    same(whole, ranks)
    assert graphs[0].up.shape == (16 // tp, 8)
    assert graphs[0].other.shape == (8, 8)
    assert not hints_left(graphs[0])
    # The filter acts whatever shard_layers says.
    config = {"shard_layers": [], "simple_shard_filter": "head, other"}
    whole, ranks, graphs, _ = whole_and_cut(net, x(3, 8), dist, config, **shapes)
    same(whole, ranks)
    assert graphs[0].up.shape == (16, 8)
    assert graphs[0].head.shape == (24 // tp, 8)
    assert graphs[0].other.shape == (8 // tp, 8)
    with pytest.raises(ValidationError, match="mlp"):
        whole_and_cut(net, x(3, 8), dist, {"shard_layers": ["mpl"]}, **shapes)


def test_the_filter_knows_weights_that_are_stored_turned_around() -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        return ops.torch_linear_simple(x, n.head.t())

    whole, ranks, graphs, _ = whole_and_cut(
        net, x(3, 8), DistConfig.of(2), {"simple_shard_filter": "head"}, head=(8, 24)
    )
    same(whole, ranks)
    assert graphs[1].head.shape == (8, 12)


def test_a_graph_without_hints_is_left() -> None:
    gm = exported(Net(lambda n, x: ops.torch_linear_simple(x, n.w), w=(4, 6)), x(3, 6))
    before = [(n, n.args, n.meta.get("val")) for n in gm.graph.nodes]
    info = cut(gm, DistConfig.of(2))
    assert info.num_matches == 0
    assert before == [(n, n.args, n.meta.get("val")) for n in gm.graph.nodes]
    assert "adkit_local" not in gm.meta


def test_strategies_reach_the_collectives() -> None:
    gm = exported(Net(mlp, **MLP), x(3, 6))
    cut(gm, DistConfig.of(2, allreduce_strategy="NCCL"))
    (node,) = (n for n in gm.graph.nodes if n.target is ops.torch_dist_all_reduce.default)
    assert node.args[1] == "NCCL"
    gm = exported(Net(mlp, **MLP), x(3, 6))
    cut(gm, DistConfig.of(2, allreduce_strategy="NCCL"), allreduce_strategy="ONESHOT")
    (node,) = (n for n in gm.graph.nodes if n.target is ops.torch_dist_all_reduce.default)
    assert node.args[1] == "ONESHOT"


# --- what cannot be


def fails(forward: Any, tp: int, message: str, shape: tuple[int, ...] = (3, 6), **shapes: Any) -> None:
    gm = exported(Net(forward, **shapes), x(*shape))
    with pytest.raises(ShardingError, match=message):
        cut(gm, DistConfig.of(tp))


def test_numbers_that_do_not_divide() -> None:
    fails(mlp, 3, r"\(up\).*16 elements cannot be shared by 3 ranks.*1, 2, 4 ranks would do.*whole", **MLP)

    def heads(n: Any, x: torch.Tensor) -> torch.Tensor:
        return ops.torch_linear_simple(x, n.w, tp_mode="colwise", tp_min_local_shape=4, layer_type="mha")

    fails(heads, 4, r"6 pieces of 4 elements cannot be shared by 4.*1, 2, 3, 6 ranks", w=(24, 6))
    fails(heads, 2, r"26 elements are not a whole number of pieces of 4", w=(26, 6))

    def fused(n: Any, x: torch.Tensor) -> torch.Tensor:
        return ops.torch_linear_simple(x, n.w, tp_mode="colwise", output_sizes=[8, 6])

    fails(fused, 4, r"6 elements \(block 1 of \[8, 6\]\) cannot be shared by 4", w=(14, 6))
    fails(fused, 2, r"output_sizes \[8, 6\] add up to 14", w=(16, 6))


def test_what_must_not_be_held_twice() -> None:
    """Copies are for key and value heads; sums and joins of copies would count them twice."""

    def rows(n: Any, x: torch.Tensor) -> torch.Tensor:
        return ops.torch_linear_simple(x, n.w, tp_mode="rowwise", tp_min_local_shape=3)

    fails(rows, 4, "2 pieces of 3 elements cannot be shared by 4 ranks", w=(4, 6))

    def joined(n: Any, x: torch.Tensor) -> torch.Tensor:
        return ops.torch_linear_simple(x, n.w, tp_mode="gather", tp_min_local_shape=2)

    fails(joined, 4, "2 pieces of 2", w=(4, 6))
    fails(moe(), 3, "the experts of .*8 elements cannot be shared by 3", **GATED)


def test_vocabulary_and_views_that_do_not_divide() -> None:
    def table(n: Any, x: torch.Tensor) -> torch.Tensor:
        return ops.embedding(n.table, x.abs().to(torch.int64))

    fails(table, 2, "the vocabulary of .*25 elements", table=(25, 6))

    def seen(n: Any, x: torch.Tensor) -> torch.Tensor:
        h = ops.torch_linear_simple(x, n.w, tp_mode="colwise")
        return ops.view(h, [x.shape[0], 3, 4], tp_scaled_dim=1)

    fails(seen, 2, "3 elements cannot be shared by 2", w=(12, 6))


def test_a_view_that_was_forgotten() -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        h = ops.torch_linear_simple(x, n.w, tp_mode="colwise", layer_type="mha")
        return h.view(x.shape[0], 4, 3)

    fails(net, 2, "do not fit each other.*tp_scaled_dim", w=(12, 6))


def test_modes_that_are_none() -> None:
    def net(n: Any, x: torch.Tensor) -> torch.Tensor:
        return ops.torch_linear_simple(x, n.w, tp_mode="colwize")

    fails(net, 2, "did you mean 'colwise'", w=(12, 6))


def test_a_config_of_another_world() -> None:
    gm = exported(Net(mlp, **MLP), x(3, 6))
    for config, word in (
        ({"dist_mapping": {"tp": 4}}, r"tp_size=4 \(running: 2\)"),
        ({"dist_mapping": {"moe_ep_size": 1}}, "moe_ep_size=1"),
        ({"dist_mapping": {"tensor": 2}}, "has no 'tensor'"),
        ({"dist_config": DistConfig.of(4)}, "world_size=4"),
        ({"dist_config": DistConfig.of(2), "dist_mapping": {"tp": 4}}, "say it once"),
    ):
        with pytest.raises(ShardingError, match=word):
            cut(gm, DistConfig.of(2), **config)
    cut(gm, DistConfig.of(2), dist_mapping={"tp": 2, "moe_ep": 2})
