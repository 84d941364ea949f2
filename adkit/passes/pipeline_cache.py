"""``pipeline_cache``: the graph at this point of the pipeline, kept on disk for the next run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch.fx import GraphModule

from adkit.contract import CachePool, CacheSpec, LocalWeight
from adkit.graph.serialize import SnapshotReader, SnapshotWriter
from adkit.graph.snapshot import Snapshot, take
from adkit.graph.step import PassInfo
from adkit.models.loading import FUSED, LOCAL
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.records import as_data, from_data, records_of
from adkit.passes.registry import register
from adkit.passes.tensors import put_tensor, tensor_at

_LOG = logging.getLogger(__name__)
CONSTANT = "adkit_constant"  # the mark that export puts on nodes reading tensors it lifted out of the forward


class PipelineCacheConfig(PassConfig):
    """Where the cache lives."""

    stage: Stage = Field(Stage.PATTERN_MATCHER, description="Where in the pipeline to save and restore")
    enabled: bool = Field(False, description="Use the cache")
    skip_on_error: bool = Field(True, description="Go on without the cache when it cannot be written")
    root: str = Field(".adkit_cache", description="Folder of the cache")


@register
class PipelineCache(Pass):
    """Save the graph here, and start the next run of the same model and settings from it.

    What is saved is the graph as JSON and its small constants as safetensors: no weights, no pickle, no
    code. The key covers the model's config, every transform before this point, and the versions of adkit,
    torch and transformers. Worth it for the export of a large model (about 16 s at 32 layers), which then
    takes a second.

        first run: build_model, export_to_gm, ..., pipeline_cache (saved), ...
        next run:  pipeline_cache (restored), ...
    """

    key = "pipeline_cache"
    stage = Stage.PATTERN_MATCHER
    Config: ClassVar[type[PassConfig]] = PipelineCacheConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Write the entry unless it is there."""
        folder = self._entry(ctx)
        known = {n.target for n in gm.graph.nodes if n.op == "get_attr"} & set(ctx.factory.tensors)
        changed = [n for n in known - ctx.loaded if not _tensor(gm, n).is_meta]
        if changed:
            which = f"{len(changed)} weights ({min(changed)})"
            reason = f"an earlier step changed the data of {which}, which is not stored here"
            return PassInfo(skipped=True, reason=reason)
        if folder in self._unreadable:
            ctx.report(
                f"entry {folder.name} could not be read and is written again: {self._unreadable.pop(folder)}"
            )
            shutil.rmtree(folder, ignore_errors=True)
        if (folder / "graph.json").is_file():
            return PassInfo(num_matches=0, details={"entry": folder.name, "already there": True})
        write_entry(folder, gm, ctx)
        return PassInfo(num_matches=1, details={"entry": folder.name})

    def find(self, ctx: Context) -> tuple[Snapshot, torch.nn.Module, CachePool | None] | None:
        """The entry for the context's fingerprint, or None: there is none, or it cannot be read (logged)."""
        folder = self._entry(ctx)
        if not (folder / "graph.json").is_file():
            return None
        try:
            return read_entry(folder, ctx)
        except Exception as error:  # a damaged file can fail in any way; the graph is then made anew
            self._unreadable[folder] = f"{type(error).__name__}: {error}"
            _LOG.warning(
                "pipeline cache entry %s cannot be read (%s); running every step instead", folder.name, error
            )
            return None

    def __init__(self, config: PassConfig | dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self._unreadable: dict[Path, str] = {}

    def _entry(self, ctx: Context) -> Path:
        return Path(self.config.root) / ctx.fingerprint


def fingerprint(ctx: Context, before: list[Pass]) -> str:
    """Hash of all that decides the graph: model config, dtype, settings, transforms so far and their code,
    versions."""
    import transformers

    data = {
        "model": ctx.factory.config.to_json_string(use_diff=False),
        "lean": ctx.factory.lean,
        "tied": sorted(ctx.factory.tied.items()),
        "dtype": str(ctx.factory.dtype),
        "engine": ctx.engine.model_dump(),
        # Until the model is cut all ranks have the same graph, and share an entry.
        "dist": ctx.dist.model_dump() if any(p.config.stage == Stage.SHARDING for p in before) else None,
        "transforms": [(p.key, _code_of(type(p)), p.config.model_dump(mode="json")) for p in before],
        "versions": (_package_hash(), torch.__version__, transformers.__version__),
        "weights": ctx.weights,
    }
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:20]


