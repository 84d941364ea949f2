"""``match_grouped_attention``: grouped heads go into attention without being copied."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.pattern_matcher.canonical import ATTENTION, REPEAT_KV
from adkit.passes.registry import register

aten = torch.ops.aten


@register
class MatchGroupedAttention(Pass):
    """Drop the copies of key and value heads before ``torch_attention``.

    The op knows that N query heads share K key heads; without the copies the cache holds K heads, not N.

        before: torch_attention(q, repeat_kv(k, 4), repeat_kv(v, 4))
        after:  torch_attention(q, k, v)
    """

    key = "match_grouped_attention"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Fold repetitions into every attention whose keys and values are repeated alike."""
        count = 0
        for node in list(gm.graph.nodes):
            if node.target is not ATTENTION:
                continue
            heads = 1 if node.kwargs.get("layout") == "bnsd" else 2
            key, value = (self._repeat(n, heads) for n in node.args[1:3])
            if key is None or value is None or key[1] != value[1]:
                continue
            with self.site(gm, [node, *key[2], *value[2]], label="grouped attention", before=node) as s:
                plain = [
                    s.call(aten.transpose.int, (source, 1, 2)) if turned else source
                    for source, _, _, turned in (key, value)
                ]
                new = s.call(ATTENTION, (node.args[0], *plain, *node.args[3:]), dict(node.kwargs), like=node)
                s.replace(node, new)
            count += 1
        return PassInfo(num_matches=count, is_clean=False) if count else PassInfo()

    @staticmethod
    def _repeat(node: object, heads: int) -> tuple[Node, int, list[Node], bool] | None:
        """Source, times, nodes and whether a transposition lies between, of repeated heads."""
        nodes: list[Node] = []
        turned = False
        while isinstance(node, Node):
            nodes.append(node)
            if node.target is aten.transpose.int and set(node.args[1:]) == {1, 2} and not turned:
                turned, heads = True, 3 - heads
            elif node.target in (aten.contiguous.default, aten.clone.default):
                pass
            elif node.target is REPEAT_KV and (node.args[2] if len(node.args) > 2 else 1) == heads:
                source, times = node.args[:2]
                assert isinstance(source, Node)
                assert isinstance(times, int)
                return source, times, nodes, turned
            else:
                return None
            node = node.args[0]
        return None
