"""Bypassing nodes that return their first argument: what most clean-ups do."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.fx import GraphModule, Node


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


def same_value(a: Node, b: Node) -> bool:
    """Whether two nodes' values have the same shape and dtype (symbolic sizes compared as expressions)."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dtype != y.dtype or x.dim() != y.dim():
        return False
    return all(_expr(i) == _expr(j) for i, j in zip(x.shape, y.shape, strict=True))


def _expr(size: object) -> object:
    return size if isinstance(size, int) else size.node.expr  # type: ignore[attr-defined]
