"""Linear layers take in norms, gates and residual sums, and the logits stay what they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule

from tests.passes.graphs import check_values, count, logits, rmse_ratio, run_pass, tiny_graph

BEFORE = (
    "match_bmm_moe_pattern",
    "match_rope_pattern",
    "match_rmsnorm_pattern",
    "match_swiglu_pattern",
    "match_linear",
    "fuse_gemms",
    "fuse_swiglu",
    "fuse_add_rms_norm",
    "gather_logits_before_lm_head",
)


def left(gm: GraphModule) -> tuple[int, int, int, int]:
    """Norms, norms with their sum, packed gates and plain sums of hidden states still there."""
    sums = [n for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    hidden = [n for n in sums if n.meta["val"].ndim == 3 and n.meta["val"].shape[-1] == 48]
    ops = "torch_rmsnorm", "torch_fused_add_rmsnorm", "torch_swiglu_packed"
    return (*(count(gm, op) for op in ops), len(hidden))  # type: ignore[return-value]


# two layers: what is left of norms, norms with sums, gates, sums
LEFT = {
    "llama": (0, 0, 0, 0),
    "qwen3": (4, 0, 0, 0),  # q and k norms
    "gemma2": (4, 4, 0, 0),  # norms after attention and MLP, and the sums with the norms that follow those
    "gemma3_text": (8, 4, 0, 0),
    "olmo2": (8, 1, 0, 3),  # norms stand after the layers
    "phi3": (0, 0, 0, 0),
    "mixtral": (0, 4, 0, 0),  # router and experts read norms; experts do not take in sums
    "cohere2": (0, 0, 0, 0),  # layernorms
    "gpt2": (0, 0, 0, 1),  # layernorms; token and position embeddings are added
    "phi": (0, 0, 0, 2),  # attention and MLP side by side: a sum of two layers, then one with the residual
}


@pytest.mark.parametrize("kind", LEFT)
def test_the_fused_graph_gives_the_same_logits(kind: str) -> None:
    gm = tiny_graph(kind)
    for key in BEFORE:
        run_pass(gm, key)
    wanted = torch.tensor([0, 3, 8])
    before = {batch: logits(gm, batch, logits_indices=wanted) for batch in (2, 1)}
    linears = count(gm, "torch_linear_simple")
    info = run_pass(gm, "fuse_gemm_epilogues", backend="torch")
    assert info.num_matches == linears == count(gm, "torch_fused_linear")
    for batch, expected in before.items():
        assert rmse_ratio(logits(gm, batch, logits_indices=wanted), expected) < 1e-6
    assert count(gm, "torch_linear_simple") == 0
    assert left(gm) == LEFT[kind]
    check_values(gm, logits_indices=wanted)


def test_without_kernels_the_graph_stays() -> None:
    gm = tiny_graph("llama")
    run_pass(gm, "match_linear")
    info = run_pass(gm, "fuse_gemm_epilogues")
    assert info.skipped
    assert "cpu" in info.reason
    assert count(gm, "torch_fused_linear") == 0


def fused(module: nn.Module, *inputs: torch.Tensor) -> GraphModule:
    """The module's graph after the pass, which must compute what the module does."""
    gm: GraphModule = torch.export.export(module, inputs, strict=False).module()
    for key in (
        "match_rmsnorm_pattern",
        "match_swiglu_pattern",
        "match_linear",
        "fuse_swiglu",
        "fuse_add_rms_norm",
    ):
        run_pass(gm, key)
    run_pass(gm, "fuse_gemm_epilogues", backend="torch")
    torch.testing.assert_close(gm(*inputs), module(*inputs))
    return gm


class _Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class _Block(nn.Module):
    """norm -> a linear for each of two readers, one of which may be no linear."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.norm, self.both = _Norm(), both
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.a(y) * (self.b(y) if self.both else y[..., :6])


@pytest.mark.parametrize("both", [True, False])
def test_a_norm_goes_only_if_linears_alone_read_it(both: bool) -> None:
    gm = fused(_Block(both), torch.randn(2, 3, 8))
    assert count(gm, "torch_rmsnorm") == (0 if both else 1)
    norms = [
        n.kwargs.get("eps") for n in gm.graph.nodes if n.target is torch.ops.adkit.torch_fused_linear.default
    ]
    assert norms == ([1e-5, 1e-5] if both else [None])


class _Sum(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return (y + self.b(x)) * (y if self.twice else 2)


@pytest.mark.parametrize(("twice", "inner"), [(False, "a"), (True, "b")])
def test_a_sum_of_two_layers_goes_to_one_that_nobody_else_reads(twice: bool, inner: str) -> None:
    gm = fused(_Sum(twice), torch.randn(2, 3, 8))
    summing = [n for n in gm.graph.nodes if n.kwargs.get("residual") is not None]
    assert [str(n.args[1].target) for n in summing] == [f"{inner}.weight"]
    assert not [n for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor]


def test_sites_and_code_lines_are_those_of_the_layers() -> None:
    import adkit

    overrides = ["transforms.fuse_gemm_epilogues.backend=torch"]
    wb = adkit.Workbench("demo", device="cpu", dtype="float32", progress=False, overrides=overrides).run(
        until="fuse_gemm_epilogues"
    )
    step = wb.steps["fuse_gemm_epilogues"]
    layers = wb.factory.config.num_hidden_layers
    labels = [site.label for site in step.sites]
    assert labels.count("linear + norm + gate + sum") == layers  # o_proj to gate_up
    assert (
        labels.count("linear + norm + sum") == layers
    )  # down to the next layer's q, k, v, or to the lm_head
    assert len(labels) == 2 * layers + 1
    assert step.check().ok
    assert step.check(how="sites").ok
