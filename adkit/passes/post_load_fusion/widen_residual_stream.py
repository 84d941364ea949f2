"""``widen_residual_stream``: residual sums of a half-precision model in float32."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from adkit.graph.matching import aten, dtype_of, same_shape
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.post_load_fusion._fused import every
from adkit.passes.registry import register

_HALF = (torch.bfloat16, torch.float16)


@register
class WidenResidualStream(Pass):
    """Keep the residual stream of a bfloat16 or float16 model in float32; all that branches compute stays as it is.

    Every layer adds to the stream twice, and a sum that is rounded to bfloat16 each time loses what is small beside
    it: in a deep model this makes most of the difference to the same model in float32. The norms that read the
    stream compute in float32 anyway, and kernels add before they round, so a wider stream costs its own bytes alone:
    four more a number and sum, some 1% of a long prompt's time and little in a decode step.

    The stream is what the last RMS norm reads, back through its sums to the embeddings. Where anything but RMS norms
    reads it (layer norms; linear layers, as in OLMo2), each reader would need a rounded copy, and the graph is left.

        before: h = residual + x; y = torch_rmsnorm(h, w, eps)                        # all bfloat16
        after:  h = residual + x; y = torch_rmsnorm(h, w, eps, out_dtype=bfloat16)    # residual and h float32
    """

    key = "widen_residual_stream"
    stage = Stage.POST_LOAD_FUSION

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every sum of the stream, with the norms that read it."""
        sums = _stream(gm)
        if not sums:
            return PassInfo(skipped=True, reason="no RMS norm reads a sum of two equal shapes")
        narrow = dtype_of(sums[0])
        if narrow not in _HALF:
            return PassInfo(
                skipped=True, reason=f"the stream is {str(narrow).removeprefix('torch.')} already"
            )
        norms = every("rmsnorm")
        others = [u for n in sums for u in n.users if u.target not in norms and u not in sums]
        if others:
            reason = f"{len(others)} readers of the stream are no RMS norms ({others[0].name} is the first)"
            return PassInfo(skipped=True, reason=f"{reason}: each would need a rounded copy")
        for i, total in enumerate(sums):
            readers = sorted(n for n in total.users if n.target in norms)
            with self.site(gm, [total, *readers], label="residual sum") as s:
                s.anchor = total  # whose module and line of code the new nodes get
                operands = total.args
                if i == 0:
                    begin = min(total.all_input_nodes)
                    wide = s.call(aten.to.dtype, (begin, torch.float32))
                    operands = tuple(wide if a is begin else a for a in operands)
                new = s.call(aten.add.Tensor, operands)
                for norm in readers:
                    s.anchor = norm
                    options = {**norm.kwargs, "out_dtype": dtype_of(norm)}
                    s.replace(norm, s.call(norm.target, (new, *norm.args[1:]), options, like=norm))  # type: ignore[arg-type]
                s.replace(total, new)
        return PassInfo(num_matches=len(sums))


def _stream(gm: GraphModule) -> list[Node]:
    """The sums that the last RMS norm's input is made of, first to last.

    A branch is computed from the stream, so of a sum's operands the stream is the older one.
    """
    norms = every("rmsnorm")
    last = next((n for n in reversed(gm.graph.nodes) if n.target in norms), None)
    found: list[Node] = []
    at = last.args[0] if last is not None else None
    while (
        isinstance(at, Node)
        and at.target is aten.add.Tensor
        and not at.kwargs
        and len(at.all_input_nodes) == 2
    ):
        a, b = at.all_input_nodes
        if not same_shape(a, b) or dtype_of(a) != dtype_of(b):
            break
        found.insert(0, at)
        at = min(a, b)  # FX nodes compare by their place in the graph
    return found
