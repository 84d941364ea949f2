"""The explorer as a notebook widget: :class:`Explorer` over a record, drawn by ``assets/explorer.js``.

What the reader chooses in the browser is readable here and the other way round (docs/explorer.md). A record that is
still being written opens with its light form; the browser asks for the rest. Where no widget runs (GitHub, nbconvert)
the static fallback of :mod:`adkit.viz.static` is shown.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import anywidget
import traitlets
from pydantic import TypeAdapter
from torch.fx import Node

from adkit.graph.diff import RewriteClass, Site
from adkit.graph.snapshot import NodeRecord
from adkit.graph.step import Step
from adkit.graph.times import NodeTimes
from adkit.viz.naming import Naming, nearest
from adkit.viz.page import asset
from adkit.viz.record.format import Costs, Overlay, Record, Rewrite, View
from adkit.viz.record.overlays import overlay
from adkit.viz.record.read import RecordError
from adkit.viz.record.write import RecordWriter
from adkit.viz.static import static_html, walk_svg
from adkit.viz.static_map import Looked

MODES = ("graph", "compare", "code")
#: Side by side at most.
MOST_PANES = 4
_PARTS: dict[str, TypeAdapter[Any]] = {
    "view": TypeAdapter(View),
    "rewrites": TypeAdapter(list[Rewrite]),
    "costs": TypeAdapter(list[Costs]),
}
_OVERLAYS = TypeAdapter(list[Overlay])


class _Nodes(traitlets.List):
    """Node ids; Python may set one node or several, whatever it holds of them (:class:`Explorer` knows which)."""

    def validate(self, obj: Any, value: Any) -> Any:
        several = isinstance(value, Iterable) and not isinstance(value, str)
        return super().validate(obj, list(value) if several else [value])


class Explorer(anywidget.AnyWidget):
    """A walk to look at: timeline, graph, differences, program, node inspector.

    ``step`` and ``against`` are indices of steps (``against`` -1: the graph before ``step``); ``panes`` the steps
    shown side by side (names or indices, 2 to 4; empty: ``against`` and ``step``); ``mode`` is graph, compare or
    code; ``selection`` node ids, set by anything that :meth:`goto` takes; ``overlay`` an overlay's name or empty;
    ``search`` the text searched for; ``unfolded`` the paths of open modules (None: the browser's choice). All
    may be read and set; TraitError for what the record does not have. ``again`` makes the record anew after
    :meth:`tell` said that it went on; ``nodes`` are the ids of the FX nodes that the record was made of.
    """

    _esm = asset("explorer.js")
    _css = asset("explorer.css")

    record = traitlets.Bytes().tag(sync=True)
    overlays = traitlets.Bytes().tag(sync=True)
    parts = traitlets.Bool(False).tag(sync=True)
    edition = traitlets.Int(0).tag(sync=True)
    live = traitlets.Dict().tag(sync=True)
    step = traitlets.Int(-1).tag(sync=True)
    against = traitlets.Int(-1).tag(sync=True)
    panes: Any = traitlets.List().tag(sync=True)
    mode = traitlets.Enum(MODES, "graph").tag(sync=True)
    overlay = traitlets.Unicode("").tag(sync=True)
    search = traitlets.Unicode("").tag(sync=True)
    selection: Any = _Nodes().tag(sync=True)
    unfolded = traitlets.List(traitlets.Unicode(), None, allow_none=True).tag(sync=True)

    def __init__(
        self,
        data: Record | RecordWriter,
        *,
        again: Callable[[], RecordWriter] | None = None,
        nodes: Mapping[Node, int] | None = None,
        **traits: Any,
    ) -> None:
        self._again = again
        self._nodes = nodes
        self._stale = False
        self._take(data)
        traits.setdefault("step", _last_change(self._data))
        self._look_ahead(traits["step"])
        super().__init__(record=_packed(self._data), parts=self._writer is not None, unfolded=None, **traits)
        self.on_msg(self._asked)

    def _take(self, data: Record | RecordWriter) -> None:
        self._writer = data if isinstance(data, RecordWriter) else None
        self._data = data.record if isinstance(data, RecordWriter) else data
        self._naming = Naming(self._data, self._nodes)

    # --- the record, and its parts

    @property
    def data(self) -> Record:
        """The record looked at; of a live walk, without the parts that nobody asked for yet."""
        if self._stale:
            self.renew()
        return self._data

    def show(self, data: Record | RecordWriter) -> None:
        """Take over a record that went on; what is looked at stays where it still is."""
        old = self._data
        at = old.steps[self.step] if 0 <= self.step < len(old.steps) else None
        failed = (self.live.get("error") or {}).get("step")
        follows = at is None or (at.name != failed and (at.after < 0 or self.step == _last_change(old)))
        overlays = old.overlays
        self._take(data)
        self._stale = False
        self._data.overlays = [*overlays, *(o for o in self._data.overlays if o not in overlays)]
        names = [s.name for s in self._data.steps]
        kept = not follows and at is not None and at.name in names
        with self.hold_sync():
            self.step = names.index(at.name) if kept and at is not None else _last_change(self._data)
            self.panes = [k for k in self.panes if k < len(names)] if self.step in self.panes else []
            self.against = self.against if self.against < len(names) else -1
            self.selection = [i for i in self.selection if i in self._naming]
            self._look_ahead(self.step)
            self.record, self.parts = _packed(self._data), self._writer is not None
            self.overlays = _zipped(_OVERLAYS.dump_json(self._data.overlays)) if self._data.overlays else b""
            self.edition += 1
            self.live = {**self.live, "edition": self.edition}

    def tell(self, live: Mapping[str, Any], *, changed: bool) -> None:
        """Show what runs (docs/explorer.md, trait ``live``); ``changed``: the record made so far is out of date."""
        self._stale = self._stale or (changed and self._again is not None)
        self.live = {**live, "edition": self.edition + self._stale}

    def renew(self) -> None:
        """Make the record anew, if it is out of date."""
        if self._stale and self._again is not None:
            self.show(self._again())

    def _look_ahead(self, step: int) -> None:
        """Make what the picture of a step needs, so that it need not be asked for; the graph before comes later."""
        if self._writer is not None and 0 <= step < len(self._data.steps):
            if self._data.steps[step].after >= 0:
                self._writer.view(self._data.steps[step].after)
            self._writer.rewrites(step)

    def _asked(self, _: Any, content: Mapping[str, Any], buffers: Any) -> None:
        """A message of the browser: it wants the record anew, or a part of this one."""
        want, index = content.get("want"), int(content.get("index", 0))
        if want == "record":
            self.renew()
        elif want in _PARTS and self._writer is not None and content.get("edition") == self.edition:
            told = {"part": want, "index": index, "edition": self.edition}
            try:
                made = _zipped(_PARTS[want].dump_json(self._part(want, index)))
            except Exception as error:
                self.send({**told, "failed": f"{type(error).__name__}: {error}"})
                raise
            self.send(told, [made])

    def _part(self, kind: str, index: int) -> Any:
        assert self._writer is not None
        if kind == "view":
            return self._writer.view(index)
        if kind == "rewrites":
            return self._writer.rewrites(index)
        return self._writer.costed()

    # --- looking, from Python

    @property
    def step_name(self) -> str:
        """Name of the step looked at; empty where there is none."""
        steps = self.data.steps
        return steps[self.step].name if self.step >= 0 else ""

    def goto(
        self,
        step: str | int | Step,
        node: int | str | Node | NodeRecord | Site | RewriteClass | Iterable[Any] | None = None,
        *,
        compare_to: str | int | Step | None = None,
    ) -> Explorer:
        """Look at a step (name or index, negative from the end; a stage is its last step), against another one.

        ``node`` is what to select: an id, a name in the graphs shown (the step's first), a node (of ``show(gm)`` a
        torch.fx one, too), a site or all sites of a rewrite class, or several of them. Returns itself. Raises
        KeyError for an unknown step, TraitError for an unknown node, both with the nearest ones.
        """
        self.step = self._index(step)
        if compare_to is not None:
            self.panes = []
            self.against = self._index(compare_to)
            self.mode = "compare"
        elif not self.panes:
            self.against = -1
        if node is not None:
            self.selection = node
        return self

    def add_overlay(
        self, name: str, values: Mapping[Any, Any] | NodeTimes | Overlay, **options: Any
    ) -> Explorer:
        """Lay values over the graph and show them: ``{node: number or word}``, a profile, ``wb.errors()``.

        Nodes as :meth:`goto` takes them, names those of the graphs shown. Options as :func:`adkit.viz.overlay`
        takes; RecordError for nodes that there are not and for values that it refuses.
        """
        data = self.data
        if isinstance(values, Mapping):
            try:
                values = {
                    self._naming.id(n, self._shown()) if isinstance(n, (str, Node)) else n: v
                    for n, v in values.items()
                }
            except KeyError as error:
                raise RecordError(f"overlay {name!r}: {error.args[0]}") from None
        made = overlay(name, values, **options)
        data.overlays = [*(o for o in data.overlays if o.name != made.name), made]
        self.overlays = _zipped(_OVERLAYS.dump_json(data.overlays))
        self.overlay = made.name
        return self

    def _index(self, step: str | int | Step) -> int:
        names = [s.name for s in self.data.steps]
        step = step.name if isinstance(step, Step) else step
        if isinstance(step, int):
            if not -len(names) <= step < len(names):
                raise KeyError(f"no step {step}: the record has {len(names)}")
            return step % len(names)
        stage = [k for k, s in enumerate(self.data.steps) if s.stage == step and s.after >= 0]
        if step not in names and stage:
            return stage[-1]
        if step not in names:
            raise KeyError(f"no step {step!r} in this record{nearest(step, names)}")
        return names.index(step)

    @traitlets.validate("step", "against")
    def _known_step(self, proposal: Any) -> int:
        value = int(proposal["value"])
        if not -1 <= value < len(self._data.steps):
            raise traitlets.TraitError(f"no step {value}: the record has {len(self._data.steps)}")
        return value

    @traitlets.validate("panes")
    def _known_panes(self, proposal: Any) -> list[int]:
        try:
            value = [self._index(s) for s in proposal["value"]]
        except KeyError as error:
            raise traitlets.TraitError(error.args[0]) from None
        if value and (not 2 <= len(value) <= MOST_PANES or len(set(value)) != len(value)):
            raise traitlets.TraitError(
                f"panes are 2 to {MOST_PANES} different steps, not {list(proposal['value'])!r}; "
                "an empty list shows `against` and `step`"
            )
        return value

    @traitlets.observe("panes")
    def _compare_panes(self, change: Any) -> None:
        if change["new"]:
            self.mode = "compare"
            if self.step not in change["new"]:
                self.step = change["new"][-1]

    @traitlets.observe("step")
    def _move_pane(self, change: Any) -> None:
        """The step looked at is one of the panes: another one takes its place there."""
        if self.panes and change["new"] not in self.panes:
            moved = [change["new"] if k == change["old"] else k for k in self.panes]
            self.panes = moved if change["new"] in moved else []

    @traitlets.validate("selection")
    def _known_nodes(self, proposal: Any) -> list[int]:
        try:
            return self._naming.ids(proposal["value"], self._shown())
        except KeyError as error:
            raise traitlets.TraitError(error.args[0]) from None

    def _shown(self) -> list[int]:
        """The graphs looked at, that of the step first."""
        steps = self._data.steps
        if not steps:
            return []
        at = steps[self.step]  # -1, the browser's choice: the last
        beside = [steps[k].after for k in (*self.panes, self.against) if k >= 0] or [at.before]
        graphs = [at.after if at.after >= 0 else at.before, *(beside if self.mode != "graph" else ())]
        return list(dict.fromkeys(g for g in graphs if g >= 0))

    @traitlets.validate("unfolded")
    def _known_modules(self, proposal: Any) -> list[str] | None:
        value = proposal["value"]
        if value is None:
            return None
        texts = self._data.texts
        known = {texts[k] for k in self._data.modules.path}
        for path in value:
            if path not in known:
                raise traitlets.TraitError(
                    f"no module {path!r} in this record{nearest(path, sorted(known - {''}))}"
                )
        return list(value)

    def __repr__(self) -> str:
        name = self.data.name or self.data.about.get("class", "graph")
        return f"Explorer({name!r}, {len(self.data.steps)} steps, at {self.step_name!r})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        self.renew()
        self._look_ahead(self.step)
        made = super()._repr_mimebundle_(**kwargs)
        bundle, meta = made if isinstance(made, tuple) else (made, {})
        if (
            self._writer is not None
            and self.overlay
            and all(o.name != self.overlay for o in self.data.overlays)
        ):
            self._writer.costed()  # it is one of the costs, which are made when they are looked at
        compared = self.against if self.mode != "graph" else -1
        look = Looked(self.step, tuple(self.selection), self.overlay, compared)
        still = {
            "text/plain": repr(self),
            "text/html": static_html(self.data, look),
            "image/svg+xml": walk_svg(self.data, look),
        }
        return {**(bundle or {}), **still}, meta


def _last_change(data: Record) -> int:
    """The step a reader starts at: the last that changed the graph; -1 where none did."""
    shown = [k for k, s in enumerate(data.steps) if s.after >= 0 and s.after != s.before]
    return shown[-1] if shown else -1


def _packed(data: Record) -> bytes:
    return _zipped(data.model_dump_json().encode())


def _zipped(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


__all__ = ["MODES", "MOST_PANES", "Explorer"]
