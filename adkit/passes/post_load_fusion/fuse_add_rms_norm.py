"""``fuse_add_rms_norm``: a residual sum and the norm that reads it, as one op."""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from adkit.graph.matching import aten, dtype_of, same_shape
from adkit.graph.step import PassInfo
from adkit.ops.backends import pick
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.post_load_fusion._fused import BackendConfig, every
from adkit.passes.registry import register


@register
class FuseAddRMSNorm(Pass):
    """Compute a residual sum and the RMS norm of it in one op that returns both.

    The sum is written once for the residual stream and normalised while it is still in registers, instead of
    being written, read and normalised. The sum is rounded to its dtype before the norm, as without fusion.

        before: h = residual + x; y = torch_rmsnorm(h, w, eps)
        after:  y, h = torch_fused_add_rmsnorm(x, residual, w, eps)
    """

    key = "fuse_add_rms_norm"
    stage = Stage.POST_LOAD_FUSION
    Config: ClassVar[type[PassConfig]] = BackendConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every norm of a sum of two equal shapes."""
        norms = every("rmsnorm")
        count = 0
        for norm in [n for n in gm.graph.nodes if n.target in norms]:
            total = norm.args[0]
            if not is_sum(total) or not movable(total, norm):
                continue
            older, newer = sorted(total.args)  # FX nodes compare by their place in the graph
            with self.site(gm, (total, norm), label="add + rmsnorm", before=norm) as s:
                target = pick("fused_add_rmsnorm", self.config.backend, ctx.device)
                both = s.call(target, (newer, older, *norm.args[1:]), norm.kwargs, like=norm)
                both.meta["val"] = (norm.meta.get("val"), total.meta.get("val"))
                s.replace(norm, s.call(operator.getitem, (both, 0), like=norm))
                s.replace(total, s.call(operator.getitem, (both, 1), like=total))
            count += 1
        return PassInfo(num_matches=count)


def is_sum(node: object) -> bool:
    """True for a + b of two tensors of one shape, of which one may be wider (a residual stream in float32)."""
    if not isinstance(node, Node) or node.target is not aten.add.Tensor or node.kwargs:
        return False
    a, b = node.args
    if not isinstance(a, Node) or not isinstance(b, Node):
        return False
    return same_shape(a, b) and promoted(a, b) == dtype_of(node)


def promoted(a: Node, b: Node) -> torch.dtype | None:
    """The dtype of a sum of two tensors; None where the dtype of one is not known."""
    one, other = dtype_of(a), dtype_of(b)
    return None if one is None or other is None else torch.promote_types(one, other)


def movable(total: Node, norm: Node) -> bool:
    """True when nobody reads the sum before the norm's place, where the fused op goes."""
    return all(not user < norm for user in total.users)
