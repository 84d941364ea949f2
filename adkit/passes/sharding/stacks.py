"""Stacked matrices: the weight of a batched product (``torch.bmm`` and its kin) that no matcher made an op of.

Experts, or projections of groups of heads. The product reads the weight as it is stored, turned around, or as a view
of a plain matrix, so its batch may be any dimension of what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Node

from adkit.passes.sharding.layout_rules import order_of
from adkit.passes.sharding.op_kinds import BATCHED, EINSUM, VIEWS, aten, einsum_letters
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
    found = [s for x, dim, at in _batches(node) if (s := _behind(x, dim, node, at)) is not None]
    return found[0] if len(found) == 1 else None


def _batches(node: Node) -> Iterator[tuple[Node, int, int]]:
    """A product's sides that have a batch: the value, which of its dimensions that is, and which of the product's."""
    if node.target is EINSUM:
        inputs, output = einsum_letters(node) or ([], "")
        for x, mine in zip(cast(Any, node.args[1]), inputs, strict=False):
            kept = [letter for letter in mine if letter in output]
            shared = [letter for letter in kept if all(letter in other for other in inputs)]
            if shared or len(kept) > 1:  # with one letter of its own it is one matrix, however it is stored
                letter = (shared or kept)[0]
                yield x, mine.index(letter), output.index(letter)
        return
    for x in node.args[1:3] if node.target is aten.baddbmm.default else node.args[:2]:
        shape = shape_of(x)
        dim = next((d for d, size in enumerate(shape[:-2]) if size != 1), None)
        if isinstance(x, Node) and dim is not None:
            yield x, dim, dim + rank_of(node) - len(shape)


def _behind(value: Node, dim: int, product: Node, product_dim: int) -> Stack | None:
    """The stack that ``value`` shows: the way back to where it is stored, and which dimension is the batch there."""
    first, count = product, shape_of(value)[dim]
    if not isinstance(count, int):
        return None
    while value.op == "call_function":
        source = value.args[0]
        before = _before(value, source, dim) if isinstance(source, Node) else None
        if before is None:
            return None
        value, first, dim = source, value, before  # type: ignore[assignment]
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
