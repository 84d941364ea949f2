"""``gather_logits_before_lm_head``: logits only of the tokens that are asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.edit import fake_value
from adkit.graph.inputs import add_input
from adkit.graph.matching import aten, shape_of
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register

INPUT = "logits_indices"
_LINEARS = {torch.ops.adkit.torch_linear_simple.default, aten.linear.default}
# What may lie between the last linear and the logits: work on each element with numbers.
_POINTWISE = {
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor, aten.add.Scalar,
    aten.sub.Tensor, aten.tanh.default, aten.neg.default, aten.to.dtype, aten._to_copy.default,
    aten.clone.default, aten.contiguous.default, aten.clamp.default,
}  # fmt: skip


@register
class GatherLogits(Pass):
    """Pick the hidden states whose logits are wanted before the lm_head, by a new input ``logits_indices``
    [L].

    A prompt of a thousand tokens needs the logits of its last one only; the lm_head over a large vocabulary
    is the widest product of the model and its float output the largest tensor (T x V). Logits become [B, L,
    V].

        before: logits = linear(h, lm_head)                                   # [B, S, V]
        after:  logits = linear(index_select(h, 1, logits_indices), lm_head)  # [B, L, V]
    """

    key = "gather_logits_before_lm_head"
    stage = Stage.POST_LOAD_FUSION

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Insert the input and the gather."""
        if any(n.op == "placeholder" and n.target == INPUT for n in gm.graph.nodes):
            return PassInfo(skipped=True, reason=f"the graph has an input {INPUT} already")
        chain = from_linear_to_logits(gm)
        if chain is None:
            return PassInfo(
                skipped=True, reason="the logits do not come from a linear layer through pointwise work"
            )
        linear = chain[0]
        first = linear
        if _joins(linear.args[0], 0):  # tokens of all ranks: each rank picks among its own
            first = linear.args[0]  # type: ignore[assignment]
            chain.insert(0, first)
        hidden: Node = first.args[0]  # type: ignore[assignment]
        with self.site(gm, [linear], label="gather logits", before=first) as s:
            indices = add_input(gm, INPUT, (None,), torch.int64)
            s.adopt(indices)
            gathered = s.call(aten.index_select.default, (hidden, 1, indices))
            first.replace_input_with(hidden, gathered)
        for node in chain:
            node.meta["val"] = fake_value(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        return PassInfo(num_matches=1)


def from_linear_to_logits(gm: GraphModule) -> list[Node] | None:
    """The last linear and the pointwise nodes after it up to the logits; None if there is no such path."""
    output = gm.graph.output_node()
    node: Any = output.args[0]
    while isinstance(node, (tuple, list)) and len(node) == 1:
        node = node[0]
    chain: list[Node] = []
    while isinstance(node, Node) and len(node.users) == 1:
        chain.insert(0, node)
        if node.target in _LINEARS:
            return chain if len(shape_of(node.args[0]) or ()) == 3 else None
        last = len(shape_of(node) or ()) - 1
        pointwise = node.target in _POINTWISE or _joins(node, -1) or _joins(node, last) or _joins(node, 0)
        if not pointwise or len(node.all_input_nodes) != 1:
            return None
        node = node.args[0]
    return None


def _joins(node: Any, dim: int) -> bool:
    """True where ranks put together their shares of each token's logits, or (dimension 0) those of their own tokens."""
    target = torch.ops.adkit.torch_dist_all_gather.default
    return isinstance(node, Node) and node.target is target and bool(node.args[1] == dim)
