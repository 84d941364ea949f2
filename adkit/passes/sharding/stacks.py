"""Stacked matrices: the weight of a batched product (``torch.bmm`` and its kin) that no matcher made an op of.

Experts, or projections of groups of heads. The product reads the weight as it is stored, turned around, or as a view
of a plain matrix, so its batch may be any dimension of what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from adkit.passes.sharding.layout_rules import order_of
from adkit.passes.sharding.op_kinds import BATCHED, VIEWS, aten
from adkit.passes.sharding.spread import rank_of, regroup, shape_of

_TURNS = {aten.transpose.int, aten.permute.default, aten.t.default}
_SAME = {aten.to.dtype, aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default}


@dataclass(frozen=True)
class Stack:
    """The weight of a batched product: ``count`` matrices, one after another along its dimension ``dim``.

    ``weight`` reads it, ``first`` reads that: a view on the way, or the product itself. Of the product the matrices
    are dimension ``product_dim``.
    """

    weight: Node
    first: Node
    dim: int
    count: int
    product_dim: int

    @property
    def name(self) -> str:
        """The weight's name."""
        return str(self.weight.target)


def stack_of(node: Node) -> Stack | None:
    """The stack that a product reads; None for other nodes, and where both sides are weights or none is."""
    if node.target not in BATCHED:
        return None
    sides = node.args[1:3] if node.target is aten.baddbmm.default else node.args[:2]
    found = [s for x in sides if isinstance(x, Node) and (s := _behind(x, node)) is not None]
    return found[0] if len(found) == 1 else None


def _behind(value: Node, product: Node) -> Stack | None:
    """The stack that ``value`` shows: the way back to where it is stored, and which dimension is the batch there."""
    shape, first = shape_of(value), product
    dim: int | None = next((d for d, size in enumerate(shape[:-2]) if size != 1), None)
    if dim is None or not isinstance(shape[dim], int):
        return None
    count, product_dim = shape[dim], dim + rank_of(product) - len(shape)
    while value.op == "call_function":
        source = value.args[0]
        dim = _before(value, source, dim) if isinstance(source, Node) else None
        if dim is None:
            return None
        value, first = source, value  # type: ignore[assignment]
    if value.op != "get_attr" or value.meta.get("adkit_constant", False):
        return None
    return Stack(value, first, dim, count, product_dim)


def _before(value: Node, source: Node, dim: int) -> int | None:
    """Which dimension of ``source`` dimension ``dim`` of a view of it is; None for what is no view."""
    if value.target in _TURNS:
        return order_of(value)[dim]
    if value.target in VIEWS:
        return regroup(shape_of(value), shape_of(source), dim)
    if value.target is aten.unsqueeze.default:
        return dim - (dim > int(value.args[1]) % rank_of(value))  # type: ignore[arg-type]
    return dim if value.target in _SAME else None
