"""Values laid over a graph's nodes: a mapping from node ids to numbers or words, as the record keeps it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, Literal

from adkit.viz.record.format import Overlay
from adkit.viz.record.read import RecordError


def overlay(
    name: str,
    values: Mapping[int, Any],
    *,
    unit: str = "",
    note: str = "",
    step: int = -1,
    scale: Literal["linear", "log", "diverging"] = "linear",
) -> Overlay:
    """An overlay of ``{node id: number}`` or ``{node id: word}``; NaN and None say that nothing is known.

    Raises RecordError for other keys or values.
    """
    known = {i: v for i, v in values.items() if v is not None}
    if not all(isinstance(i, int) and i >= 0 for i in known):
        raise RecordError(f"overlay {name!r}: keys must be node ids (whole numbers, as in wb.graph)")
    if known and all(isinstance(v, str) for v in known.values()):
        words = list(dict.fromkeys(known.values()))
        index = {w: float(k) for k, w in enumerate(words)}
        return Overlay(
            name=name, unit=unit, note=note, step=step, scale="words", words=words,
            ids=list(known), values=[index[v] for v in known.values()],
        )  # fmt: skip
    if not all(isinstance(v, numbers.Real) for v in known.values()):
        raise RecordError(f"overlay {name!r}: values must be all numbers or all words")
    finite = {i: float(v) for i, v in known.items() if math.isfinite(v)}
    return Overlay(
        name=name,
        unit=unit,
        note=note,
        step=step,
        scale=scale,
        ids=list(finite),
        values=list(finite.values()),
    )


__all__ = ["overlay"]
