"""Linear layers that read one input become one, their weights moved and not copied."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from tests.passes.graphs import check_values, count, logits, rmse_ratio, run_pass, tiny_graph

# groups in two layers
GROUPS = {
    "llama": 4,
    "qwen2": 4,
    "qwen3": 4,
    "gemma2": 4,
    "phi3": 0,
    "glm4": 2,
    "phi": 2,
    "mixtral": 2,
    "deepseek_v3": 4,
    "opt": 2,
}


@pytest.mark.parametrize("kind", GROUPS)
def test_groups_are_fused_and_compute_the_same(kind: str) -> None:
    gm = tiny_graph(kind)
    run_pass(gm, "match_linear")
    before = {batch: logits(gm, batch) for batch in (2, 1)}
    assert run_pass(gm, "fuse_gemms").num_matches == GROUPS[kind]
    for batch, expected in before.items():
        assert rmse_ratio(logits(gm, batch), expected) < 1e-6
    check_values(gm)


def test_the_recipe_gives_the_weights_back() -> None:
    gm = tiny_graph("qwen2")
    old = {name: p.detach().clone() for name, p in gm.named_parameters()}
    run_pass(gm, "fuse_gemms")
    new = dict(gm.named_parameters())
    recipes = gm.meta["adkit_weights"]
    prefix = "model.layers.1.self_attn"
    names = tuple(f"{prefix}.{x}_proj.bias" for x in "qkv")
    assert recipes[f"{prefix}.qkv_proj_fused.bias"] == names
    assert recipes["model.layers.1.mlp.gate_up_proj_fused.weight"] == tuple(
        f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up")
    )
    for name, parts in recipes.items():
        assert torch.equal(new[name], torch.cat([old[p] for p in parts]))
        assert not set(parts) & set(new), "the old parameters are gone"
    untouched = {n for n in old if all(n not in parts for parts in recipes.values())}
    assert all(torch.equal(new[n], old[n]) for n in untouched)


def test_shapes_alone_are_enough() -> None:
    gm = tiny_graph("llama")
    for module in gm.modules():
        for name, p in list(module._parameters.items()):
            module._parameters[name] = nn.Parameter(p.to("meta"), requires_grad=False)
    assert run_pass(gm, "fuse_gemms").num_matches == 4
    fused = gm.get_parameter("model.layers.0.mlp.gate_up_proj_fused.weight")
    assert fused.is_meta
    assert fused.shape == (160, 48)


def _two_linears(tied: bool) -> GraphModule:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_proj, self.b_proj = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            if tied:
                self.b_proj.weight = self.a_proj.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a_proj(x) - self.b_proj(x)

    gm: GraphModule = torch.export.export(Block(), (torch.randn(2, 4),), strict=False).module()
    return gm


def test_tied_weights_are_left_alone() -> None:
    assert run_pass(_two_linears(tied=False), "fuse_gemms").num_matches == 1
    assert run_pass(_two_linears(tied=True), "fuse_gemms").num_matches == 0


def test_gate_comes_first_whichever_is_computed_first() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.gate_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            up = self.up_proj(x)
            return up * nn.functional.silu(self.gate_proj(x))

    x = torch.randn(2, 4)
    gm: GraphModule = torch.export.export(Block(), (x,), strict=False).module()
    expected = gm(x)
    for key in ("match_swiglu_pattern", "fuse_gemms", "fuse_swiglu"):
        assert run_pass(gm, key).num_matches == 1
    assert gm.meta["adkit_weights"] == {"gate_up_proj_fused.weight": ("gate_proj.weight", "up_proj.weight")}
    assert count(gm, "torch_swiglu_packed") == 1
    torch.testing.assert_close(gm(x), expected)


class _Peak(TorchDispatchMode):
    """Bytes of the tensors alive, at most, whenever an operation has made one."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__()
        self.gm, self.most = gm, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.gm.parameters()}
        if isinstance(out, torch.Tensor) and type(out) is torch.Tensor:
            held[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes()
        self.most = max(self.most, sum(held.values()))
        return out


def test_memory_peaks_one_group_above_the_model() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"q_proj": 64, "k_proj": 16, "v_proj": 16, "gate_proj": 224, "up_proj": 224}
            for name, size in sizes.items():
                self.add_module(name, nn.Linear(64, size, bias=False))
            self.down_proj = nn.Linear(224, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.q_proj(x) * (self.k_proj(x) + self.v_proj(x)).sum()
            return x + self.down_proj(self.gate_proj(x) * self.up_proj(x))

    layers = nn.Sequential(*(Layer() for _ in range(24)))
    gm: GraphModule = torch.export.export(layers, (torch.randn(2, 64),), strict=False).module()
    del layers
    model = sum(p.untyped_storage().nbytes() for p in gm.parameters())
    gc.collect()
    with _Peak(gm) as peak:
        assert run_pass(gm, "fuse_gemms").num_matches == 48
    assert model < peak.most <= 1.05 * model
    assert sum(p.untyped_storage().nbytes() for p in gm.parameters()) == model


def test_freed_weights_are_held_by_nothing() -> None:
    import weakref

    gm = tiny_graph("llama")
    old = [weakref.ref(p) for n, p in gm.named_parameters() if "gate_proj" in n or "q_proj" in n]
    run_pass(gm, "fuse_gemms")
    gc.collect()
    assert [r() for r in old] == [None] * 4
