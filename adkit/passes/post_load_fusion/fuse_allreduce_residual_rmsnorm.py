"""``fuse_allreduce_residual_rmsnorm``: a sum over ranks, the residual sum and the norm that reads it, as one op."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import arg
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.post_load_fusion._fused import every
from adkit.passes.post_load_fusion.fuse_add_rms_norm import is_sum, movable
from adkit.passes.registry import register

_ALL_REDUCE = torch.ops.adkit.torch_dist_all_reduce.default
_FUSED = torch.ops.adkit.torch_dist_allreduce_residual_rmsnorm.default


@register
class FuseAllReduceResidualRMSNorm(Pass):
    """Let one op sum over the ranks, add the residual and normalise: it returns the normed value and the sum.

    In a decode step the ranks exchange a few kilobytes, and what that takes is starts and waiting. A kernel that sums
    what its neighbours hold can add and normalise while the sum is in registers; where there is none, the op
    runs the three one after another, with the kernels that there are. The residual may be wider than what travels
    (``widen_residual_stream``). A norm that stands before the residual sum (Gemma 2) is left.

        before: h = residual + torch_dist_all_reduce(x); y = torch_rmsnorm(h, w, eps)
        after:  y, h = torch_dist_allreduce_residual_rmsnorm(x, residual, w, eps)
    """

    key = "fuse_allreduce_residual_rmsnorm"
    stage = Stage.POST_LOAD_FUSION

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every norm of a residual sum with a sum over ranks that nobody else reads."""
        norms = every("rmsnorm")
        count = 0
        for norm in [n for n in gm.graph.nodes if n.target in norms]:
            total = norm.args[0]
            if not is_sum(total) or not movable(total, norm):
                continue
            reduced = _summed(total)
            if reduced is None:
                continue
            residual = next(a for a in total.args if a is not reduced)
            with self.site(gm, (reduced, total, norm), label="all_reduce + add + rmsnorm", before=norm) as s:
                kwargs = {**norm.kwargs, "strategy": arg(reduced, 1, "strategy", "AUTO")}
                both = s.call(_FUSED, (reduced.args[0], residual, *norm.args[1:]), kwargs, like=norm)
                both.meta["val"] = (norm.meta.get("val"), total.meta.get("val"))
                s.replace(norm, s.call(operator.getitem, (both, 0), like=norm))
                s.replace(total, s.call(operator.getitem, (both, 1), like=total))
            count += 1
        return PassInfo(num_matches=count)


def _summed(total: Node) -> Node | None:
    """The operand of a sum that is a sum over ranks and read by nothing else."""
    for operand in total.args:
        if isinstance(operand, Node) and operand.target is _ALL_REDUCE and len(operand.users) == 1:
            return operand
    return None
