"""``cleanup_noop_add``: sums with 0 and products with 1."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.post_export._replace import bypass, fresh_copies_kept, same_value
from adkit.passes.registry import register

_NEUTRAL: dict[Any, int] = {
    torch.ops.aten.add.Tensor: 0,
    torch.ops.aten.add.Scalar: 0,
    torch.ops.aten.sub.Tensor: 0,
    torch.ops.aten.sub.Scalar: 0,
    torch.ops.aten.mul.Tensor: 1,
    torch.ops.aten.mul.Scalar: 1,
    torch.ops.aten.div.Tensor: 1,
    torch.ops.aten.div.Scalar: 1,
}


def _is_neutral(node: Node) -> bool:
    neutral = _NEUTRAL.get(node.target)
    if neutral is None or len(node.args) < 2:
        return False
    source, other = node.args[:2]
    return (
        isinstance(source, Node)
        and isinstance(other, int | float)
        and other == neutral
        and same_value(source, node)
    )


@register
class CleanupNoopAdd(Pass):
    """Bypass ``x + 0``, ``x - 0``, ``x * 1`` and ``x / 1``, where the result has the dtype of ``x``.

    Models write them with numbers from their config (an attention scaling of 1.0, an offset of 0), so they
    show up in some checkpoints of a family and not in others; without them the family has one form.

        before: %c = aten.cos(%emb)
                %d = aten.mul.Tensor(%c, 1.0)
                %e = aten.to.dtype(%d, torch.bfloat16)
        after:  %c = aten.cos(%emb)
                %e = aten.to.dtype(%c, torch.bfloat16)
    """

    key = "cleanup_noop_add"
    stage = Stage.POST_EXPORT

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Bypass every arithmetic identity."""
        kept = fresh_copies_kept(gm)
        return PassInfo(num_matches=bypass(gm, lambda node: _is_neutral(node) and not kept(node)))
