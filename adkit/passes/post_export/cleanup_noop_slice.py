"""``cleanup_noop_slice``: slices that keep everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.post_export._replace import bypass
from adkit.passes.registry import register

_MAX = 2**63 - 1


def _keeps_everything(node: Node) -> bool:
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    source, dim, start, end, step = node.args + defaults[len(node.args) :]
    if start not in (None, 0) or step != 1 or not isinstance(source, Node):
        return False
    if end is None or (isinstance(end, int) and end == _MAX):
        return True
    value = source.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(dim, int):
        return False
    size = value.shape[dim]
    if isinstance(end, int):
        return isinstance(size, int) and end >= size
    limit = end.meta.get("val") if isinstance(end, Node) else None
    if not isinstance(limit, torch.SymInt) or not isinstance(size, torch.SymInt):
        return False
    return bool(limit.node.expr == size.node.expr)


@register
class CleanupNoopSlice(Pass):
    """Bypass slices over a whole dimension, which modelling code writes as ``x[:, :, None]`` or ``x[:, 0:]``.

    Indexing with ``:`` exports as a slice from 0 to the largest integer: it copies nothing and computes
    nothing, but stands between the nodes that matchers look for.

        before: %s = aten.slice.Tensor(%x, 1, 0, 9223372036854775807)
                %y = aten.linear(%s, %w)
        after:  %y = aten.linear(%x, %w)
    """

    key = "cleanup_noop_slice"
    stage = Stage.POST_EXPORT

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Bypass every slice that keeps all of its dimension."""
        return PassInfo(num_matches=bypass(gm, _keeps_everything))
