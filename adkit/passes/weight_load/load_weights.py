"""``load_weights``: the graph's tensors get their data."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch.fx import GraphModule

from adkit.graph.step import PassInfo
from adkit.models.factory import ModelFactory
from adkit.models.loading import LOCAL, graph_memory, graph_tensor_names, load_graph_tensors
from adkit.models.memory import human, limited
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.registry import register


class LoadWeightsConfig(PassConfig):
    """Common fields; memory grows."""

    run_graph_cleanup: bool = Field(False, description="Loading changes no node")
    requires_clean_graph: bool = Field(False, description="Loading reads no node but get_attr")
    expect_mem_change: bool = Field(True, description="Weights arrive on the device")
    force: bool = Field(
        False, description="Load although the memory estimate says that the model does not fit"
    )


@register
class LoadWeights(Pass):
    """Fill the graph's parameters and buffers, tensor by tensor, straight on the device.

    Up to here every weight is a shape on the meta device. A checkpoint streams from its safetensors files
    through Hugging Face's own key conversion; random weights are drawn from their seed on the device;
    computed buffers (rotary frequencies) are rebuilt; tied weights stay one tensor. Parameters that the graph
    does not read are not loaded, and of a rank's graph only the rank's part is read. Without weights the pass is
    skipped and later passes run on shapes.

        before: get_attr model.norm.weight -> meta bf16 [4096]
        after:  get_attr model.norm.weight -> cuda:0 bf16 [4096]
    """

    key = "load_weights"
    stage = Stage.WEIGHT_LOAD
    Config: ClassVar[type[PassConfig]] = LoadWeightsConfig
    loads = True

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Load what is not there yet; raises MemoryLimitError before reading, CheckpointError, ModelError."""
        factory = ctx.factory
        if factory.weights == "none":
            return PassInfo(skipped=True, reason=factory.why_no_weights)
        unexpected: list[str] = []
        if factory.weights == "checkpoint":
            fit = factory.check_checkpoint()
            unexpected = fit.unexpected
            if unexpected and ctx.dist.rank == 0:  # every rank sees the same files
                warnings.warn(_no_place(factory, unexpected), stacklevel=2)
            if fit.unexpected or fit.made or fit.untied:
                ctx.report(repr(fit))
        if not self.config.force:
            estimate = (
                graph_memory(gm, factory, ctx.engine, ctx.device)
                if LOCAL in gm.meta
                else factory.memory_estimate(ctx.engine, ctx.device)
            )
            here = sum(factory.tensors[n].nbytes for n in ctx.loaded if n in factory.tensors)
            replace(estimate, free=estimate.free + here).require()
        names = [n for n in graph_tensor_names(gm) if n not in ctx.loaded]
        with limited("to load the weights", ctx.device, "use a smaller dtype or another device"):
            loaded = load_graph_tensors(
                gm, factory, names, ctx.device, lambda done, total: ctx.progress(done, total, "loading")
            )
        if ctx.loaded:
            ctx.report(f"{len(ctx.loaded)} tensors were loaded before and not changed since")
        ctx.report(
            f"{loaded.tensors} tensors, {human(loaded.bytes)} from {_origin(factory)} to {ctx.device} "
            f"in {loaded.seconds:.2f} s"
        )
        details = {
            "weights": factory.weights, "tensors": loaded.tensors, "bytes": loaded.bytes,
            "seconds": round(loaded.seconds, 3), "tied": loaded.tied, "constants": loaded.constants,
            "unexpected": unexpected,
        }  # fmt: skip
        return PassInfo(num_matches=loaded.tensors, details=details)


def _no_place(factory: ModelFactory, names: list[str], shown: int = 4) -> str:
    """What to say of stored tensors that the model has no place for: how many, and the first few."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return (
        f"{factory.name}: the model has no place for {len(names)} of the checkpoint's tensors "
        f"({', '.join(names[:shown])}{more}), which are not loaded: the text may be wrong; check that config.json "
        "and the weights belong together"
    )


def _origin(factory: ModelFactory) -> str:
    """Where tensors come from, without the machine's paths: reports are passed on."""
    return f"seed {factory.seed}" if factory.weights == "random" else f"the checkpoint of {factory.name}"
