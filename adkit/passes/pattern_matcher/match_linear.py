"""``match_linear``: linear layers as the canonical op."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import aten, same_size, shape_of
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register


@register
class MatchLinear(Pass):
    """Replace ``aten.linear`` by ``torch_linear_simple``.

    Fusion, sharding and quantisation passes then look for one op. A product with a weight turned around (Falcon's
    ``x @ weight.T``) is one too. So is ``addmm`` with a weight stored [D, F] (GPT-2's Conv1D), between views that lay
    tokens in one row and back: the op then reads the stored weight turned around, which moves nothing.

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
            if node.target is aten.addmm.default and (tokens := _tokens(node)) is not None:
                self._stored_turned(gm, node, *tokens)
                count += 1
                continue
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

    def _stored_turned(self, gm: GraphModule, node: Node, x: Node, back: Node) -> None:
        bias, weight = node.args[0], node.args[2]
        matched = dict.fromkeys(n for n in (node.args[1], node, back) if n is not x)
        with self.site(gm, list(matched), label="linear, weight stored [D, F]", before=node) as s:  # type: ignore[arg-type]
            turned = s.call(aten.t.default, (weight,))
            s.replace(back, s.call(torch.ops.adkit.torch_linear_simple.default, (x, turned, bias), like=back))


def _tokens(node: Node) -> tuple[Node, Node] | None:
    """What an ``addmm`` with a parameter works on, and its result, in one shape of tokens; None if it is no layer.

    Views around it that only lay tokens in one row and back are left out.
    """
    _, flat, weight = node.args[:3]
    if node.kwargs or not isinstance(flat, Node) or not isinstance(weight, Node) or weight.op != "get_attr":
        return None
    back = next(iter(node.users)) if len(node.users) == 1 else None
    x = flat.args[0] if flat.target in _VIEWS else None
    if isinstance(x, Node) and back is not None and back.target in _VIEWS:
        before, after = shape_of(x) or (), shape_of(back) or ()
        same = len(before) == len(after) and all(map(same_size, before[:-1], after[:-1]))
        if same and same_size(before[-1], shape_of(weight)[0]) and same_size(after[-1], shape_of(weight)[1]):  # type: ignore[index]
            return x, back
    return flat, node


def _turned(value: Any) -> Node | None:
    """The weight [F, D] of which ``value`` is the transpose; None for anything else."""
    if not isinstance(value, Node) or value.target not in _TURNS or len(shape_of(value) or ()) != 2:
        return None
    weight = value.args[0]
    return weight if isinstance(weight, Node) and weight.op == "get_attr" else None


_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_TURNS = {aten.t.default, aten.numpy_T.default, aten.mT.default}
