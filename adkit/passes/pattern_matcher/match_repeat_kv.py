"""``match_repeat_kv``: keys and values copied once for every query head of their group."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from adkit.graph.shape_only import ShapeOnly
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.pattern_matcher.canonical import REPEAT_KV
from adkit.passes.pattern_matcher.scores import peel, with_asserts
from adkit.passes.registry import register

aten = torch.ops.aten
_MERGES = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}
)
_EXPANDS = frozenset({aten.expand.default, aten.broadcast_to.default})

_SIZES = (1009, 10007)  # no model has these sizes, so equal numbers mean equal dimensions


@register
class MatchRepeatKV(Pass):
    """Name the copying of key and value heads.

    Grouped-query attention in Hugging Face's code repeats each key and value head for its group of query
    heads. As one node the repetition can later be dropped: ``torch_attention`` takes grouped heads as they
    are.

        before: unsqueeze -> expand -> reshape      # [B, K, S, H] -> [B, N, S, H]
        after:  torch_attention_repeat_kv
    """

    key = "match_repeat_kv"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Match every merge of a new, expanded dimension into the one before it."""
        merges = [n for n in gm.graph.nodes if n.target in _MERGES and _is_rank(n, 4)]
        repeats = [
            n for n in gm.graph.nodes if n.target is aten.repeat_interleave.self_int and _is_rank(n, 4)
        ]
        if not merges and not repeats:
            return PassInfo()
        shapes = ShapeOnly(gm)
        count = 0
        for node in merges:
            count += self._merge(gm, node, shapes)
        for node in repeats:
            args: tuple[Any, ...] = node.args
            dim = args[2] if len(args) > 2 else None
            if isinstance(dim, int) and isinstance(args[1], int) and _repeats_heads(node, dim % 4, shapes):
                self._put(gm, [node], node, args[0], args[1], dim % 4)
                count += 1
        return PassInfo(num_matches=count, is_clean=False)

    def _merge(self, gm: GraphModule, node: Node, shapes: ShapeOnly) -> bool:
        matched = [node]
        if not isinstance(node.args[0], Node):
            return False
        wide = peel(node.args[0], shapes, matched)
        if wide.target not in _EXPANDS or not _is_rank(wide, 5):
            return False
        matched.append(wide)
        narrow = wide.args[0]
        assert isinstance(narrow, Node)
        if not _is_rank(narrow, 5):
            return False
        small, big, out = (shapes.shape(n, *_SIZES) for n in (narrow, wide, node))
        grown = [i for i in range(5) if small[i] != big[i]]
        if len(grown) != 1 or grown[0] == 0 or small[grown[0]] != 1:
            return False
        dim = grown[0]
        if not _repeats_heads(node, dim - 1, shapes) or out != (
            *big[: dim - 1],
            big[dim - 1] * big[dim],
            *big[dim + 1 :],
        ):
            return False
        inner = peel(narrow, shapes, matched)
        if inner.target is aten.unsqueeze.default and inner.args[1] in (dim, dim - 5):
            matched.append(inner)
            source = peel(inner.args[0], shapes, matched)  # type: ignore[arg-type]
            self._put(gm, matched, node, source, big[dim], dim - 1)
        else:
            self._put(gm, matched, node, inner, big[dim], dim - 1, squeeze=dim)
        return True

    def _put(
        self,
        gm: GraphModule,
        matched: list[Node],
        node: Node,
        source: Node,
        times: int,
        dim: int,
        squeeze: int | None = None,
    ) -> None:
        with self.site(gm, with_asserts(matched), label="repeat_kv", before=node) as s:
            if squeeze is not None:
                source = s.call(aten.squeeze.dim, (source, squeeze))
            s.replace(node, s.call(REPEAT_KV, (source, times, dim), like=node))


def _repeats_heads(node: Node, dim: int, shapes: ShapeOnly) -> bool:
    """Whether ``dim`` is where heads are: [B, here, S, H] or [B, S, here, H]."""
    shape = shapes.shape(node, *_SIZES)
    return (
        dim in (1, 2) and shape[0] == _SIZES[0] and shape[3 - dim] == _SIZES[1] and shape[dim] not in _SIZES
    )


def _is_rank(node: Node, rank: int) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.ndim == rank
