"""``match_eager_attention``: attention written as products and a softmax."""

from __future__ import annotations

from torch.fx import GraphModule

from adkit.graph.shape_only import EvaluationError, ShapeOnly
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.pattern_matcher.canonical import Replacer, known_buffers
from adkit.passes.pattern_matcher.masks import NotUnderstood
from adkit.passes.pattern_matcher.scores import SOFTMAXES, ScoreReader
from adkit.passes.registry import register


@register
class MatchEagerAttention(Pass):
    """Replace attention spelled out as matmul, mask, softmax, matmul by ``torch_attention``.

    From each softmax the scores are followed up to the product of queries and keys, the probabilities down to
    the product with the values. Scale, softcap and sinks are read off the nodes between; the mask is not read
    but evaluated at a few lengths, so that any way of writing a causal, windowed, chunked or ALiBi mask is
    understood. Each distinct way of writing is proved on random numbers. What is not understood stays, and
    the step says why.

        before: matmul(q, k^T) -> mul(scale) -> add(mask) -> softmax -> matmul(v)
        after:  torch_attention(q, k, v, scale=..., window=..., layout="bnsd")
    """

    key = "match_eager_attention"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Match every softmax that belongs to an attention."""
        softmaxes = [n for n in gm.graph.nodes if n.target in SOFTMAXES]
        if not softmaxes:
            return PassInfo()
        shapes = ShapeOnly(gm, constants=known_buffers(gm, ctx))
        reader = ScoreReader(gm, shapes)
        replacer = Replacer(self, gm, shapes, "eager attention")
        for node in softmaxes:
            try:
                found = reader.read(node)
                if found is not None:
                    replacer.replace(found)
            except (NotUnderstood, EvaluationError) as error:
                replacer.refuse(node, str(error))
        return replacer.info()
