"""``pipeline_cache``: the graph at this point of the pipeline, kept on disk for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch.fx import GraphModule

from adkit.contract import CachePool, CacheSpec
from adkit.graph.serialize import SnapshotReader, SnapshotWriter
from adkit.graph.snapshot import Snapshot, take
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.registry import register


class PipelineCacheConfig(PassConfig):
    """Where the cache lives."""

    stage: Stage = Field(Stage.PATTERN_MATCHER, description="Where in the pipeline to save and restore")
    enabled: bool = Field(False, description="Use the cache")
    skip_on_error: bool = Field(True, description="Go on without the cache when it cannot be written")
    root: str = Field(".adkit_cache", description="Folder of the cache")


@register
class PipelineCache(Pass):
    """Save the graph here, and start the next run of the same model and settings from it.

    What is saved is the graph as JSON and its small constants as safetensors: no weights, no pickle, no code. The
    key covers the model's config, every transform before this point, and the versions of adkit, torch and
    transformers. Worth it for the export of a large model (about 16 s at 32 layers), which then takes a second.

        first run: build_model, export_to_gm, ..., pipeline_cache (saved), ...
        next run:  pipeline_cache (restored), ...
    """

    key = "pipeline_cache"
    stage = Stage.PATTERN_MATCHER
    Config: ClassVar[type[PassConfig]] = PipelineCacheConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Write the entry unless it is there."""
        folder = self.entry(ctx.fingerprint)
        if (folder / "graph.json").is_file():
            return PassInfo(num_matches=0, details={"entry": folder.name, "already there": True})
        write_entry(folder, gm, ctx)
        return PassInfo(num_matches=1, details={"entry": folder.name})

    def entry(self, fingerprint: str) -> Path:
        """The folder of the entry for a pipeline up to here."""
        return Path(self.config.root) / fingerprint


def fingerprint(ctx: Context, before: list[Pass]) -> str:
    """Hash of all that decides the graph: model config, dtype, settings, transforms so far, versions."""
    import transformers

    import adkit

    data = {
        "model": ctx.factory.config.to_json_string(use_diff=False),
        "dtype": str(ctx.factory.dtype),
        "engine": ctx.engine.model_dump(),
        "transforms": [(p.key, type(p).__qualname__, p.config.model_dump(mode="json")) for p in before],
        "versions": (adkit.__version__, torch.__version__, transformers.__version__),
        "weights": ctx.weights,
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:20]


def write_entry(folder: Path, gm: GraphModule, ctx: Context) -> None:
    """Write graph, constants and cache layout, whole or not at all."""
    snapshot = take(gm)
    writer = SnapshotWriter()
    rows = writer.add(snapshot)
    owned = set(ctx.factory.tensors)
    recipes: dict[str, Any] = gm.meta.get("adkit_weights", {})
    constants = {
        n.target: _tensor(gm, n.target).detach().cpu().contiguous()
        for n in snapshot
        if n.op == "get_attr" and n.target not in owned and n.target not in recipes
    }
    specs = [] if ctx.caches is None else [[s.name, list(s.page_shape), str(s.dtype)] for s in ctx.caches.specs]
    data = {"graphs": writer.payload(), "rows": rows, "recipes": {k: list(v) for k, v in recipes.items()}, "specs": specs}
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    (temporary / "graph.json").write_text(json.dumps(data), encoding="utf-8")
    save_file(constants, str(temporary / "constants.safetensors"))
    os.replace(temporary, folder)


def read_entry(folder: Path, ctx: Context) -> tuple[Snapshot, torch.nn.Module, CachePool | None]:
    """The graph saved in ``folder``: its snapshot, a module with its constants (weights on meta), its caches."""
    from adkit.passes.pipeline import put_tensor

    data = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    snapshot = SnapshotReader(data["graphs"]).snapshot(data["rows"])
    holder = torch.nn.Module()
    for name, tensor in load_file(str(folder / "constants.safetensors")).items():
        put_tensor(holder, name, tensor)
    holder.meta = {"adkit_weights": {k: tuple(v) for k, v in data["recipes"].items()}}  # type: ignore[assignment]
    specs = tuple(CacheSpec(n, tuple(s), getattr(torch, d.removeprefix("torch."))) for n, s, d in data["specs"])
    return snapshot, holder, CachePool(specs, ctx.engine.page_size) if specs else None


def _tensor(gm: GraphModule, path: str) -> torch.Tensor:
    at: Any = gm
    for part in path.split("."):
        at = getattr(at, part)
    return at  # type: ignore[no-any-return]
