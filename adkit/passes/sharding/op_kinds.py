"""Which ops are which, for the placement algebra."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)

aten, adkit_ops = torch.ops.aten, torch.ops.adkit
LINEAR = adkit_ops.torch_linear_simple.default
MOE = adkit_ops.torch_moe.default
TOPK = adkit_ops.torch_moe_topk.default
EMBEDDING = aten.embedding.default
RMSNORM = adkit_ops.torch_rmsnorm.default
ATTENTION = adkit_ops.torch_attention.default
EINSUM = aten.einsum.default
BATCHED = {aten.bmm.default, aten.matmul.default, aten.baddbmm.default, EINSUM}
VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default}
SUMS = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor}
DIVISIONS = {aten.div.Tensor, aten.div.Scalar}
PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor} | DIVISIONS
IN_PLACE = {aten.copy_.default, aten.add_.Tensor, aten.mul_.Tensor}
#: Linear in their one input: a term of a sum stays one.
LINEAR_OPS = {
    *VIEWS, aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.neg.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int, aten.expand.default,
    aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default, aten.alias.default,
    aten.detach.default, aten.dropout.default,
}  # fmt: skip
_ELEMENTWISE_NAMES = {
    "where", "masked_fill", "dropout", "copy", "copy_", "multiply", "divide", "true_divide", "subtract",
    "negative", "absolute", "square", "clip", "greater", "greater_equal", "less", "less_equal", "not_equal",
    "to", "_to_copy", "clone", "contiguous", "alias", "detach", "type_as", "lift_fresh_copy", "zeros_like",
    "ones_like", "empty_like", "full_like", "gelu", "silu", "softplus",
}  # fmt: skip


def stored(weight: Any) -> Node | None:
    """The parameter that a layer reads, also where it reads it turned around (stored [D, F]); None for other values."""
    if isinstance(weight, Node) and weight.target is aten.t.default:
        weight = weight.args[0]
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


def einsum_letters(node: Node) -> tuple[list[str], str] | None:
    """The letters of an einsum's operands and of its result; None for equations that leave something open."""
    equation = str(node.args[0]).replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    parts = inputs.split(",")
    plain = arrow and "." not in equation and all(len(set(p)) == len(p) for p in (*parts, output))
    return (parts, output) if plain else None


def name_of(target: Any) -> str:
    """An operator's plain name."""
    return target.name().split("::", 1)[-1].split(".", 1)[0] if hasattr(target, "name") else str(target)


def carries(target: Any) -> bool:
    """True for ops whose output element comes from one input element at most: elementwise, views, casts."""
    return elementwise(target) or target in LINEAR_OPS or target in (aten.slice.Tensor, aten.index.Tensor)


def elementwise(target: Any) -> bool:
    """True for ops whose output at a place comes from what their inputs have there."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace == "adkit":
        return target is adkit_ops.torch_swiglu.default
    return torch.Tag.pointwise in target.tags or name_of(target) in _ELEMENTWISE_NAMES
