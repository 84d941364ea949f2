"""Blocks written in ways that the models of the other tests do not use, as graphs of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tests.passes.graphs import run_pass

adkit = torch.ops.adkit


def targets(fn: Callable[..., Tensor], key: str, *inputs: Tensor) -> list[object]:
    """Targets left after a pass over ``fn``'s graph, which must compute the same bits."""
    gm = make_fx(fn, tracing_mode="fake", pre_dispatch=True)(*inputs)
    run_pass(gm, key)
    torch.testing.assert_close(gm(*inputs), fn(*inputs), rtol=0, atol=0)
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def rms(x: Tensor) -> Tensor:
    """x over its root mean square, in float32."""
    return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)


X, W = torch.randn(2, 3, 8), torch.randn(8)
XB, WB = X.bfloat16(), W.bfloat16()


@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (lambda x, w: w * rms(x).to(x.dtype), (XB, WB)),
        (lambda x, w: (w * rms(x)).to(x.dtype), (XB, WB)),
        (lambda x, w: (w * rms(x)).to(x.dtype), (XB, W)),
        (lambda x, w: (rms(x) * (1.0 + w.float())).type_as(x), (XB, WB)),
        (lambda x, w: rms(x).to(x.dtype) * (1 + w), (XB, WB)),
        (lambda x, w: rms(x).to(x.dtype), (XB, WB)),
        (lambda x, w: w * rms(x), (X, W)),
        (lambda x, w: F.rms_norm(x, (8,), w, 1e-6), (X, W)),
    ],
    ids=[
        "after cast",
        "in float",
        "float weight",
        "1 + w in float",
        "1 + w",
        "scale-free",
        "float32",
        "aten",
    ],
)
def test_rmsnorm_becomes_one_op_with_its_rounding(
    fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> None:
    assert targets(fn, "match_rmsnorm_pattern", *inputs) == [adkit.torch_rmsnorm.default]


@pytest.mark.parametrize(
    ("fn", "inputs"),
    [
        (lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), (XB, WB)),
        (
            lambda x, w: (
                (x - x.mean(-1, True)) * torch.rsqrt((x - x.mean(-1, True)).pow(2).mean(-1, True) + 1e-6) * w
            ),
            (X, W),
        ),
        (lambda x, w: x.pow(2).mean(-1, keepdim=True) + w, (X, W)),
    ],
    ids=["no float32", "layer norm", "mean square only"],
)
def test_what_rounds_otherwise_is_left_alone(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    assert adkit.torch_rmsnorm.default not in targets(fn, "match_rmsnorm_pattern", *inputs)


def test_a_rounded_one_plus_w_stays_a_sum() -> None:
    found = targets(lambda x, w: (rms(x) * (1 + w).float()).to(x.dtype), "match_rmsnorm_pattern", XB, WB)
    assert found == [torch.ops.aten.add.Tensor, adkit.torch_rmsnorm.default]


def test_layer_norm_with_one_centred_node_is_left_alone() -> None:
    def layer_norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, True) + 1e-6)

    assert adkit.torch_rmsnorm.default not in targets(layer_norm, "match_rmsnorm_pattern", X)


@pytest.mark.parametrize("x", [X, XB], ids=["float32", "bfloat16"])
def test_l2norm_becomes_one_op(x: Tensor) -> None:
    def l2norm(x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6)).to(x.dtype)

    assert targets(l2norm, "match_l2norm_pattern", x)[-1] is adkit.torch_l2norm.default


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh"),
        (lambda x: F.relu(x).square(), "relu2"),
    ],
    ids=["silu", "gelu", "gelu_tanh", "relu2"],
)
def test_gates_by_activation(act: Callable[[Tensor], Tensor], name: str) -> None:
    gm = make_fx(lambda a, b: b * act(a), tracing_mode="fake", pre_dispatch=True)(X, X.clone())
    assert run_pass(gm, "match_swiglu_pattern").num_matches == 1
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert (*node.args[2:], "silu")[0] == name
    torch.testing.assert_close(gm(X, X + 1), (X + 1) * act(X), rtol=0, atol=0)


def test_a_gate_that_broadcasts_or_rounds_is_left_alone() -> None:
    assert adkit.torch_swiglu.default not in targets(
        lambda a, b: F.silu(a) * b, "match_swiglu_pattern", X[..., :1], X
    )
    assert adkit.torch_swiglu.default not in targets(
        lambda a, b: F.silu(a.float()).bfloat16() * b, "match_swiglu_pattern", XB, XB
    )


@pytest.mark.parametrize(
    ("fn", "left"),
    [
        (lambda x: x.transpose(1, 2).transpose(1, 2), 0),
        (lambda x: (x.transpose(1, 2) * 2).neg().transpose(2, 1), 0),
        (lambda x: x.transpose(1, 2).contiguous().transpose(-2, 1), 0),
        (lambda x: x.transpose(1, 2).softmax(1).transpose(1, 2), 2),
        (lambda x: x.transpose(1, 3).neg().transpose(1, 3), 2),
        (lambda x: x.transpose(0, 1).neg().transpose(1, 2), 2),
    ],
    ids=["pair", "elementwise", "copy", "softmax over heads", "last dimension", "different"],
)
def test_transposes_cancel_only_where_they_undo_each_other(fn: Callable[[Tensor], Tensor], left: int) -> None:
    found = targets(fn, "eliminate_redundant_transposes", torch.randn(2, 3, 4, 5))
    assert found.count(torch.ops.aten.transpose.int) == left


def test_a_reader_between_keeps_the_transposes() -> None:
    def shared(x: Tensor) -> Tensor:
        y = x.transpose(1, 2).neg()
        return y.transpose(1, 2) + y.sum()

    assert (
        targets(shared, "eliminate_redundant_transposes", torch.randn(2, 3, 4, 5)).count(
            torch.ops.aten.transpose.int
        )
        == 2
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def test_a_query_read_before_its_key_is_rotated_still_pairs() -> None:
    def apart(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = _rotate(q, cos[:, None], sin[:, None]).transpose(1, 2)
        return turned @ (_rotate(k * 2, cos[:, None], sin[:, None]).transpose(1, 2)).transpose(-1, -2)

    q, k, cos, sin = (
        torch.randn(2, 3, 4, 8),
        torch.randn(2, 3, 4, 8),
        torch.randn(2, 4, 8),
        torch.randn(2, 4, 8),
    )
    assert adkit.torch_rope_with_explicit_cos_sin.default in targets(
        apart, "match_rope_pattern", q, k, cos, sin
    )


def test_a_key_made_of_the_rotated_query_does_not_pair() -> None:
    def chained(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, s = cos[:, None], sin[:, None]
        return _rotate(_rotate(q, c, s), c, s)

    inputs = torch.randn(2, 3, 4, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    assert adkit.torch_rope_with_explicit_cos_sin.default not in targets(
        chained, "match_rope_pattern", *inputs
    )


def test_a_rotation_by_another_width_is_left_alone() -> None:
    def uneven(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def turn(x: Tensor) -> Tensor:
            return x * cos[:, None] + torch.cat((-x[..., 2:], x[..., :2]), -1) * sin[:, None]

        return turn(q) + turn(k)

    q, cos = torch.randn(2, 3, 4, 8), torch.randn(2, 4, 8)
    assert adkit.torch_rope_with_explicit_cos_sin.default not in targets(
        uneven, "match_rope_pattern", q, q + 1, cos, cos + 1
    )
