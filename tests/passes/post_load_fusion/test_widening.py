"""The residual stream and the logits in float32: nearer to the float32 model, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM

from tests.passes.graphs import (
    VOCAB,
    check_values,
    count,
    inputs_for,
    logits,
    run_pass,
    tiny_graph,
)
from tests.zoo import sensitise, tiny_config

MATCHED = (
    "match_bmm_moe_pattern",
    "match_moe_routing_pattern",
    "match_sdpa_to_torch_attention",
    "match_rope_pattern",
    "match_rmsnorm_pattern",
    "match_swiglu_pattern",
    "match_linear",
)
FUSED = ("fuse_gemms", "fuse_swiglu", "fuse_add_rms_norm", "gather_logits_before_lm_head", "widen_logits")
LAYERS = 4
aten = torch.ops.aten


def matched(kind: str, dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS) -> GraphModule:
    gm = tiny_graph(kind, dtype, num_hidden_layers=layers)
    for key in MATCHED:
        run_pass(gm, key)
    return gm


def exact(gm: GraphModule, kind: str) -> torch.Tensor:
    """Logits of the Hugging Face model in float32 with the same weights."""
    torch.manual_seed(0)
    config = tiny_config(kind, num_hidden_layers=LAYERS)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    sensitise(model)
    feed = inputs_for(gm, 2, 9, VOCAB)
    with torch.no_grad():
        return model.float()(**feed).logits


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """The median over positions of a position's rmse ratio: rounding may give a router another expert."""
    error, size = (got.float() - want).flatten(0, 1).norm(dim=-1), want.flatten(0, 1).norm(dim=-1)
    return float((error / size).median())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "granite", "gemma2", "mixtral"])
def test_a_wide_stream_is_nearer_to_float32(kind: str) -> None:
    gm = matched(kind)
    want = exact(gm, kind)
    before = off(logits(gm), want)
    dtypes = {p.dtype for p in gm.parameters()}
    info = run_pass(gm, "widen_residual_stream")
    assert info.num_matches == 2 * LAYERS
    check_values(gm)
    sums = [n for n in gm.graph.nodes if n.target is aten.add.Tensor and n.meta["val"].shape[-1] == 48]
    assert [n.meta["val"].dtype for n in sums].count(torch.float32) == 2 * LAYERS
    assert {n.meta["val"].dtype for n in gm.graph.nodes if "linear" in str(n.target)} == {torch.bfloat16}
    after = off(logits(gm), want)
    assert after < before
    assert {p.dtype for p in gm.parameters()} == dtypes

    rounded = logits(gm)
    run_pass(gm, "widen_logits")
    got = logits(gm)
    assert got.dtype == torch.float32
    assert (got - rounded).abs().max() <= 2**-6 * rounded.abs().max()  # a few roundings to bfloat16
    check_values(gm)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_fusions_take_a_wide_stream(kind: str) -> None:
    gm = matched(kind)
    wanted = torch.arange(9)
    want = exact(gm, kind)
    narrow = matched(kind)
    for graph, keys in ((gm, ("widen_residual_stream", *FUSED)), (narrow, FUSED[:-1])):
        for key in keys:
            run_pass(graph, key)
        run_pass(graph, "fuse_gemm_epilogues", backend="torch")
    check_values(gm, logits_indices=wanted)
    for op in ("torch_fused_linear", "torch_fused_add_rmsnorm", "torch_rmsnorm", "torch_linear_simple"):
        assert count(gm, op) == count(narrow, op), op
    near, far = (off(logits(g, logits_indices=wanted), want) for g in (gm, narrow))
    assert near < far


def test_logits_that_tie_in_bfloat16_are_told_apart() -> None:
    gm = matched("llama")

    def ties() -> int:
        return sum(int((r == r.max()).sum() > 1) for r in logits(gm, 16, 32).flatten(0, 1))

    assert ties() > 0
    run_pass(gm, "widen_logits")
    assert ties() == 0


@pytest.mark.parametrize(
    ("kind", "dtype", "why"),
    [
        ("llama", torch.float32, "float32 already"),
        ("olmo2", torch.bfloat16, "readers of the stream are no RMS norms"),  # linears read it
        ("gpt2", torch.bfloat16, "no RMS norm reads a sum"),
    ],
)
def test_graphs_that_are_left(kind: str, dtype: torch.dtype, why: str) -> None:
    gm = matched(kind, dtype, 2)
    before = logits(gm)
    info = run_pass(gm, "widen_residual_stream")
    assert info.skipped
    assert why in info.reason
    assert torch.equal(logits(gm), before)


def test_float32_logits_are_left() -> None:
    gm = matched("llama", torch.float32, 2)
    info = run_pass(gm, "widen_logits")
    assert info.skipped
    assert "float32 already" in info.reason
