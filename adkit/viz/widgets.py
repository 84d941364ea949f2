"""A browser of steps for the notebook: pick a step, see its picture, code, rewrites and nodes.

Needs ipywidgets; without it (or outside a notebook) the browser shows itself as text.
"""

from __future__ import annotations

from functools import partial
from html import escape
from typing import Any

from adkit.graph.diff import RewriteClass
from adkit.graph.step import Step, Steps
from adkit.viz.dot import draw_rewrite
from adkit.viz.html import anchor, code_html, diff_html, fragment, kind_of, picture_html, step_body

TABS = ("what it did", "picture", "code", "code diff", "rewrites", "nodes")
_MARKS = {
    "changed": "●",
    "done": "○",
    "skipped": "–",
    "disabled": "×",
    "failed": "!",
    "pending": " ",
    "pending next": "→",
}
_MOST_ROWS = 400


class StepBrowser:
    """Pick a step; tabs show what it did. Steps that changed the graph are marked.

    ``selected`` is the step shown; setting it moves the browser. Tabs are filled when first looked at.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self._names = steps.keys()
        self._filled: set[tuple[str, int]] = set()
        first = next((s.name for s in steps if s.changed), self._names[0] if self._names else "")
        self._selected = first
        try:
            import ipywidgets
        except ImportError:
            self.widget: Any = None
        else:
            self.widget = self._build(ipywidgets)

    @property
    def selected(self) -> str:
        """Name of the step shown."""
        return self._selected

    @selected.setter
    def selected(self, name: str) -> None:
        self._selected = self.steps[name].name
        if self.widget is not None:
            self._list.value = self._selected
            self._show()

    def explain(self, rewrite: RewriteClass | int) -> str:
        """HTML of one rewrite class of the selected step: what became what, where, and a picture."""
        step = self.steps[self._selected]
        chosen = step.rewrites[rewrite] if isinstance(rewrite, int) else rewrite
        picture = draw_rewrite(step, chosen).html() if len(step.before) else ""
        places = ", ".join(dict.fromkeys(s.module_path or "root" for s in chosen.sites[:20]))
        return fragment(
            f"<p><b>{escape(str(chosen))}</b></p>{picture}<p class='ak-muted'>{escape(places)}</p>"
        )

    def tab(self, index: int) -> str:
        """HTML of one tab (see :data:`TABS`) for the selected step."""
        step = self.steps[self._selected]
        if not len(step.after) and index:
            return fragment('<p class="ak-muted">No graph at this step.</p>')
        body = (
            lambda: step_body(step),
            lambda: picture_html(step.after, highlight=step.diff.created if len(step.before) else ()),
            lambda: code_html(step.after),
            lambda: diff_html(step.before, step.after) or '<p class="ak-muted">The graph begins here.</p>',
            lambda: "" if step.changed else '<p class="ak-muted">Nothing changed.</p>',
            lambda: self._nodes(step),
        )[index]
        return fragment(body())

    def _nodes(self, step: Step) -> str:
        table = step.after.table()
        more = (
            f'<p class="ak-muted">and {len(table) - _MOST_ROWS} more nodes</p>'
            if len(table) > _MOST_ROWS
            else ""
        )
        html = table.head(_MOST_ROWS).to_html(border=0, classes="ak-table", table_id=f"nodes-{anchor(step)}")
        return f'<div class="ak-code">{html}</div>{more}'

    # ---- widgets -------------------------------------------------------------------------------------

    def _build(self, widgets: Any) -> Any:
        waiting = next((s for s in self.steps if s.status == "pending"), None)
        options = [(f"{_MARKS[kind_of(s, waiting)]} {s.name}", s.name) for s in self.steps]
        self._list = widgets.Select(
            options=options, value=self._selected or None, rows=min(24, max(6, len(options))),
            layout=widgets.Layout(width="270px", flex="0 0 auto"),
        )  # fmt: skip
        self._panes = [widgets.HTML() for _ in TABS]
        self._buttons = widgets.VBox()
        self._explained = widgets.HTML()
        pages = list(self._panes)
        pages[4] = widgets.VBox([self._panes[4], self._buttons, self._explained])
        self._tabs = widgets.Tab(
            children=pages, titles=TABS, layout=widgets.Layout(flex="1 1 auto", min_width="0")
        )
        self._widgets = widgets
        self._list.observe(self._moved, names="value")
        self._tabs.observe(lambda change: self._show(), names="selected_index")
        box = widgets.HBox([self._list, self._tabs])
        self._show()
        return box

    def _moved(self, change: Any) -> None:
        self._selected = change["new"]
        self._show()

    def _show(self) -> None:
        if not self._names:
            return
        index = self._tabs.selected_index or 0
        self._panes[index].value = self.tab(index)
        if index == 4:
            self._explained.value = ""
            buttons = []
            for r in self.steps[self._selected].rewrites if self.steps[self._selected].changed else ():
                button = self._widgets.Button(
                    description=str(r)[:120], tooltip=str(r), layout=self._widgets.Layout(width="auto")
                )
                button.on_click(partial(self._clicked, r))
                buttons.append(button)
            self._buttons.children = buttons

    def _clicked(self, rewrite: RewriteClass, button: Any) -> None:
        self._explained.value = self.explain(rewrite)

    def __repr__(self) -> str:
        rows = [f"{'>' if s.name == self._selected else ' '} {s.summary()}" for s in self.steps]
        return "\n".join(["StepBrowser", *rows])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if self.widget is None:
            return {"text/plain": f"{self!r}\n(ipywidgets is not installed: pip install ipywidgets)"}
        bundle: dict[str, Any] = self.widget._repr_mimebundle_()
        return {**bundle, "text/plain": repr(self)}


__all__ = ["TABS", "StepBrowser"]
