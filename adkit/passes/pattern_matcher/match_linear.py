"""``match_linear``: linear layers as the canonical op."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import aten, shape_of
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register


@register
class MatchLinear(Pass):
    """Replace ``aten.linear`` by ``torch_linear_simple``.

    Fusion, sharding and quantisation passes then look for one op. ``addmm`` with a weight stored [D, F]
    (GPT-2's Conv1D) stays as it is: its weight would have to be turned around.

    A product with a weight turned around (Falcon's ``x @ weight.T``) is one too.

        before: aten.linear(x, weight, bias)
        after:  torch_linear_simple(x, weight, bias)
    """

    key = "match_linear"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every linear."""
        linear = torch.ops.adkit.torch_linear_simple.default
        count = 0
        for node in list(gm.graph.nodes):
            if node.target is aten.linear.default:
                matched, args = [node], node.args
            elif node.target is aten.matmul.default and (weight := _turned(node.args[1])) is not None:
                matched, args = [node.args[1], node], (node.args[0], weight)
            else:
                continue
            with self.site(gm, matched, label="linear", before=node) as s:
                s.replace(node, s.call(linear, args, node.kwargs, like=node))
            count += 1
        return PassInfo(num_matches=count)


def _turned(value: Any) -> Node | None:
    """The weight [F, D] of which ``value`` is the transpose; None for anything else."""
    if not isinstance(value, Node) or value.target not in _TURNS or len(shape_of(value) or ()) != 2:
        return None
    weight = value.args[0]
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


_TURNS = {aten.t.default, aten.numpy_T.default, aten.mT.default}
