"""Sums in the memory of what is added to: the graph that runs, where the graph that is looked at stays pure."""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch.fx import GraphModule, Node

from adkit.graph.matching import aten, dtype_of
from adkit.ops.registry import OPS, info_of

#: Ops of any backend whose results share no memory with what they are given.
_ADKIT = ("fused_linear", "fused_linear_", "fused_add_rmsnorm", "rmsnorm")
_ATEN = (aten.index_select.default, aten.embedding.default)


def accumulating(gm: GraphModule) -> tuple[GraphModule, int]:
    """``gm`` with each ``fused_linear`` writing its sum over a residual that nobody reads afterwards; and how many do.

    A library's product adds to what its output holds, so a sum in new memory begins with copying the residual there:
    2% of a long prompt's time. Layers whose norm reads the sum next read what the op returns: a copy of fewer bytes,
    maybe. The result shares ``gm``'s weights. ``gm`` itself stays as it is, for those who compare
    or time its values one by one.
    """
    graph = copy.deepcopy(gm.graph)
    count = 0
    sums: dict[Any, Node] = {}  # residual -> what the last op that wrote it returned
    for node in list(graph.nodes):
        overwrites = _may_overwrite(node)  # asked first: a layer whose norm reads its own residual must not
        if _reads_for_a_norm(node) and node.args[0] in sums:
            node.update_arg(0, sums[node.args[0]])
        if not overwrites:
            continue
        options = dict(node.kwargs)
        residual: Any = options.pop("residual")
        with graph.inserting_before(node):
            written = OPS[f"{_fused_linear(node)}_"].overload
            sums[residual] = graph.call_function(written, (residual, *node.args), options)
        node.replace_all_uses_with(residual)
        graph.erase_node(node)
        count += 1
    return (GraphModule(gm, graph), count) if count else (gm, 0)


def _fused_linear(node: Node) -> str:
    """The op's name, backend included; empty for any other op."""
    info = info_of(node.target)
    return info.name if info is not None and info.name.endswith("_fused_linear") else ""


def _reads_for_a_norm(node: Node) -> bool:
    """True for a linear layer with its norm, and for picking the tokens that only such layers read."""
    if node.target is aten.index_select.default:
        return all(map(_reads_for_a_norm, node.users))
    return bool(_fused_linear(node)) and node.kwargs.get("eps") is not None


def _may_overwrite(node: Node) -> bool:
    """True for a linear layer with a residual that has memory of its own and the sum's dtype, and no later reader."""
    if not _fused_linear(node):
        return False
    residual = node.kwargs.get("residual")
    if not isinstance(residual, Node) or residual in node.args or not _is_fresh(residual):
        return False
    others = [u for u in residual.users if u is not node]
    return dtype_of(residual) == dtype_of(node) and all(u < node and _is_fresh(u) for u in others)


def _is_fresh(node: Node) -> bool:
    """True for calls whose results share memory with none of their arguments."""
    made = node.args[0] if node.target is operator.getitem else node
    if not isinstance(made, Node):
        return False
    if made.target is aten.to.dtype:
        return dtype_of(made.args[0]) not in (None, dtype_of(made))
    info = info_of(made.target)
    return made.target in _ATEN or (info is not None and info.name.removeprefix(f"{info.backend}_") in _ADKIT)
