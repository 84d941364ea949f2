"""``match_attention_layout``: attention with the sequence before the heads."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.pattern_matcher.canonical import ATTENTION
from adkit.passes.registry import register

aten = torch.ops.aten


@register
class MatchAttentionLayout(Pass):
    """Bring every attention to layout bsnd: [B, S, N, H].

    That is how projections leave their results and how the packed cache takes them, so the transpositions
    around attention go away; where none is there to drop, one is put in.

        before: transpose(attention(transpose(q), transpose(k), transpose(v), layout="bnsd"))
        after:  attention(q, k, v)
    """

    key = "match_attention_layout"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every attention in layout bnsd."""
        count = 0
        for node in list(gm.graph.nodes):
            if (
                node.target is not ATTENTION
                or node.kwargs.get("layout") != "bnsd"
                or node.args[3:4] not in ((), (None,))
            ):
                continue
            turned = [u for u in node.users if swaps_heads(u)]
            matched = [n for n in node.args[:3] if isinstance(n, Node) and swaps_heads(n)]
            with self.site(gm, [*matched, node, *turned], label="attention layout", before=node) as s:
                inputs = [
                    n.args[0] if swaps_heads(n) else s.call(aten.transpose.int, (n, 1, 2))
                    for n in node.args[:3]
                ]
                options = {k: v for k, v in node.kwargs.items() if k != "layout"}
                new = s.call(
                    ATTENTION, (*inputs, *node.args[3:]), options, like=turned[0] if turned else None
                )
                for user in turned:
                    s.replace(user, new)
                if any(u not in turned for u in node.users):
                    s.replace(node, s.call(aten.transpose.int, (new, 1, 2), like=node))
            count += 1
        return PassInfo(num_matches=count, is_clean=False) if count else PassInfo()


def swaps_heads(node: Node) -> bool:
    """True for a transposition of dimensions 1 and 2 of four."""
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.ndim != 4:
        return False
    args: tuple[Any, ...] = node.args
    if node.target is aten.transpose.int:
        return {d % 4 for d in args[1:3]} == {1, 2}
    return node.target is aten.permute.default and [d % 4 for d in args[1]] == [0, 2, 1, 3]
