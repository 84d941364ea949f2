"""A Workbench's walk as a record: what the pipeline alone knows (versions, pass sources, fused weights) added
to what its steps tell. The format and everything that draws it live in :mod:`adkit.viz`.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from adkit.contract import AdkitError, ConfigError
from adkit.graph.cost import Device, device_named
from adkit.graph.serialize import portable
from adkit.models.loading import FUSED
from adkit.passes import Pass
from adkit.viz.record import RecordError, RecordWriter, dump_record
from adkit.viz.record.format import Overlay, PassSource, Record
from adkit.viz.record.overlays import as_overlays

if TYPE_CHECKING:
    from adkit.viz.explorer import Explorer
    from adkit.workbench import Workbench

#: The device that costs are told for, where nothing else is asked.
DEVICE = "H100 SXM"


def writer(wb: Workbench) -> RecordWriter:
    """A record of ``wb`` in its light form: heads, rows, graphs; the rest is made when asked for."""
    import adkit

    sources = {p.key: found for p in wb._passes if (found := pass_source(p)) is not None}
    made = RecordWriter(wb.steps, sources, wb.growing.walked)
    record = made.record
    record.name = portable(wb.name)
    record.about = {
        "class": type(wb.factory.config).__name__,
        "dtype": str(wb.factory.dtype).removeprefix("torch."),
        "device": str(wb.device),
        "weights": wb.factory.weights,
    }
    record.versions = {
        "adkit": adkit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    record.config = portable(wb.config.to_yaml())
    recipes = getattr(wb._state.module, "meta", {}).get(FUSED, {})
    record.weights = {name: list(parts) for name, parts in recipes.items()}
    return made


def write_record(
    wb: Workbench,
    path: str | Path,
    *,
    overlays: Mapping[str, Any] | Iterable[Overlay] = (),
    device: Device | str = DEVICE,
) -> Path:
    """Write ``wb``'s whole record; ``overlays`` by name: ``{node: number or word}``, profiles, ``wb.errors()``.

    ``device`` names the device of :data:`adkit.graph.cost.DEVICES` whose roofline the costs are told for.
    """
    record = whole(wb, overlays, device)
    with _writing(path):
        return dump_record(record, path)


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """What keeps a file from being written, as AdkitError."""
    try:
        yield
    except RecordError as error:
        raise AdkitError(str(error)) from None
    except OSError as error:
        why = "it is a folder; give a file name in it" if Path(path).is_dir() else error.strerror or error
        raise AdkitError(f"cannot write {str(path)!r}: {why}") from None


def whole(wb: Workbench, overlays: Mapping[str, Any] | Iterable[Overlay], device: Device | str) -> Record:
    """The whole record of ``wb``; ConfigError for an unknown device or overlays that are none."""
    made = writer(wb)
    try:
        made.costs(device_named(device))
        made.record.overlays = as_overlays(overlays)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return made.complete()


def write_report(
    wb: Workbench,
    path: str | Path,
    completions: Iterable[Any] = (),
    *,
    overlays: Mapping[str, Any] | Iterable[Overlay] = (),
    device: Device | str = DEVICE,
) -> Path:
    """Write the explorer with ``wb``'s walk as one HTML file; ``completions`` are shown below it."""
    from adkit.viz.page import write_page

    record = whole(wb, overlays, device)
    with _writing(path):
        return write_page(record, path, completions=completions)


def explore(
    wb: Workbench, *, overlays: Mapping[str, Any] | Iterable[Overlay] = (), device: Device | str = DEVICE
) -> Explorer:
    """The walk in the explorer, which follows when the Workbench goes on (:mod:`adkit.watching`).

    It opens with what is light; folding, programs, rewrites and costs are made when they are looked at.
    ConfigError for an unknown device or overlays that are none.
    """

    def light() -> RecordWriter:
        made = writer(wb)
        made.device = on
        return made

    with _heap_left_alone():
        from adkit.viz.explorer import Explorer

        try:
            on = device_named(device)
            first = light()
            first.record.overlays = as_overlays(overlays)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        explorer = Explorer(first, again=light)
    wb.watching.add(explorer)
    return explorer


@contextmanager
def _heap_left_alone() -> Iterator[None]:
    """Garbage is looked for among new objects alone: after a large walk one look at all takes 0.4 s, which can wait."""
    if gc.get_freeze_count():  # somebody wants it so for longer
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def pass_source(p: Pass) -> PassSource | None:
    """The file of a pass and its code from the imports on, its patterns included; None where there is none."""
    try:
        module = inspect.getmodule(type(p))
        inside = module is not None and module.__name__.startswith("adkit.")
        if inside and module is not None:  # its line by its name: inspect would parse the module
            code = inspect.getsource(module)
            line = 1 + code[: code.index(f"\nclass {type(p).__name__}(") + 1].count("\n")
        else:
            lines, line = inspect.getsourcelines(type(p))
            code = "".join(lines)
    except (OSError, TypeError, ValueError):
        return None
    file = type(p).__module__.replace(".", "/") + ".py" if inside else Path(inspect.getfile(type(p))).name
    return PassSource(file=file, line=line, code=code)


__all__: Sequence[str] = [
    "DEVICE",
    "explore",
    "pass_source",
    "whole",
    "write_record",
    "write_report",
    "writer",
]
