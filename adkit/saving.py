"""A run on disk: one JSON file with the config, every step, the graphs, and how weights were fused and cut; no weights,
no pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from adkit.contract import AdkitError, LocalWeight
from adkit.graph.edit import SiteRecord
from adkit.graph.placement import PLAN, ShardingPlan
from adkit.graph.serialize import SnapshotReader, SnapshotWriter, portable
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import PassInfo, Step, Steps
from adkit.models.loading import FUSED, LOCAL
from adkit.passes.records import as_data, from_data
from adkit.viz.files import write_atomically

if TYPE_CHECKING:
    from adkit.workbench import Workbench

FORMAT = 1


@dataclass
class SavedRun:
    """What was saved of a Workbench: look at steps, diffs and graphs; nothing in it can be run.

    Of a rank's Workbench also how the model was cut: ``plan``, which ``wb.shard(plan=...)`` takes, and ``local``, which
    part of the checkpoint's weight stands under each name. ``fused``: weight -> the names that it was made of.
    """

    name: str
    config: str
    versions: dict[str, str]
    steps: Steps
    graph: Snapshot
    plan: ShardingPlan | None = None
    local: dict[str, LocalWeight] = field(default_factory=dict)
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __repr__(self) -> str:
        versions = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        cut = "" if self.plan is None else f"\n{self.plan.summary}"
        return f"SavedRun of {self.name!r} ({versions}){cut}\n{self.steps!r}"


def save(wb: Workbench, path: str | Path) -> Path:
    """Write ``wb``'s run to ``path``, whole or not at all."""
    import adkit

    writer = SnapshotWriter()
    steps = []
    for s in wb.steps:
        try:
            before, after = writer.add(s.before), writer.add(s.after)
        except TypeError as error:
            raise AdkitError(
                f"step {s.name!r} cannot be saved: {error}; make the function an operator with torch.library"
            ) from error
        steps.append(
            {
                "name": s.name,
                "stage": s.stage,
                "config": _plain(s.config),
                "doc": s.doc,
                "status": s.status,
                "log": _plain(s.log),
                "altered": list(s.altered),
                "before": before,
                "after": after,
                "info": _plain(asdict(s.info)),
                "sites": [
                    {"label": r.label, "matched": list(r.matched), "created": list(r.created)}
                    for r in s.sites
                ],
                "seconds": s.seconds,
                "record_seconds": s.record_seconds,
                "memory_bytes": s.memory_bytes,
            }
        )
    data = {
        "adkit_run": FORMAT,
        "name": portable(wb.name),
        "config": portable(wb.config.to_yaml()),
        "versions": {
            "adkit": adkit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "graphs": writer.payload(),
        "steps": steps,
        "records": as_data(wb._state.records),
    }
    return write_text(path, json.dumps(data, separators=(",", ":")))


def load(path: str | Path) -> SavedRun:
    """Read a saved run; AdkitError when the file is not one."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AdkitError(f"no saved run at {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AdkitError(f"{str(path)!r} cannot be read as a saved run: {error}") from None
    try:
        data = json.loads(text)
        if "adkit_record" in data:
            raise AdkitError(
                f"{path.name} is a record, which wb.record writes for pictures: adkit.viz.load_record and `adkit view` "
                "read it; what Workbench.load reads is written by wb.save"
            )
        version = data["adkit_run"]
        reader = SnapshotReader(data["graphs"]) if version == FORMAT else None
        steps = [] if reader is None else [_step(s, reader) for s in data["steps"]]
        # Runs of earlier versions have no records.
        records = from_data(data["records"]) if "records" in data else {}
        run = SavedRun(
            data["name"], data["config"], data["versions"], Steps(steps), Snapshot(), records.get(PLAN),
            records.get(LOCAL, {}), records.get(FUSED, {}),
        )  # fmt: skip
    except AdkitError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise AdkitError(
            f"{path.name} is not a run that this version of adkit can read ({type(error).__name__}: "
            f"{error}); "
            "it may be cut short or of another program: save it again"
        ) from error
    if version != FORMAT:
        raise AdkitError(f"{path.name} was saved in format {version}; this version of adkit reads {FORMAT}")
    run.graph = next((s.after for s in reversed(steps) if len(s.after)), Snapshot())
    return run


def _step(s: dict[str, Any], reader: SnapshotReader) -> Step:
    sites = tuple(SiteRecord(r["label"], tuple(r["matched"]), [], tuple(r["created"])) for r in s["sites"])
    before = reader.snapshot(s["before"])
    after = before if s["before"] == s["after"] else reader.snapshot(s["after"])
    return Step(
        name=s["name"],
        stage=s["stage"],
        config=s["config"],
        doc=s["doc"],
        status=s["status"],
        before=before,
        after=after,
        info=PassInfo(**s["info"]),
        sites=sites,
        seconds=s["seconds"],
        record_seconds=s["record_seconds"],
        memory_bytes=s["memory_bytes"],
        log=s["log"],
        altered=tuple(s["altered"]),
    )


def _plain(v: Any) -> Any:
    if isinstance(v, dict):
        return {str(k): _plain(x) for k, x in v.items()}
    if isinstance(v, (list, tuple)):
        return [_plain(x) for x in v]
    if isinstance(v, (int, float, bool, type(None))):
        return v
    return portable(str(v))


def write_text(path: str | Path, text: str) -> Path:
    """Write a file whole or not at all, as :func:`adkit.viz.files.write_atomically` does; raises AdkitError."""
    path = Path(path)
    folder = path.resolve().parent
    if not folder.is_dir():
        raise AdkitError(f"cannot write {str(path)!r}: the folder {str(folder)!r} does not exist")
    if path.is_dir():
        raise AdkitError(f"cannot write {str(path)!r}: it is a folder; give a file name in it")
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise AdkitError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
    return path
