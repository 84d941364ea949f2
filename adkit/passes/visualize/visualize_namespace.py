"""``visualize_namespace``: the graph as pictures on disk."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch.fx import GraphModule

from adkit.graph.snapshot import take
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.pipeline import write_graph
from adkit.passes.registry import register


class VisualizeConfig(PassConfig):
    """Where the pictures go."""

    enabled: bool = Field(False, description="Draw")
    output_dir: str = Field("graphs", description="Folder for the pictures")


@register
class VisualizeNamespace(Pass):
    """Write the graph as it stands as a picture, repeated layers folded, and as a readable program.

    Needs graphviz's ``dot`` for the picture; without it only the program is written. The graph does not
    change.

        graphs/<model>.svg, graphs/<model>.py.txt
    """

    key = "visualize_namespace"
    stage = Stage.VISUALIZE
    Config: ClassVar[type[PassConfig]] = VisualizeConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Draw to files."""
        stem = ctx.factory.name.replace("/", "--")
        written = write_graph(take(gm), Path(self.config.output_dir), stem, ctx.report)
        return PassInfo(num_matches=0, details={"written": written})
