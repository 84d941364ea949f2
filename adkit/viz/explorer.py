"""The explorer as a notebook widget: :class:`Explorer` over a record, drawn by ``assets/explorer.js``.

What the reader chooses in the browser is readable here and the other way round (docs/explorer.md). Where no
widget runs (GitHub, nbconvert) the static fallback of :mod:`adkit.viz.page` is shown.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from typing import Any

import anywidget
import traitlets

from adkit.viz.page import asset, static_html
from adkit.viz.record.format import Overlay, Record
from adkit.viz.record.overlays import overlay

MODES = ("graph", "compare", "code")


class Explorer(anywidget.AnyWidget):
    """A walk to look at: timeline, graph, differences, program, node inspector.

    ``step`` and ``against`` are indices of steps (``against`` -1: the graph before ``step``); ``mode`` is graph,
    compare or code; ``selection`` node ids; ``overlay`` an overlay's name or empty. All may be read and set;
    TraitError for what the record does not have.
    """

    _esm = asset("explorer.js")
    _css = asset("explorer.css")

    record = traitlets.Bytes().tag(sync=True)
    step = traitlets.Int(-1).tag(sync=True)
    against = traitlets.Int(-1).tag(sync=True)
    mode = traitlets.Enum(MODES, "graph").tag(sync=True)
    overlay = traitlets.Unicode("").tag(sync=True)
    selection = traitlets.List(traitlets.Int()).tag(sync=True)

    def __init__(self, data: Record, **traits: Any) -> None:
        self.data = data
        self._ids = set(data.nodes.id)
        shown = [k for k, s in enumerate(data.steps) if s.after >= 0 and s.after != s.before]
        traits.setdefault("step", shown[-1] if shown else -1)
        super().__init__(record=_packed(data), **traits)

    @property
    def step_name(self) -> str:
        """Name of the step looked at; empty where there is none."""
        return self.data.steps[self.step].name if self.step >= 0 else ""

    def goto(
        self, step: str | int, node: int | None = None, *, compare_to: str | int | None = None
    ) -> Explorer:
        """Look at a step (name or index, negative from the end), at one node of it, against another step.

        Returns itself. Raises KeyError for an unknown step, TraitError for an unknown node.
        """
        self.step = self._index(step)
        self.against = -1 if compare_to is None else self._index(compare_to)
        if compare_to is not None:
            self.mode = "compare"
        if node is not None:
            self.selection = [node]
        return self

    def add_overlay(self, name: str, values: Mapping[int, Any] | Overlay, **options: Any) -> Explorer:
        """Lay values over the graph, ``{node id: number or word}``, and show them; options as ``overlay`` takes."""
        made = values if isinstance(values, Overlay) else overlay(name, values, **options)
        self.data.overlays = [*(o for o in self.data.overlays if o.name != made.name), made]
        self.record = _packed(self.data)
        self.overlay = made.name
        return self

    def show(self, data: Record) -> None:
        """Take over a record that went on; what is selected stays where it still is."""
        self.data, self._ids = data, set(data.nodes.id)
        self.selection = [i for i in self.selection if i in self._ids]
        self.record = _packed(data)

    def _index(self, step: str | int) -> int:
        names = [s.name for s in self.data.steps]
        if isinstance(step, int):
            if not -len(names) <= step < len(names):
                raise KeyError(f"no step {step}: the record has {len(names)}")
            return step % len(names)
        if step not in names:
            raise KeyError(f"no step {step!r}; steps: {', '.join(names)}")
        return names.index(step)

    @traitlets.validate("step", "against")
    def _known_step(self, proposal: Any) -> int:
        value = int(proposal["value"])
        if not -1 <= value < len(self.data.steps):
            raise traitlets.TraitError(f"no step {value}: the record has {len(self.data.steps)}")
        return value

    @traitlets.validate("selection")
    def _known_nodes(self, proposal: Any) -> list[int]:
        value = list(proposal["value"])
        unknown = [i for i in value if i not in self._ids]
        if unknown:
            raise traitlets.TraitError(f"no node with id {unknown[0]} in this record")
        return value

    def __repr__(self) -> str:
        return f"Explorer({self.data.name!r}, {len(self.data.steps)} steps, at {self.step_name!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        made = super()._repr_mimebundle_(**kwargs)
        bundle, meta = made if isinstance(made, tuple) else (made, {})
        return {**(bundle or {}), "text/plain": repr(self), "text/html": static_html(self.data)}, meta


def _packed(data: Record) -> bytes:
    return gzip.compress(data.model_dump_json().encode(), 3, mtime=0)


__all__ = ["MODES", "Explorer"]
