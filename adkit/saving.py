"""A run on disk: one JSON file with the config, every step, and the graphs; no weights, no pickle."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from adkit.contract import AdkitError
from adkit.graph.edit import SiteRecord
from adkit.graph.serialize import SnapshotReader, SnapshotWriter
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import PassInfo, Step, Steps

if TYPE_CHECKING:
    from adkit.workbench import Workbench


@dataclass
class SavedRun:
    """What was saved of a Workbench: look at steps, diffs and graphs; nothing in it can be run."""

    name: str
    config: str
    versions: dict[str, str]
    steps: Steps
    graph: Snapshot

    def __repr__(self) -> str:
        return f"SavedRun of {self.name!r} ({', '.join(f'{k} {v}' for k, v in self.versions.items())})\n{self.steps!r}"


def save(wb: Workbench, path: str | Path) -> Path:
    """Write ``wb``'s record to ``path``, whole or not at all."""
    import adkit

    writer = SnapshotWriter()
    steps = []
    for s in wb.steps:
        steps.append(
            {
                "name": s.name, "stage": s.stage, "config": s.config, "doc": s.doc, "status": s.status, "log": s.log,
                "before": writer.add(s.before), "after": writer.add(s.after), "info": _plain(asdict(s.info)),
                "sites": [{"label": r.label, "matched": list(r.matched), "created": list(r.created)} for r in s.sites],
                "seconds": s.seconds, "record_seconds": s.record_seconds, "memory_bytes": s.memory_bytes,
            }
        )  # fmt: skip
    data = {
        "adkit_run": 1,
        "name": wb.name,
        "config": wb.config.to_yaml(),
        "versions": {"adkit": adkit.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "graphs": writer.payload(),
        "steps": steps,
    }
    return write_text(path, json.dumps(data, separators=(",", ":")))


def load(path: str | Path) -> SavedRun:
    """Read a record; AdkitError when the file is not one."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        reader = SnapshotReader(data["graphs"])
        steps = [_step(s, reader) for s in data["steps"]]
        version = data["adkit_run"]
    except FileNotFoundError:
        raise AdkitError(f"no saved run at {str(path)!r}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise AdkitError(f"{path.name} is not a run that this version of adkit can read: {error}") from None
    if version != 1:
        raise AdkitError(f"{path.name} was saved in format {version}; this version of adkit reads 1")
    graph = next((s.after for s in reversed(steps) if len(s.after)), Snapshot())
    return SavedRun(data["name"], data["config"], data["versions"], Steps(steps), graph)


def _step(s: dict[str, Any], reader: SnapshotReader) -> Step:
    sites = tuple(SiteRecord(r["label"], tuple(r["matched"]), [], tuple(r["created"])) for r in s["sites"])
    before = reader.snapshot(s["before"])
    after = before if s["before"] == s["after"] else reader.snapshot(s["after"])
    return Step(
        name=s["name"], stage=s["stage"], config=s["config"], doc=s["doc"], status=s["status"], before=before, after=after,
        info=PassInfo(**s["info"]), sites=sites, seconds=s["seconds"], record_seconds=s["record_seconds"],
        memory_bytes=s["memory_bytes"], log=s["log"],
    )  # fmt: skip


def _plain(v: Any) -> Any:
    if isinstance(v, dict):
        return {str(k): _plain(x) for k, x in v.items()}
    if isinstance(v, (list, tuple)):
        return [_plain(x) for x in v]
    return v if isinstance(v, (int, float, str, bool, type(None))) else str(v)


def write_text(path: str | Path, text: str) -> Path:
    """Write a file whole or not at all."""
    path = Path(path)
    folder = path.resolve().parent
    if not folder.is_dir():
        raise AdkitError(f"cannot write {str(path)!r}: the folder {str(folder)!r} does not exist")
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
