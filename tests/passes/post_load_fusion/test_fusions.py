"""Fusions over canonical ops, and the gather before the lm_head, on real models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from adkit.contract import ConfigError
from adkit.ops import info_of
from tests.passes.graphs import check_values, count, logits, rmse_ratio, run_pass, tiny_graph

MATCHERS = ("match_rope_pattern", "match_rmsnorm_pattern", "match_swiglu_pattern", "match_linear")

# two layers: norms left alone, norms with their sum, packed gates (after fuse_gemms)
FUSED = {
    "llama": (1, 4, 2),
    "qwen3": (5, 4, 2),  # q and k norms read no sum
    "gemma2": (5, 4, 2),  # the norms after attention and MLP read no sum
    "olmo2": (8, 1, 2),  # norms before the sum: only the final norm reads one
    "phi3": (1, 4, 2),  # gate and up are one projection
    "glm4": (5, 4, 2),
    "granite": (1, 4, 2),
}


@pytest.mark.parametrize("kind", FUSED)
def test_norms_gates_and_sums_fuse(kind: str) -> None:
    gm = tiny_graph(kind)
    before = {batch: logits(gm, batch) for batch in (2, 1)}
    for key in (*MATCHERS, "fuse_gemms", "fuse_swiglu", "fuse_add_rms_norm", "gather_logits_before_lm_head"):
        run_pass(gm, key)
    for batch, expected in before.items():
        assert rmse_ratio(logits(gm, batch), expected) < 1e-6
    found = count(gm, "torch_rmsnorm"), count(gm, "torch_fused_add_rmsnorm"), count(gm, "torch_swiglu_packed")
    assert found == FUSED[kind]
    assert count(gm, "torch_swiglu") == 0
    check_values(gm)


@pytest.mark.parametrize(
    ("gate", "up", "width", "packed"),
    [(0, 4, 4, 1), (4, 0, 4, 0), (0, 3, 3, 0)],
    ids=["gate then up", "up then gate", "pieces of more"],
)
def test_only_two_halves_in_order_are_packed(gate: int, up: int, width: int, packed: int) -> None:
    def gated(x: torch.Tensor) -> torch.Tensor:
        return F.silu(x.narrow(-1, gate, width)) * x.narrow(-1, up, width)

    gm = make_fx(gated, tracing_mode="fake", pre_dispatch=True)(torch.randn(2, 8))
    assert run_pass(gm, "match_swiglu_pattern").num_matches == 1
    assert run_pass(gm, "fuse_swiglu").num_matches == packed


def test_bfloat16_sums_round_before_the_norm() -> None:
    gm = tiny_graph("llama", torch.bfloat16)
    before = logits(gm)
    for key in ("match_rmsnorm_pattern", "fuse_add_rms_norm"):
        run_pass(gm, key)
    assert count(gm, "torch_fused_add_rmsnorm") == 4
    assert torch.equal(logits(gm), before)


SWAPS = {
    "fuse_rmsnorm": ("match_rmsnorm_pattern", "triton_rmsnorm", 5),
    "fuse_rope": ("match_rope_pattern", "triton_rope_with_explicit_cos_sin", 2),
}


@pytest.mark.parametrize("key", SWAPS)
def test_backends_are_chosen_by_name(key: str) -> None:
    matcher, op, matches = SWAPS[key]
    gm = tiny_graph("llama")
    run_pass(gm, matcher)
    before = logits(gm)
    info = run_pass(gm, key)
    assert (info.skipped, info.num_matches) == (True, 0)
    assert info.reason == "reference backend already in place"
    assert run_pass(gm, key, backend="triton").num_matches == matches == count(gm, op)
    assert rmse_ratio(logits(gm), before) < 1e-6
    check_values(gm)


def test_residual_sums_fuse_with_a_backends_norms_too() -> None:
    gm = tiny_graph("llama")
    run_pass(gm, "match_rmsnorm_pattern")
    run_pass(gm, "fuse_rmsnorm", backend="triton")
    run_pass(gm, "fuse_add_rms_norm", backend="triton")
    assert (count(gm, "triton_rmsnorm"), count(gm, "triton_fused_add_rmsnorm")) == (1, 4)


def test_a_backend_without_the_op_is_refused_only_where_the_op_is() -> None:
    assert not run_pass(tiny_graph("mixtral"), "fuse_l2norm", backend="triton").skipped
    x = torch.randn(2, 3, 8)
    gm = make_fx(lambda x: (torch.ops.adkit.torch_l2norm(x, 1e-6),), tracing_mode="fake")(x)
    with pytest.raises(ConfigError, match="op 'l2norm' has no backend 'triton'"):
        run_pass(gm, "fuse_l2norm", backend="triton")


@pytest.mark.filterwarnings("ignore:triton_")
def test_routing_and_experts_become_ops_that_a_cuda_graph_can_hold() -> None:
    gm = tiny_graph("qwen3_moe")
    before = logits(gm)
    assert run_pass(gm, "match_moe_routing_pattern").num_matches == 2
    assert run_pass(gm, "fuse_moe").skipped  # on a CPU
    assert run_pass(gm, "fuse_moe", backend="triton").num_matches == 4
    assert (count(gm, "triton_moe"), count(gm, "triton_moe_topk"), count(gm, "torch_moe")) == (2, 2, 0)
    assert not [info for n in gm.graph.nodes if (info := info_of(n.target)) is not None and info.syncs]
    assert torch.equal(logits(gm), before)
    check_values(gm)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere2", "gpt2", "gpt_neox", "phi"])
def test_only_the_logits_asked_for_are_computed(kind: str) -> None:
    """Scaled and capped logits included; every size of L, none of the other tokens."""
    gm = tiny_graph(kind)
    before = logits(gm)
    assert run_pass(gm, "gather_logits_before_lm_head").num_matches == 1
    for wanted in ([8], [0, 3, 8], list(range(9))):
        got = logits(gm, logits_indices=torch.tensor(wanted))
        assert got.shape == (2, len(wanted), before.shape[-1])
        assert rmse_ratio(got, before[:, wanted]) < 1e-6
    check_values(gm, logits_indices=torch.tensor([1, 2, 4]))
    (output,) = gm.graph.output_node().args[0]
    indices = next(n for n in gm.graph.nodes if n.target == "logits_indices")
    assert output.meta["val"].shape[1] == indices.meta["val"].shape[0]
    again = run_pass(gm, "gather_logits_before_lm_head")
    assert again.skipped
    assert "logits_indices" in again.reason
