"""``match_sdpa_to_torch_attention``: PyTorch's own attention operator."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from adkit.graph.shape_only import EvaluationError, ShapeOnly
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.pattern_matcher.canonical import Replacer, known_buffers
from adkit.passes.pattern_matcher.masks import MaskMeaning, MaskReader, MaskStep, NotUnderstood
from adkit.passes.pattern_matcher.scores import Found
from adkit.passes.registry import register

_SDPA = torch.ops.aten.scaled_dot_product_attention.default


@register
class MatchSDPA(Pass):
    """Replace ``scaled_dot_product_attention`` and its mask tensor by ``torch_attention``.

    The mask is evaluated at a few lengths to see what it means (causal, window, chunk, ALiBi); then the
    tensor of S x S elements and the nodes that make it are no longer needed. A mask that is not understood
    stays, and the step says why.

        before: scaled_dot_product_attention(q, k, v, mask, scale=...)
        after:  torch_attention(q, k, v, scale=..., window=..., layout="bnsd")
    """

    key = "match_sdpa_to_torch_attention"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Match every call."""
        calls = [n for n in gm.graph.nodes if n.target is _SDPA]
        if not calls:
            return PassInfo()
        shapes = ShapeOnly(gm, constants=known_buffers(gm, ctx))
        masks = MaskReader(shapes)
        replacer = Replacer(self, gm, shapes, "sdpa")
        for node in calls:
            try:
                replacer.replace(_read(node, masks))
            except (NotUnderstood, EvaluationError) as error:
                replacer.refuse(node, str(error))
        return replacer.info()


def _read(node: Node, masks: MaskReader) -> Found:
    bound: dict[str, Any] = {a.name: a.default_value for a in _SDPA._schema.arguments}
    bound.update(zip((a.name for a in _SDPA._schema.arguments), node.args, strict=False))
    bound.update(node.kwargs)
    query, key, value, mask = (bound[n] for n in ("query", "key", "value", "attn_mask"))
    if bound["dropout_p"]:
        raise NotUnderstood(
            f"it drops out probabilities (dropout_p={bound['dropout_p']}); export in eval mode"
        )
    if query.meta["val"].ndim != 4:
        raise NotUnderstood("queries are not batch, heads, sequence, width")
    scale = bound["scale"]
    if scale is None:
        scale = int(query.meta["val"].shape[-1]) ** -0.5
    meaning = MaskMeaning(causal=bool(bound["is_causal"]))
    if mask is not None:
        if mask not in masks.shapes:
            raise NotUnderstood("its mask depends on more than sizes and position_ids")
        if mask.meta["val"].dtype == torch.bool:
            step = MaskStep("keep", mask, fill=float("-inf"))
        else:
            step = MaskStep("add", mask)
        meaning = masks.read((step,), int(query.meta["val"].shape[1]))
    return Found(query, key, value, node, [node], float(scale), mask=meaning)
