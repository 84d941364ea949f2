"""The cost model against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import adkit.ops
from adkit.graph import cost, identity, snapshot
from adkit.graph.cost import DEVICES, NodeCost, attended_pairs, cost_table, node_costs, total_cost
from adkit.ops.attention import allowed

OPS = torch.ops.adkit


def graph_of(model: nn.Module, dynamic: Any = None, **inputs: torch.Tensor) -> snapshot.Snapshot:
    program = torch.export.export(model, (), kwargs=inputs, dynamic_shapes=dynamic, strict=False)
    gm = program.module(check_guards=False)
    identity.identities(gm).settle(gm.graph)
    return snapshot.take(gm)


class Fn(nn.Module):
    """A function as a module, so that it can be exported."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, **inputs: Any) -> Any:
        return self.fn(**inputs)


def one(fn: Any, target: str, symbols: dict[str, int] | None = None, **inputs: torch.Tensor) -> NodeCost:
    """Cost of the only call to ``target`` in ``fn``."""
    graph = graph_of(Fn(fn), **{k: v.to("meta") for k, v in inputs.items()})
    costs = node_costs(graph, "H100 SXM", symbols or {})
    found = [costs[n.id] for n in graph if n.target_name == target]
    assert len(found) == 1, graph.counts()
    return found[0]


def e(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_matrix_products_take_2mnk_and_read_and_write_everything_once() -> None:
    m, k, n = 8, 16, 32
    bytes_ = 2 * (m * k + k * n + m * n)
    got = one(lambda a, b: a @ b, "aten.matmul", a=e(m, k), b=e(k, n))
    assert (got.flops, got.bytes) == (2 * m * n * k, bytes_)
    got = one(
        lambda a, b: OPS.torch_linear_simple(a, b), "adkit.torch_linear_simple", a=e(1, m, k), b=e(n, k)
    )
    assert (got.flops, got.bytes) == (2 * m * n * k, bytes_)
    got = one(lambda c, a, b: torch.addmm(c, a, b), "aten.addmm", c=e(n), a=e(m, k), b=e(k, n))
    assert (got.flops, got.bytes) == (2 * m * n * k, bytes_ + 2 * n)


def test_seconds_are_the_longer_of_compute_and_memory() -> None:
    device = DEVICES["H100 SXM"]
    big = one(lambda a, b: a @ b, "aten.matmul", a=e(8192, 8192), b=e(8192, 8192))
    assert (big.bound, big.seconds) == ("compute", big.flops / device.flops["bfloat16"])
    thin = one(lambda a, b: a @ b, "aten.matmul", a=e(1, 8192), b=e(8192, 8192))
    assert (thin.bound, thin.seconds) == ("memory", thin.bytes / device.bandwidth)
    wide = e(8192, 8192, dtype=torch.float32)
    assert (
        one(lambda a, b: a @ b, "aten.matmul", a=wide, b=wide).seconds == big.flops / device.flops["float32"]
    )
    wide_sum = one(
        lambda a, b: OPS.torch_fused_linear(a, b, residual=a, eps=1e-6),
        "adkit.torch_fused_linear", a=wide, b=e(8192, 8192),
    )  # fmt: skip
    assert wide_sum.seconds == big.flops / device.flops["bfloat16"]  # float32 around a product in bfloat16
    assert device.peak(torch.float16) == device.peak(torch.bfloat16)


def test_views_are_free_and_copies_are_not() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return x.view(4, 2, 8).transpose(0, 1).unsqueeze(0).contiguous().to(torch.float32)

    graph = graph_of(Fn(fn), x=e(8, 8))
    costs = {n.target_name: c for n in graph if (c := node_costs(graph, "H100 SXM", {}).get(n.id))}
    for view in ("aten.view", "aten.transpose.int", "aten.unsqueeze"):
        assert costs[view] == NodeCost()
    assert costs["aten.contiguous"].bytes == 2 * 64 * 2
    casts = [c for name, c in costs.items() if "to" in name.split(".")[1]]
    assert [(c.flops, c.bytes) for c in casts] == [(0, 64 * 2 + 64 * 4)]


def test_taking_an_element_of_a_tuple_is_free() -> None:
    graph = graph_of(
        Fn(lambda q, cos: OPS.torch_rope_with_explicit_cos_sin(q, q, cos, cos)),
        q=e(1, 2, 4, 8),
        cos=e(1, 4, 8),
    )
    costs = {n.target_name: node_costs(graph, "H200", {})[n.id] for n in graph if n.op == "call_function"}
    assert costs["operator.getitem"] == NodeCost()
    assert costs["adkit.torch_rope_with_explicit_cos_sin"].flops == 3 * 2 * 64


def test_an_expanded_tensor_is_read_once() -> None:
    got = one(lambda x: x.expand(10, 8).clone(), "aten.clone", x=e(1, 8))
    assert got.bytes == 8 * 2 + 80 * 2


def test_an_embedding_reads_only_its_rows() -> None:
    ids = torch.zeros(1, 5, dtype=torch.int64)
    got = one(lambda t, i: torch.nn.functional.embedding(i, t), "aten.embedding", t=e(128256, 64), i=ids)
    assert (got.flops, got.bytes) == (0, 2 * 5 * 64 * 2 + 5 * 8)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (3, None), (None, 4), (5, 4)])
