"""Bypassing nodes that return their first argument: what most clean-ups do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from adkit.graph.matching import dtype_of, same_shape


def bypass(gm: GraphModule, is_noop: Callable[[Node], bool]) -> int:
    """Let the readers of every node that ``is_noop`` names read its first argument; returns how many went.

    One walk over the graph in order, so chains of no-ops go in one go.
    """
    gone = 0
    for node in gm.graph.nodes:
        if node.op == "call_function" and is_noop(node):
            source = node.args[0]
            assert isinstance(source, Node)
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
            gone += 1
    return gone


def fresh_copies_kept(gm: GraphModule) -> Callable[[Node], bool]:
    """Says of a node that copies its first argument whether the copy must stay, as one of the two is written.

    Exported code keeps in-place writes (``x[...] = y`` is a ``copy_`` into a view of ``x``).
    """
    written: set[Node] = set()
    for node in gm.graph.nodes:
        target = node.target
        if (
            isinstance(target, OpOverload)
            and target._schema.is_mutable
            and target is not torch.ops.aten.detach_.default
        ):
            written.update(_root(a) for a in node.args[:1] if isinstance(a, Node))
    return lambda node: node in written or _root(node.args[0]) in written  # type: ignore[arg-type]


def _root(node: Node) -> Node:
    """The node whose memory ``node`` may be a view of."""
    while isinstance(node.target, OpOverload) and node.args and isinstance(node.args[0], Node):
        arguments = node.target._schema.arguments
        if not arguments or arguments[0].alias_info is None:
            break
        node = node.args[0]
    return node


def same_value(a: Node, b: Node) -> bool:
    """Whether two nodes' values have provably the same shape, and the same dtype."""
    return same_shape(a, b) and dtype_of(a) == dtype_of(b)
