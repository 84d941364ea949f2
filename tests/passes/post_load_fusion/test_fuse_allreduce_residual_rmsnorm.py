"""The sum over ranks, the residual and the norm as one op; what surrounds it stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from adkit.contract import DistConfig
from tests.passes.graphs import count, run_pass
from tests.passes.sharding.graphs import Net, cut, exported, ops, together

SHAPES = {"down": (8, 16), "norm": (8,), "up": (12, 8)}
DIST = DistConfig.of(2, allreduce_strategy="ONESHOT")
FUSED = "torch_dist_allreduce_residual_rmsnorm"


def layer(n: Any, x: torch.Tensor) -> torch.Tensor:
    """x [B, 8 + 16]: the residual stream and what the layer's first half gave."""
    h = x[:, :8] + ops.all_reduce(ops.torch_linear_simple(x[:, 8:], n.down, tp_mode="rowwise"))
    return (
        h
        + ops.torch_linear_simple(ops.torch_rmsnorm(h, n.norm, 1e-6, 1.0, True), n.up, tp_mode="gather")[
            :, :8
        ]
    )


def ranks(
    forward: Any, weights: torch.dtype = torch.float64, **shapes: tuple[int, ...]
) -> tuple[Net, torch.Tensor, list[GraphModule]]:
    """Two ranks' graphs; each slices x by itself, so a rowwise input is cut with a ``shard``."""
    x = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def sharded(n: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(n, torch.cat([x[:, :8], ops.shard(x[:, 8:], 1)], 1))

    net = Net(sharded, **shapes).to(weights)
    source = exported(net, x)
    graphs = []
    for rank in range(2):
        gm = copy.deepcopy(source)
        cut(gm, DIST.at(rank))
        graphs.append(gm)
    return net, x, graphs


def test_one_op_gives_the_norm_and_the_sum() -> None:
    net, x, graphs = ranks(layer, **SHAPES)
    for gm in graphs:
        assert run_pass(gm, "fuse_allreduce_residual_rmsnorm").num_matches == 1
        assert run_pass(gm, "fuse_add_rms_norm").num_matches == 0
        assert count(gm, FUSED) == 1
        assert count(gm, "torch_dist_all_reduce") == count(gm, "torch_rmsnorm") == 0
        (node,) = (n for n in gm.graph.nodes if n.target is getattr(ops, FUSED).default)
        assert node.kwargs["strategy"] == "ONESHOT"
        assert [v.shape[1] for v in node.meta["val"]] == [8, 8]
    for out in together(graphs, x):
        torch.testing.assert_close(out[0], net(x), rtol=1e-6, atol=1e-6)  # the norm computes in float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_float32_stream_stays_one(half: torch.dtype) -> None:
    def wide(n: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        branch = ops.torch_linear_simple(x[:, 8:].to(half), n.down, tp_mode="rowwise")
        h = x[:, :8].float() + ops.all_reduce(branch)
        return h, ops.torch_rmsnorm(h, n.norm, 1e-6, 1.0, out_dtype=half)

    _, x, graphs = ranks(wide, half, down=(8, 16), norm=(8,))
    before = together(graphs, x)
    for gm in graphs:
        assert run_pass(gm, "fuse_allreduce_residual_rmsnorm").num_matches == 1
        assert count(gm, FUSED) == 1
        assert not [n for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    for steps, out in zip(before, together(graphs, x), strict=True):
        assert [t.dtype for t in out] == [torch.float32, half]
        assert all(map(torch.equal, steps, out))


@pytest.mark.parametrize("fused", [False, True])
def test_linears_take_in_nothing_across_the_sum(fused: bool) -> None:
    net, x, graphs = ranks(layer, **SHAPES)
    for gm in graphs:
        if fused:
            run_pass(gm, "fuse_allreduce_residual_rmsnorm")
        run_pass(gm, "fuse_add_rms_norm")
        run_pass(gm, "fuse_gemm_epilogues", backend="torch")
        for node in gm.graph.nodes:
            if node.target is ops.torch_fused_linear.default and any(
                u.target is ops.torch_dist_all_reduce.default for u in node.users
            ):
                assert node.kwargs.get("residual") is None
    for out in together(graphs, x):
        torch.testing.assert_close(out[0], net(x), rtol=1e-6, atol=1e-6)


def test_a_sum_that_is_read_elsewhere_is_left() -> None:
    def two_readers(n: Any, x: torch.Tensor) -> torch.Tensor:
        y = ops.all_reduce(ops.torch_linear_simple(x[:, 8:], n.down, tp_mode="rowwise"))
        return ops.torch_rmsnorm(x[:, :8] + y, n.norm, 1e-6) + y

    def norm_first(n: Any, x: torch.Tensor) -> torch.Tensor:
        y = ops.all_reduce(ops.torch_linear_simple(x[:, 8:], n.down, tp_mode="rowwise"))
        return x[:, :8] + ops.torch_rmsnorm(y, n.norm, 1e-6)

    for forward in (two_readers, norm_first):
        _, _, graphs = ranks(forward, down=(8, 16), norm=(8,))
        for gm in graphs:
            before = [n.name for n in gm.graph.nodes]
            assert run_pass(gm, "fuse_allreduce_residual_rmsnorm").num_matches == 0
            assert before == [n.name for n in gm.graph.nodes]
