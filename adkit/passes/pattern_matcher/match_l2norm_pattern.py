"""``match_l2norm_pattern``: Euclidean norms as one op."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import (
    Pat,
    dtype_of,
    find,
    named,
    pattern,
    rsqrt,
    same_shape,
    sqrt,
    square,
    total,
    uncast,
)
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register


@pattern
def l2norm(x: Pat, eps: Pat) -> Pat:
    """x over its Euclidean length."""
    return x * rsqrt(named("sum", total(square(x))) + eps)


@pattern
def l2norm_by_division(x: Pat, eps: Pat) -> Pat:
    """The same with a division."""
    return x / sqrt(named("sum", total(square(x))) + eps)


@register
class MatchL2Norm(Pass):
    """Replace each division by the Euclidean length (eps inside the root) by one ``torch_l2norm``.

    Linear-attention models scale queries and keys so. Five nodes become one that a fused kernel can take.
    Only norms that accumulate in float32 match: those of float32 values, or with a cast before.

        before: x * rsqrt((x * x).sum(-1, True) + 1e-6)
        after:  torch_l2norm(x, 1e-6)
    """

    key = "match_l2norm_pattern"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every match."""
        count = 0
        for match in find(gm, l2norm, l2norm_by_division):
            out = dtype_of(match.root)
            x = uncast(match["x"], out) if out is not None else None
            exact = dtype_of(match["sum"]) == torch.float32 and isinstance(match["eps"], float)
            if x is None or not exact or not same_shape(x, match.root):
                continue
            with self.site(gm, match.nodes, label="l2norm", before=match.root) as s:
                new = s.call(torch.ops.adkit.torch_l2norm.default, (x, match["eps"]), like=match.root)
                s.replace(match.root, new)
            count += 1
        return PassInfo(num_matches=count)
