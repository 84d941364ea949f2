"""``fuse_swiglu``: gated activations that read both halves of one projection."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from adkit.graph.matching import shape_of, term_of
from adkit.graph.step import PassInfo
from adkit.ops.backends import pick
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.post_load_fusion._fused import BackendConfig
from adkit.passes.registry import register


@register
class FuseSwiGLU(Pass):
    """Let a gated activation read the fused gate-up projection itself.

    After ``fuse_gemms`` (or in models with one gate_up projection) gate and up are the two halves of one
    tensor; the packed op reads it in place, without the split, and a kernel does so in one sweep.

        before: gate, up = split(gate_up, [F, F], -1); torch_swiglu(gate, up)
        after:  torch_swiglu_packed(gate_up)
    """

    key = "fuse_swiglu"
    stage = Stage.POST_LOAD_FUSION
    Config: ClassVar[type[PassConfig]] = BackendConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every gate whose two inputs are the halves of one tensor."""
        count = 0
        for node in [n for n in gm.graph.nodes if n.target is torch.ops.adkit.torch_swiglu.default]:
            found = _packed(node)
            if found is None:
                continue
            packed, pieces = found
            with self.site(gm, (*pieces, node), label="swiglu packed", before=node) as s:
                target = pick("swiglu_packed", self.config.backend, ctx.device)
                s.replace(node, s.call(target, (packed, *node.args[2:]), node.kwargs, like=node))
            count += 1
        return PassInfo(num_matches=count)


def _packed(node: Node) -> tuple[Node, list[Node]] | None:
    """The tensor whose halves are gate and up, and the nodes that cut it; None when there is none."""
    gate, up = term_of(node.args[0]), term_of(node.args[1])
    if gate is None or up is None or gate.op != "slice" or up.op != "slice" or gate.args[0] is not up.args[0]:
        return None
    size = (shape_of(gate.args[0]) or (None,))[-1]
    if not isinstance(size, int) or size % 2:
        return None
    if gate.args[1:] != (-1, 0, size // 2, 1) or up.args[1:] != (-1, size // 2, size, 1):
        return None
    return gate.args[0], [node.args[0], node.args[1], *gate.through, *up.through]  # type: ignore[list-item]
