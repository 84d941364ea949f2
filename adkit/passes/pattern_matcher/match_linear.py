"""``match_linear``: linear layers as the canonical op."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import aten
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register


@register
class MatchLinear(Pass):
    """Replace ``aten.linear`` by ``torch_linear_simple``.

    Fusion, sharding and quantisation passes then look for one op. ``addmm`` with a weight stored [D, F]
    (GPT-2's Conv1D) stays as it is: its weight would have to be turned around.

        before: aten.linear(x, weight, bias)
        after:  torch_linear_simple(x, weight, bias)
    """

    key = "match_linear"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every linear."""
        found = [n for n in gm.graph.nodes if n.target is aten.linear.default]
        for node in found:
            with self.site(gm, [node], label="linear", before=node) as s:
                s.replace(
                    node,
                    s.call(torch.ops.adkit.torch_linear_simple.default, node.args, node.kwargs, like=node),
                )
        return PassInfo(num_matches=len(found))
