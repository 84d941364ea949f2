"""A Workbench's walk as a record: what the pipeline alone knows (versions, pass sources, fused weights) added
to what its steps tell. The format and everything that draws it live in :mod:`adkit.viz`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
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
from adkit.viz.record.format import Overlay, PassSource
from adkit.viz.record.overlays import overlay

if TYPE_CHECKING:
    from adkit.workbench import Workbench

#: The device that costs are told for, where nothing else is asked.
DEVICE = "H100 SXM"


def writer(wb: Workbench) -> RecordWriter:
    """A record of ``wb`` in its light form: heads, rows, graphs; the rest is made when asked for."""
    import adkit

    made = RecordWriter(wb.steps, {p.key: found for p in wb._passes if (found := pass_source(p)) is not None})
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
    """Write ``wb``'s whole record; ``overlays`` by name: ``{node id: number or word}``.

    ``device`` names the device of :data:`adkit.graph.cost.DEVICES` whose roofline the costs are told for.
    """
    made = writer(wb)
    try:
        made.costs(device_named(device))
        made.record.overlays = as_overlays(overlays)
        return dump_record(made.complete(), path)
    except RecordError as error:
        raise AdkitError(str(error)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def as_overlays(given: Mapping[str, Any] | Iterable[Overlay]) -> list[Overlay]:
    """Overlays of a user's mapping ``name -> {node id: value}``; those made already are passed on."""
    if not isinstance(given, Mapping):
        return list(given)
    return [v if isinstance(v, Overlay) else overlay(name, v) for name, v in given.items()]


def pass_source(p: Pass) -> PassSource | None:
    """The file of a pass and its code from the imports on, its patterns included; None where there is none."""
    try:
        module = inspect.getmodule(type(p))
        inside = module is not None and module.__name__.startswith("adkit.")
        code = inspect.getsource(module if inside and module is not None else type(p))
        _, line = inspect.getsourcelines(type(p))
    except (OSError, TypeError):
        return None
    file = type(p).__module__.replace(".", "/") + ".py" if inside else Path(inspect.getfile(type(p))).name
    return PassSource(file=file, line=line, code=code)


__all__: Sequence[str] = ["DEVICE", "as_overlays", "pass_source", "write_record", "writer"]
