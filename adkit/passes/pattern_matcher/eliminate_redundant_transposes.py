"""``eliminate_redundant_transposes``: pairs of transposes that undo each other."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import aten, shape_of, term_of
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register

# Work on each element, or on the last dimension alone: they do not care how the dimensions before it
# are ordered.
_LAST_DIM_LOCAL = {
    torch.ops.adkit.torch_rmsnorm.default,
    torch.ops.adkit.torch_l2norm.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.type_as.default,  # reads the dtype of its second argument only
    aten.silu.default,
    aten.neg.default,
}
_SCALED = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}


@register
class EliminateRedundantTransposes(Pass):
    """Erase transposes that undo one another, also across norms, casts and scalings of the last dimension.

    Each pair costs a view, and where a kernel wants contiguous memory, a copy. The operations between are
    computed in the layout of the pair's outside. A copy made only for the swapped layout (``contiguous``)
    goes too.

        before: torch_rmsnorm(x.transpose(1, 2), w, eps).transpose(1, 2)
        after:  torch_rmsnorm(x, w, eps)
    """

    key = "eliminate_redundant_transposes"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Cancel pairs, first to last."""
        count = 0
        for node in list(gm.graph.nodes):
            if node._erased or not _swaps(node):
                continue
            found = _partner(node)
            if found is None:
                continue
            first, chain = found
            self._cancel(gm, node, first, chain)
            count += 1
        return PassInfo(num_matches=count)

    def _cancel(self, gm: GraphModule, second: Node, first: Node, chain: list[Node]) -> None:
        """``chain`` is what lies between, from first to second."""
        with self.site(gm, (first, *chain, second), label="transposes", before=second) as s:
            new: Any = first.args[0]
            for node in chain:
                if node.target in (aten.contiguous.default, aten.clone.default):
                    continue
                new = s.call(node.target, (new, *node.args[1:]), node.kwargs)  # type: ignore[arg-type]
            s.replace(second, new)


def _swaps(node: Node) -> bool:
    """True for a transpose of two dimensions before the last."""
    term = term_of(node)
    return term is not None and term.op == "transpose" and term.args[2] != -1


def _partner(second: Node) -> tuple[Node, list[Node]] | None:
    """The transpose that ``second`` undoes and the nodes between; None when there is none.

    A node between may have other readers only when there is nothing to compute twice for them.
    """
    term = term_of(second)
    assert term is not None
    swap, node = term.args[1:], term.args[0]
    chain: list[Node] = []
    while isinstance(node, Node) and node.op == "call_function":
        inner = term_of(node)
        if inner is not None and inner.op == "transpose":
            if inner.args[1:] != swap or not _contiguous(node.args[0], chain):
                return None
            return node, chain[::-1]
        if not last_dim_local(node) or len(node.users) > 1:
            return None
        chain.append(node)
        node = node.args[0]
    return None


def last_dim_local(node: Node) -> bool:
    """True for an operation on each element or each row of the last dimension, of one tensor and numbers."""
    if node.target in _LAST_DIM_LOCAL or node.target in (aten.contiguous.default, aten.clone.default):
        return True
    return (
        node.target in _SCALED
        and not isinstance(node.args[1], Node)
        and len(shape_of(node.args[0]) or ()) > 0
    )


def _contiguous(source: Any, chain: list[Node]) -> bool:
    """Dropping a copy is safe when what is below it is laid out in order: a later ``view`` may rely on
    that."""
    if not any(n.target in (aten.contiguous.default, aten.clone.default) for n in chain):
        return True
    val = source.meta.get("val")
    return isinstance(val, torch.Tensor) and val.is_contiguous()