@cache
def _package_hash() -> str:
    """Hash of adkit's own sources, which says more than its version while it is being worked on."""
    import adkit

    package = Path(adkit.__file__).parent
    digest = hashlib.sha256(adkit.__version__.encode())
    for file in sorted(package.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _code_of(cls: type[Pass]) -> str:
    """What a pass of the user's does: its class's functions as bytecode (adkit's own are in the package's
    hash)."""
    if cls.__module__.startswith("adkit."):
        return f"{cls.__module__}.{cls.__qualname__}"
    digest = hashlib.sha256(cls.__qualname__.encode())

    def add(code: Any) -> None:
        digest.update(code.co_code)
        digest.update(repr(code.co_names).encode())
        for constant in code.co_consts:
            add(constant) if hasattr(constant, "co_code") else digest.update(repr(constant).encode())

    for name, member in sorted(vars(cls).items()):
        code = getattr(getattr(member, "__func__", member), "__code__", None)
        if code is not None:
            digest.update(name.encode())
            add(code)
    return digest.hexdigest()


def write_entry(folder: Path, gm: GraphModule, ctx: Context) -> None:
    """Write graph, constants and cache layout, whole or not at all."""
    snapshot = take(gm)
    writer = SnapshotWriter()
    rows = writer.add(snapshot)
    local: dict[str, LocalWeight] = gm.meta.get(LOCAL, {})
    owned = {*ctx.factory.tensors, *local}
    records = records_of(gm)
    recipes = records.get(FUSED, {})
    constants = {
        n.target: _tensor(gm, n.target).detach().cpu().contiguous()
        for n in snapshot
        if n.op == "get_attr" and n.target not in owned and n.target not in recipes
    }
    specs = (
        [] if ctx.caches is None else [[s.name, list(s.page_shape), str(s.dtype)] for s in ctx.caches.specs]
    )
    pages = 0 if ctx.caches is None else ctx.caches.num_pages
    data = {
        "graphs": writer.payload(), "rows": rows, **as_data(records), "specs": specs, "pages": pages,
    }  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
    try:
        (temporary / "graph.json").write_text(json.dumps(data), encoding="utf-8")
        save_file(constants, str(temporary / "constants.safetensors"))
        os.replace(temporary, folder)
    except OSError:
        if not (folder / "graph.json").is_file():  # else another process was faster, with the same content
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_entry(folder: Path, ctx: Context) -> tuple[Snapshot, torch.nn.Module, CachePool | None]:
    """The graph saved in ``folder``: its snapshot, a module with its constants (weights on meta), its
    caches."""
    data = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    snapshot = SnapshotReader(data["graphs"]).snapshot(data["rows"])
    holder = torch.nn.Module()
    constants = load_file(str(folder / "constants.safetensors"))
    for name, tensor in constants.items():
        put_tensor(holder, name, tensor)
    records = from_data(data)
    owned = {*ctx.factory.tensors, *records.get(LOCAL, {})}
    for n in snapshot:
        if n.op == "get_attr":
            n.meta[CONSTANT] = n.target in constants
            if not (n.target in constants or n.target in owned or n.target in data["recipes"]):
                raise ValueError(f"the graph reads {n.target}, which neither the entry nor the model has")
    holder.meta = records  # type: ignore[assignment]
    specs = tuple(
        CacheSpec(n, tuple(s), getattr(torch, d.removeprefix("torch."))) for n, s, d in data["specs"]
    )
    if not specs:
        return snapshot, holder, None
    pool = CachePool(specs, ctx.engine.page_size)
    if data["pages"]:
        pool.allocate(data["pages"], torch.device("meta") if ctx.weights == "none" else ctx.device)
    return snapshot, holder, pool


def _tensor(gm: GraphModule, path: str) -> torch.Tensor:
    tensor = tensor_at(gm, path)
    assert tensor is not None, path
    return tensor
