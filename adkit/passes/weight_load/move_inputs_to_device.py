"""``move_inputs_to_device``: the graph's own tensors and device literals where the model runs."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from adkit.graph.step import PassInfo
from adkit.models.export import retarget_device
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register


@register
class MoveInputsToDevice(Pass):
    """Make the graph take its inputs, make its tensors and keep its constants on the device it runs on.

    A graph is exported for the CPU. ``arange`` and the like name a device in the graph, and small tensors
    that the model's code builds from numbers are held by it; both must follow the weights.

        before: %p = aten.arange.default(%s, device=cpu)
        after:  %p = aten.arange.default(%s, device=cuda:0)
    """

    key = "move_inputs_to_device"
    stage = Stage.WEIGHT_LOAD

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Point literals and constants at ``ctx.device``."""
        device = torch.device(ctx.device)
        changed = retarget_device(gm, device)
        reason = "" if changed else f"nothing names a device other than {device}"
        return PassInfo(num_matches=changed, reason=reason, details={"device": str(device)})
