"""What the fusion passes share: the backend field, and swapping one op for a backend's."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch.fx import GraphModule

from adkit.graph.step import PassInfo
from adkit.ops import OPS
from adkit.ops.backends import pick
from adkit.passes.base import Context, Pass, PassConfig, Stage

IN_PLACE = "reference backend already in place"


class BackendConfig(PassConfig):
    """Fusions into kernels name the kernels' backend."""

    backend: Literal["auto", "torch", "triton"] = Field(
        "auto", description="Kernels to use; auto: triton where the device has it, else the torch reference"
    )


def every(op: str) -> set[Any]:
    """The overloads of an op on all backends (``rmsnorm``: torch_rmsnorm, triton_rmsnorm...)."""
    return {info.overload for name, info in OPS.items() if name == f"{info.backend}_{op}"}


def swap(gm: GraphModule, of: Pass, op: str, backend: str, ctx: Context) -> PassInfo:
    """Point every call of the canonical ``op`` at the backend's, arguments unchanged."""
    old = pick(op, "torch")
    found = [n for n in gm.graph.nodes if n.target is old]
    if not found:
        return PassInfo()
    new = pick(op, backend, ctx.device)
    if new is old:
        return PassInfo(skipped=True, reason=IN_PLACE)
    for node in found:
        with of.site(gm, [node], label=op, before=node) as s:
            s.replace(node, s.call(new, node.args, node.kwargs, like=node))
    return PassInfo(num_matches=len(found))


class SwapBackend(Pass):
    """Calls of canonical ops go to the same ops of the configured backend; subclasses name the ops."""

    stage = Stage.POST_LOAD_FUSION
    Config: ClassVar[type[PassConfig]] = BackendConfig
    ops: ClassVar[tuple[str, ...]]

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Swap every op that is there."""
        infos = [swap(gm, self, op, self.config.backend, ctx) for op in self.ops]
        matches = sum(info.num_matches for info in infos)
        if matches == 0 and any(info.skipped for info in infos):
            return PassInfo(skipped=True, reason=IN_PLACE)
        return PassInfo(num_matches=matches)