@pytest.mark.parametrize(("queries", "past"), [(7, 0), (1, 9), (6, 5)])
def test_attended_pairs_counts_the_mask(
    causal: bool, window: int | None, chunk: int | None, queries: int, past: int
) -> None:
    every = torch.arange(past + queries)
    mask = allowed(every[past:], every, causal, window, chunk)
    assert attended_pairs(queries, past, causal, window, chunk) == mask.sum()


def test_attention_counts_the_pairs_its_mask_lets_through() -> None:
    q, k, v = e(2, 10, 8, 64), e(2, 10, 2, 64), e(2, 10, 2, 32)
    traffic = 2 * (q.numel() + k.numel() + v.numel() + 2 * 10 * 8 * 32)
    name = "adkit.torch_attention"
    got = one(lambda q, k, v: OPS.torch_attention(q, k, v), name, q=q, k=k, v=v)
    assert (got.flops, got.bytes) == (2 * 2 * 8 * 55 * (64 + 32), traffic)
    got = one(lambda q, k, v: OPS.torch_attention(q, k, v, window=3), name, q=q, k=k, v=v)
    assert got.flops == 2 * 2 * 8 * (1 + 2 + 3 * 8) * (64 + 32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_cached_decode_reads_the_history_not_the_pool(backend: str) -> None:
    op = adkit.ops.pick("attention_with_paged_cache", backend)
    n_seq, heads, kv, dim, context = 4, 8, 2, 64, 1000
    index = torch.zeros(n_seq, dtype=torch.int32)
    tensors = {
        "q": e(1, n_seq, heads, dim),
        "k": e(1, n_seq, kv, dim),
        "v": e(1, n_seq, kv, dim),
        "cu": torch.zeros(n_seq + 1, dtype=torch.int32),
        "lens": index,
        "table": torch.zeros(n_seq, 100, dtype=torch.int32),
        "slots": index.long(),
        "kc": e(5000, 16, kv, dim),
        "vc": e(5000, 16, kv, dim),
    }

    def fn(window: int | None) -> Any:
        return lambda q, k, v, cu, lens, table, slots, kc, vc: op(
            q, k, v, None, None, None, cu, lens, table, slots, kc, vc, window=window
        )

    metadata = 4 * (5 + 4 + 400) + 8 * 4
    step = 2 * n_seq * dim * (heads + 2 * kv + heads) + 2 * n_seq * 2 * kv * dim
    for window, reach in ((None, context), (128, 128)):
        got = one(fn(window), f"adkit.{backend}_attention_with_paged_cache", {"context": context}, **tensors)
        assert got.flops == n_seq * 2 * heads * reach * 2 * dim
        assert got.bytes == metadata + step + n_seq * reach * 2 * kv * dim * 2


def test_moe_reads_the_experts_that_are_hit() -> None:
    tokens, d, f, experts, k = 2, 16, 32, 8, 2

    def fn(**t: torch.Tensor) -> torch.Tensor:
        return OPS.torch_moe(t["x"], t["ids"], t["w"], t["gate_up"], t["down"])

    ids = torch.zeros(tokens, k, dtype=torch.int64)
    got = one(
        fn,
        "adkit.torch_moe",
        x=e(tokens, d),
        ids=ids,
        w=e(tokens, k),
        gate_up=e(experts, 2 * f, d),
        down=e(experts, d, f),
    )
    assert got.flops == tokens * k * (2 * d * 2 * f + 2 * f * d)
    hit = experts * (1 - (1 - k / experts) ** tokens)
    assert got.bytes == 2 * 2 * tokens * d + tokens * k * (8 + 2) + hit * 3 * d * f * 2


@pytest.fixture(scope="module")
def llama() -> snapshot.Snapshot:
    """Two layers of Llama-3.1-8B at full width, bfloat16, without weights; batch and sequence open."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.ones(2, 16, dtype=torch.int64, device="meta")
    dims = {"input_ids": dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)}

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
            return logits

    return graph_of(Logits(), dims, input_ids=ids)


def test_llama_8b_reads_its_parameters_and_computes_twice_as_many_flops_a_token(
    llama: snapshot.Snapshot,
) -> None:
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    matrices = 2 * layer + 4096 * 128256
    weights = matrices + 4096 * 128256 + 5 * 4096
    inv_freq = 64 * 4
    assert cost.weight_bytes(llama) == 2 * weights + inv_freq
    assert 32 * layer + 2 * 4096 * 128256 + 65 * 4096 == 8_030_261_248  # the published size
    for batch, seq in ((1, 1), (3, 40)):
        table = cost_table(llama, "H100 SXM", {"batch": batch, "seq": seq})
        linear = table[table.target == "aten.linear"]
        assert len(linear) == 15
        assert linear.flops.sum() == 2 * batch * seq * matrices
        layer_io = (3 * 4096 + 4096 + 2 * 1024) + 2 * 4096 + 2 * (4096 + 14336) + (14336 + 4096)
        activations = 2 * batch * seq * (2 * layer_io + 4096 + 128256)
        assert linear.bytes.sum() == 2 * matrices + activations
    decode = cost_table(llama, "H100 SXM", {"batch": 1, "seq": 1})
    assert set(decode[decode.target == "aten.linear"].bound) == {"memory"}
    prefill = cost_table(llama, "H100 SXM", {"batch": 1, "seq": 4096})
    assert "compute" in set(prefill[prefill.target == "aten.linear"].bound)
    assert prefill.layer.dropna().nunique() == 2


def test_totals_add_up(llama: snapshot.Snapshot) -> None:
    table = cost_table(llama, DEVICES["H200"], {"batch": 1, "seq": 8})
    total = table.attrs["total"]
    assert total.flops == table.flops.sum()
    assert total.seconds == pytest.approx(table.seconds.sum())
    assert total.bound == "memory"
    assert total_cost([]) == NodeCost()


def test_sizes_that_are_missing_unknown_or_at_odds_are_refused(llama: snapshot.Snapshot) -> None:
    with pytest.raises(ValueError, match=r"sizes that were not given: .*seq"):
        cost_table(llama, "H200", {"batch": 1})
    with pytest.raises(ValueError, match=r"'sequence' is not one of this graph's; it has .*batch"):
        cost_table(llama, "H200", {"batch": 1, "sequence": 3})
    with pytest.raises(ValueError, match="given twice"):
        cost_table(llama, "H200", {"batch": 1, "seq": 3, "tokens": 4})
    with pytest.raises(ValueError, match="no device is called"):
        cost_table(llama, "H900", {"batch": 1, "seq": 3})
