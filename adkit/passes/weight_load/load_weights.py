"""``load_weights``: the graph's tensors get their data."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch.fx import GraphModule

from adkit.graph.step import PassInfo
from adkit.models.loading import load_graph_tensors
from adkit.models.memory import human
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.registry import register


class LoadWeightsConfig(PassConfig):
    """Common fields; memory grows."""

    run_graph_cleanup: bool = Field(False, description="Loading changes no node")
    requires_clean_graph: bool = Field(False, description="Loading reads no node but get_attr")
    expect_mem_change: bool = Field(True, description="Weights arrive on the device")


@register
class LoadWeights(Pass):
    """Fill the graph's parameters and buffers, tensor by tensor, straight on the device.

    Up to here every weight is a shape on the meta device. A checkpoint streams from its safetensors files
    through Hugging Face's own key conversion; random weights are drawn from their seed on the device;
    computed buffers (rotary frequencies) are rebuilt; tied weights stay one tensor. Parameters that the graph
    does not read are not loaded. Without weights the pass is skipped and later passes run on shapes.

        before: get_attr model.norm.weight -> meta bf16 [4096]
        after:  get_attr model.norm.weight -> cuda:0 bf16 [4096]
    """

    key = "load_weights"
    stage = Stage.WEIGHT_LOAD
    Config: ClassVar[type[PassConfig]] = LoadWeightsConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Load; raises CheckpointError, ModelError (the Workbench has checked memory before)."""
        factory = ctx.factory
        if factory.weights == "none":
            return PassInfo(skipped=True, reason=factory.why_no_weights)
        if factory.weights == "checkpoint":
            fit = factory.check_checkpoint()
            if fit.unexpected or fit.made or fit.untied:
                ctx.report(repr(fit))
        loaded = load_graph_tensors(
            gm, factory, None, ctx.device, lambda done, total: ctx.progress(done, total, "loading")
        )
        ctx.report(
            f"{loaded.tensors} tensors, {human(loaded.bytes)} from {_origin(factory)} to {ctx.device} "
            f"in {loaded.seconds:.2f} s"
        )
        details = {
            "weights": factory.weights, "tensors": loaded.tensors, "bytes": loaded.bytes,
            "seconds": round(loaded.seconds, 3), "tied": loaded.tied, "constants": loaded.constants,
        }  # fmt: skip
        return PassInfo(num_matches=loaded.tensors, details=details)


def _origin(factory: object) -> str:
    weights = getattr(factory, "weights", "")
    return (
        f"seed {getattr(factory, 'seed', 0)}"
        if weights == "random"
        else str(getattr(factory, "directory", ""))
    )
