"""Values laid over a graph's nodes: a mapping from nodes to numbers or words, as the record keeps it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Literal, SupportsFloat

from adkit.graph.snapshot import NodeRecord
from adkit.graph.times import NodeTimes
from adkit.viz.record.format import Overlay
from adkit.viz.record.read import RecordError


def overlay(
    name: str,
    values: Mapping[Any, Any] | NodeTimes | Overlay,
    *,
    unit: str = "",
    note: str = "",
    step: int = -1,
    scale: Literal["linear", "log", "diverging"] = "linear",
) -> Overlay:
    """An overlay of ``{node: number}`` or ``{node: word}``: a node is its id, or its record (``for n in wb.graph``).

    NaN and None say that nothing is known. A profile (``wb.profile()``) becomes the measured time of each node;
    an overlay (``wb.errors()``) keeps what it is under the new name. Raises RecordError for other keys or values.
    """
    if isinstance(values, Overlay):
        return values.model_copy(update={"name": name})
    if isinstance(values, NodeTimes):
        micro = {i: s * 1e6 for i, s in values.seconds.items()}
        told = note or f"measured: {values.batch}, {values.where}"
        return overlay(name, micro, unit=unit or "us", note=told, step=step, scale=scale)
    if not isinstance(values, Mapping):
        raise RecordError(
            f"overlay {name!r} is a {type(values).__name__}; expected {{node: number or word}}, as in "
            "{n.id: 1.0 for n in wb.graph}, a profile or an overlay"
        )
    known = {_id(name, n): v for n, v in values.items() if v is not None}
    facts: dict[str, Any] = {"name": name, "unit": unit, "note": note, "step": step}
    if known and all(isinstance(v, str) for v in known.values()):
        words = list(dict.fromkeys(known.values()))
        index = {w: float(k) for k, w in enumerate(words)}
        places = [index[v] for v in known.values()]
        return Overlay(**facts, scale="words", words=words, ids=list(known), values=places)
    finite = {i: x for i, v in known.items() if math.isfinite(x := _number(name, v))}
    return Overlay(**facts, scale=scale, ids=list(finite), values=list(finite.values()))


def as_overlays(given: Mapping[str, Any] | Iterable[Overlay] | Overlay) -> list[Overlay]:
    """Overlays by name (as :func:`overlay` takes them), or some that are made already; RecordError for others."""
    if isinstance(given, Overlay):
        return [given]
    if isinstance(given, Mapping):
        return [overlay(name, values) for name, values in given.items()]
    made = list(given)
    for one in made:
        if not isinstance(one, Overlay):
            raise RecordError(
                f"an overlay without a name is a {type(one).__name__}; give a mapping: {{name: {{node: value}}}}"
            )
    return made


def _id(name: str, node: Any) -> int:
    if isinstance(node, NodeRecord):
        return node.id
    if isinstance(node, numbers.Integral) and not isinstance(node, bool) and int(node) >= 0:
        return int(node)
    raise RecordError(
        f"overlay {name!r} has the key {node!r}; keys are nodes of wb.graph or their ids; "
        "an explorer's add_overlay takes names and torch.fx nodes, too"
    )


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, SupportsFloat) and not isinstance(value, str):
            return float(value)
    except (ValueError, TypeError, RuntimeError):  # a tensor of several numbers
        pass
    raise RecordError(f"overlay {name!r} has the value {value!r}; values are all numbers or all words")


__all__ = ["as_overlays", "overlay"]
