"""``build_model``: the Hugging Face module, on the meta device."""

from __future__ import annotations

import torch

from adkit.graph.step import PassInfo
from adkit.passes.base import BuildPass, Context, Stage
from adkit.passes.registry import register


@register
class BuildModel(BuildPass):
    """Build the Hugging Face module from its config, without weights.

    Parameters live on the meta device: they have shapes and dtypes and no data, so a 405B config builds on a
    laptop. Buffers that the model computes (rotary frequencies) are real where it computes them.
    """

    key = "build_model"
    stage = Stage.FACTORY

    def build(self, module: torch.nn.Module | None, ctx: Context) -> tuple[torch.nn.Module, PassInfo]:
        """The module on meta."""
        model = ctx.factory.build()
        count = sum(p.numel() for p in model.parameters())
        return model, PassInfo(num_matches=1, details={"parameters": count, "class": type(model).__name__})
