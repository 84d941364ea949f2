"""Sums over residuals that nobody reads any more: the same numbers, and the graph that is looked at stays."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch
from torch import nn

from adkit.ops.registry import OPS, info_of
from adkit.passes.compile import in_place
from adkit.passes.compile.in_place import accumulating
from tests.passes.graphs import count, inputs_for, run_pass, tiny_graph

FUSED = (
    "match_bmm_moe_pattern",
    "match_rope_pattern",
    "match_rmsnorm_pattern",
    "match_swiglu_pattern",
    "match_linear",
    "widen_residual_stream",
    "fuse_gemms",
    "fuse_swiglu",
    "fuse_add_rms_norm",
    "gather_logits_before_lm_head",
)


# Of two layers: sums in place. Where the sum and the norm after it stay one op (experts, norms after attention), none.
@pytest.mark.parametrize(("kind", "sums"), [("llama", 4), ("mixtral", 0), ("gemma2", 0), ("phi", 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_the_same(kind: str, sums: int, dtype: torch.dtype) -> None:
    gm = tiny_graph(kind, dtype)
    for key in FUSED:
        run_pass(gm, key)
    run_pass(gm, "fuse_gemm_epilogues", backend="torch")
    code = gm.code
    running, found = accumulating(gm)
    assert found == sums == count(running, "torch_fused_linear_")
    assert (gm.code, count(gm, "torch_fused_linear_")) == (code, 0)
    feed = inputs_for(gm, 2, 9, 131)
    with torch.no_grad():
        want = gm(**feed)[0]
        for _ in range(2):
            assert torch.equal(running(**feed)[0], want)
    assert {p.data_ptr() for p in running.parameters()} <= {p.data_ptr() for p in gm.parameters()}


class _Case(nn.Module):
    """h = linear(x), then a sum with it that may not be made over it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.kind == "the caller's" else self.first(x)
        seen = h[..., :4] if self.kind == "a view is read afterwards" else None
        y = h + self.second(h if self.kind == "read while it is written" else x)
        if self.kind == "read afterwards":
            return y * h
        return y if seen is None else y[..., :4] * seen


def test_an_op_of_any_name_may_read_a_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = torch.export.export(_Case("read afterwards"), (torch.randn(2, 3, 8),), strict=False).module()
    run_pass(gm, "match_linear")
    run_pass(gm, "fuse_gemm_epilogues", backend="torch")
    info = dataclasses.replace(OPS["torch_l2norm"], name="spy", backend="spy")
    monkeypatch.setattr(in_place, "info_of", lambda t: info if t is torch.ops.aten.mul.Tensor else info_of(t))
    assert accumulating(gm)[1] == 0


@pytest.mark.parametrize("twice", [False, True])
def test_a_residual_that_is_picked_twice_is_left(twice: bool) -> None:
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    both = graph.call_function(torch.ops.adkit.torch_fused_add_rmsnorm.default, (x, x, w, 1e-6))
    sums = [graph.call_function(operator.getitem, (both, 1)) for _ in range(1 + twice)]
    square = graph.placeholder("square")
    options = {"residual": sums[0], "out_dtype": torch.float32}
    y = graph.call_function(torch.ops.adkit.torch_fused_linear.default, (x, square), options)
    graph.output((y, sums[-1]) if twice else y)
    values = {n: torch.randn(s) for n, s in (("x", (2, 3, 8)), ("w", (8,)), ("square", (8, 8)))}
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = values[node.name]
        elif node.op == "call_function":
            node.meta["val"] = torch.empty(2, 3, 8)
    gm = torch.fx.GraphModule(nn.Module(), graph)
    running, found = accumulating(gm)
    assert found == (not twice)
    feed = (values["x"], values["w"], values["square"])
    for got, want in zip(*map(_listed, (running(*feed), gm(*feed))), strict=True):
        torch.testing.assert_close(got, want)


def _listed(out: object) -> list[object]:
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize(
    ("kind", "sums"),
    [("plain", 1), ("the caller's", 0), ("read while it is written", 0), ("read afterwards", 0),
     ("a view is read afterwards", 0)],
)  # fmt: skip
def test_memory_that_others_need_is_left(kind: str, sums: int) -> None:
    module, x = _Case(kind), torch.randn(2, 3, 8)
    gm = torch.export.export(module, (x,), strict=False).module()
    run_pass(gm, "match_linear")
    run_pass(gm, "fuse_gemm_epilogues", backend="torch")
    before = x.clone()
    running, found = accumulating(gm)
    assert found == sums
    torch.testing.assert_close(running(x), module(x))
    assert torch.equal(x, before)
