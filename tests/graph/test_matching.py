"""Patterns find every spelling of a block, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from adkit.graph.matching import (
    Pat,
    cat,
    find,
    last,
    mean,
    named,
    pattern,
    rsqrt,
    silu,
    square,
    term_of,
    uncast,
)


def traced(fn: Callable[..., Tensor], *inputs: Tensor) -> GraphModule:
    """``fn`` as an ATen graph with values."""
    return make_fx(fn, tracing_mode="fake", pre_dispatch=True)(*inputs)


@pattern
def norm(x: Pat, weight: Pat, eps: Pat) -> Pat:
    return weight * named("normed", x * rsqrt(mean(square(x)) + eps))


NORMS = {
    "pow": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "product": lambda x, w: w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)),
    "square, commuted": lambda x, w: (torch.rsqrt(1e-5 + x.square().mean(-1, True)) * x) * w,
    "reciprocal of sqrt": lambda x, w: x * (1e-5 + x.pow(2).mean(-1, True)).sqrt().reciprocal() * w,
    "power -1/2": lambda x, w: x * (x.pow(2).mean(2, True) + 1e-5).pow(-0.5) * w,
    "casts": lambda x, w: w * (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, True) + 1e-5)).to(x.dtype),
    "clones and dropout": lambda x, w: (
        w * F.dropout((x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5)).clone(), 0.5, False)
    ),
}
NO_NORMS = {
    "another dimension": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)),
    "another power": lambda x, w: w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-5)),
    "another tensor": lambda x, w: w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-5)),
    "dropout in training": lambda x, w: (
        w * F.dropout(x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5), 0.5, True)
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_one_pattern_matches_every_spelling(name: str) -> None:
    x, w = torch.randn(2, 3, 8), torch.randn(8)
    gm = traced(NORMS[name], x, w)
    (match,) = find(gm, norm)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    assert [uncast(match["x"]), uncast(match["weight"])] == placeholders
    assert match["eps"] == 1e-5
    assert match.root is gm.graph.output_node().args[0]
    assert not set(match.nodes) & set(placeholders)


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_differs_does_not_match(name: str) -> None:
    assert not list(find(traced(NO_NORMS[name], torch.randn(2, 3, 8), torch.randn(8)), norm))


@pattern
def packed(gate_up: Pat, mid: Pat, end: Pat) -> Pat:
    return silu(last(gate_up, 0, mid)) * last(gate_up, mid, end)


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.chunk(2, -1),
        lambda x: x.split(4, 2),
        lambda x: torch.split(x, [4, 4], -1),
        lambda x: (x[..., :4], x[..., 4:]),
        lambda x: (x[:, :, :-4], x[:, :, -4:]),
        lambda x: (x.narrow(2, 0, 4), x.narrow(-1, 4, 4)),
    ],
    ids=["chunk", "split", "split sizes", "slices", "negative slices", "narrow"],
)
def test_every_cut_of_a_tensor_is_a_slice(cut: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def block(x: Tensor) -> Tensor:
        gate, up = cut(x)
        return F.silu(gate) * up

    (match,) = find(traced(block, torch.randn(2, 3, 8)), packed)
    assert (match["mid"], match["end"]) == (4, 8)


def test_a_parameter_binds_one_node_wherever_it_stands() -> None:
    @pattern
    def twice(x: Pat) -> Pat:
        return cat(-1, silu(x), x)

    x = torch.randn(2, 4)
    assert list(find(traced(lambda a, b: torch.cat((F.silu(a), a), -1), x, x), twice))
    assert not list(find(traced(lambda a, b: torch.cat((F.silu(a), b), -1), x, x.clone()), twice))


def test_matches_come_from_the_end_and_tolerate_rewrites() -> None:
    def two(x: Tensor, w: Tensor) -> Tensor:
        return NORMS["pow"](NORMS["product"](x, w), w)

    gm = traced(two, torch.randn(2, 3, 8), torch.randn(8))
    seen = []
    for match in find(gm, norm):
        seen.append(match.root)
        match.root.replace_all_uses_with(match["x"])
        for node in match.nodes:
            if not node.users:
                gm.graph.erase_node(node)
    assert seen[0] > seen[1]
    assert gm.graph.output_node().args[0].op == "placeholder"


def test_uncast_passes_lossless_casts_only() -> None:
    def casts(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).float().double()

    gm = traced(casts, torch.randn(3))
    out = gm.graph.output_node().args[0]
    assert uncast(out, torch.bfloat16).meta["val"].dtype == torch.bfloat16
    assert uncast(out, torch.float32).meta["val"].dtype == torch.float32
    assert uncast(out, torch.float32).op == "call_function", "the placeholder lies behind a rounding"


def test_a_scaled_sum_has_no_normal_form() -> None:
    gm = traced(lambda x, y: torch.add(x, y, alpha=2), torch.randn(3), torch.randn(3))
    assert term_of(gm.graph.output_node().args[0]) is None
