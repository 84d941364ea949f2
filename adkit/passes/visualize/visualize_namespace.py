"""``visualize_namespace``: the graph as pictures on disk."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field
from torch.fx import GraphModule

from adkit.graph.snapshot import take
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.registry import register


class VisualizeConfig(PassConfig):
    """Where the pictures go."""

    enabled: bool = Field(False, description="Draw")
    output_dir: str = Field("graphs", description="Folder for the pictures")


@register
class VisualizeNamespace(Pass):
    """Write the graph as it stands as a picture, repeated layers folded, and as a readable program.

    Needs graphviz's ``dot`` for the picture; without it only the program is written. The graph does not change.

        graphs/<model>.svg, graphs/<model>.py.txt
    """

    key = "visualize_namespace"
    stage = Stage.VISUALIZE
    Config: ClassVar[type[PassConfig]] = VisualizeConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Draw to files."""
        from adkit.viz import draw

        folder = Path(self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / ctx.factory.name.replace("/", "--")
        snapshot = take(gm)
        Path(f"{stem}.py.txt").write_text(snapshot.code(), encoding="utf-8")
        picture = draw(snapshot)
        details = {"program": f"{stem.name}.py.txt"}
        try:
            picture.save(f"{stem}.svg")
            details["picture"] = f"{stem.name}.svg"
        except RuntimeError as error:
            ctx.report(str(error))
        return PassInfo(num_matches=0, details=details)
