"""``match_rope_layout``: rotary embeddings with the sequence before the heads."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import arg, aten, term_of
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.pattern_matcher.eliminate_redundant_transposes import last_dim_local
from adkit.passes.registry import register

_BNSD, _BSND = 1, 2  # where a table [B, S, R] gets its head dimension
_UNSQUEEZE_ARG = {
    torch.ops.adkit.torch_rope_with_explicit_cos_sin.default: 4,
    torch.ops.adkit.torch_rope_with_qk_interleaving.default: 4,
    torch.ops.adkit.torch_rope_with_complex_freqs.default: 3,
}


@register
class MatchRopeLayout(Pass):
    """Move rotary embeddings from [B, N, S, H] to [B, S, N, H], the layout of ``torch_attention``.

    Hugging Face transposes queries and keys for rotation and the attention op wants them back: with the
    transposes on the far side of the rotation, ``eliminate_redundant_transposes`` cancels each with its
    counterpart.

        before: q, k = torch_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, 1)
        after:  q, k = torch_rope(q.transpose(1, 2).transpose(1, 2), ..., cos, sin, 2); q.transpose(1, 2)...
    """

    key = "match_rope_layout"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every rotation in bnsd whose readers all want bsnd."""
        count = 0
        for node in [n for n in gm.graph.nodes if n.target in _UNSQUEEZE_ARG]:
            place = _UNSQUEEZE_ARG[node.target]
            outs = [u for u in node.users if u.target is operator.getitem]
            if arg(node, place, "unsqueeze_dim", _BNSD) != _BNSD or len(outs) != len(node.users):
                continue
            if not all(_wants_bsnd(user) for out in outs for user in out.users):
                continue
            self._rewrite(gm, node, outs, place)
            count += 1
        return PassInfo(num_matches=count)

    def _rewrite(self, gm: GraphModule, node: Node, outs: list[Node], place: int) -> None:
        target: Any = node.target
        with self.site(gm, (node, *outs), label="rope layout", before=node.next) as s:
            swapped = [s.call(aten.transpose.int, (x, 1, 2)) for x in node.args[:2]]
            tables = node.args[2:place]
            new = s.call(target, (*swapped, *tables, _BSND), like=node)
            new.meta["val"] = tuple(x.meta["val"] for x in swapped)
            for out in outs:
                index: Any = out.args[1]
                piece = s.call(operator.getitem, (new, index), like=swapped[index])
                s.replace(out, s.call(aten.transpose.int, (piece, 1, 2), like=out))


def _wants_bsnd(reader: Node) -> bool:
    """True when ``reader`` is the transpose to bsnd, or a lone norm or scaling on the way to it."""
    while last_dim_local(reader) and len(reader.users) == 1:
        (reader,) = reader.users
    term = term_of(reader)
    return term is not None and term.op == "transpose" and term.args[1:] == (-3, -2)
