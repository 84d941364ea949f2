"""``widen_logits``: logits of a half-precision model in float32."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.edit import fake_value
from adkit.graph.matching import dtype_of
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.post_load_fusion.gather_logits_before_lm_head import from_linear_to_logits
from adkit.passes.registry import register

_LINEAR = torch.ops.adkit.torch_linear_simple.default


@register
class WidenLogits(Pass):
    """Let the lm_head of a bfloat16 or float16 model give float32.

    Its products are summed in float32 and then rounded. bfloat16 has one number in 128 between powers of two: the two
    largest of a vocabulary's logits often round to the same, and which token greedy decoding takes is then decided by
    their place in the vocabulary. Unrounded they cost two more bytes a logit.

        before: logits = torch_linear_simple(h, lm_head)                        # bfloat16
        after:  logits = torch_linear_simple(h, lm_head, out_dtype=float32)
    """

    key = "widen_logits"
    stage = Stage.POST_LOAD_FUSION

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite the linear layer that the logits come from."""
        chain = from_linear_to_logits(gm)
        if chain is None or chain[0].target is not _LINEAR:
            return PassInfo(
                skipped=True, reason="the logits do not come from a linear layer through pointwise work"
            )
        linear, *rest = chain
        if dtype_of(linear) not in (torch.bfloat16, torch.float16):
            return PassInfo(skipped=True, reason=f"the lm_head gives {dtype_of(linear)} already")
        with self.site(gm, [linear], label="logits in float32") as s:
            s.replace(linear, s.call(_LINEAR, linear.args, {**linear.kwargs, "out_dtype": torch.float32}))
        for node in rest:
            node.meta["val"] = fake_value(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
        return PassInfo(num_matches=1)
