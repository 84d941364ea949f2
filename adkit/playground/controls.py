"""The panel's widgets: a prompt, buttons, sampling fields, and panes of HTML. Needs ipywidgets."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from adkit.viz.html import style
from adkit.viz.live import (
    LiveView,
    answers_html,
    live_style,
    log_html,
    meters_html,
    occupancy_html,
    pages_html,
)

_TIPS = {
    "temperature": "0: always the likeliest token",
    "top_p": "keep the likeliest tokens up to this probability; 1: all",
    "top_k": "keep so many of the likeliest tokens; 0: all",
    "min_p": "drop tokens below this share of the likeliest one's probability; 0: none",
    "max_tokens": "most new tokens a request",
    "seed": "whole number; empty: a new draw each time. Copy n takes seed + n",
    "repetition_penalty": "above 1: tokens seen before become less likely",
    "copies": "how many requests of this prompt run at once",
}
_NAMES = {"repetition_penalty": "repeat penalty"}


def _body(html: str) -> str:
    """What the style sheets apply to."""
    return f'<div class="adkit">{html}</div>'


class Controls:
    """The widgets, as one box; ``settings`` are read from the fields and written to them.

    ``on_generate``, ``on_stop`` and ``on_reset`` are called when somebody asks for that.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        prompt: str,
        *,
        heading: str,
        chat: bool,
        can_chat: bool,
        on_generate: Callable[[], None],
        on_stop: Callable[[], None],
        on_reset: Callable[[], None],
    ) -> None:
        import ipywidgets as w

        self.prompt = w.Text(
            value=prompt,
            placeholder="Ask something, then Enter",
            layout=w.Layout(flex="1 1 320px", width="auto"),
        )
        self.prompt.on_msg(lambda _, content, __: on_generate() if content.get("event") == "submit" else None)
        self.mode = w.ToggleButtons(
            options=[("text", False), ("chat", True)],
            value=chat,
            disabled=not can_chat,
            tooltips=["go on from this text", "answer through the chat template, with what was said before"],
            style={"button_width": "56px"},
            layout=w.Layout(width="128px", overflow="hidden"),
        )
        self.generate = self._button(w, "Generate", "play", "run the prompt (Enter)", on_generate, "primary")
        self.stop = self._button(w, "Stop", "stop", "end what runs here; what came is kept", on_stop)
        self.reset = self._button(w, "Reset", "trash", "stop, and forget answers and conversation", on_reset)
        self.stop.disabled = True
        self.fields = {name: self._field(w, name, value) for name, value in settings.items()}
        self._panes = {name: w.HTML() for name in ("meters", "answers", "pages", "occupancy", "log")}
        row = {"display": "flex", "flex_flow": "row wrap", "align_items": "center"}
        # Reversed, so that the browser itself keeps the newest text in sight, unless one scrolls up.
        self._scroll = w.Box(
            [self._panes["answers"]],
            layout=w.Layout(
                height="280px",
                overflow="auto",
                display="flex",
                flex_flow="column-reverse",
                border="1px solid var(--jp-border-color2, #d9dde3)",
                padding="6px 10px",
            ),
        )
        title = f'<span class="ak-name">{escape(heading)}</span>'
        self.box = w.VBox(
            [
                w.HTML(f"<style>{style()}{live_style()}</style>{_body(title)}"),
                w.Box([self.prompt, self.mode, self.generate, self.stop, self.reset], layout=w.Layout(**row)),
                w.Box(list(self.fields.values()), layout=w.Layout(**row)),
                self._panes["meters"],
                self._scroll,
                self._panes["pages"],
                self._panes["occupancy"],
                self._panes["log"],
            ],
            layout=w.Layout(max_width="980px"),
        )
        self.box.add_class("adkit-play")

    @staticmethod
    def _button(w: Any, name: str, icon: str, tip: str, act: Callable[[], None], look: str = "") -> Any:
        button = w.Button(
            description=name, icon=icon, tooltip=tip, button_style=look, layout=w.Layout(width="100px")
        )
        button.on_click(lambda _: act())
        return button

    @staticmethod
    def _field(w: Any, name: str, value: Any) -> Any:
        options: dict[str, Any] = {
            "value": "" if value is None else value,
            "description": _NAMES.get(name, name.replace("_", " ")),
            "tooltip": _TIPS[name],
            "style": {"description_width": "104px"},
            "layout": w.Layout(width="190px"),
        }
        if name == "seed":
            return w.Text(**{**options, "value": "" if value is None else str(value)})
        if name in ("max_tokens", "copies"):
            return w.BoundedIntText(min=1, max=1 << 20, **options)
        if name == "top_k":
            return w.BoundedIntText(min=0, max=1 << 20, **options)
        most = {"temperature": 10.0, "repetition_penalty": 10.0}.get(name, 1.0)
        return w.BoundedFloatText(min=0.0, max=most, step=0.05, **options)

    def read(self) -> dict[str, Any]:
        """The fields' values; a seed that is no number is left as it is typed, for the check to refuse."""
        settings = {name: field.value for name, field in self.fields.items()}
        seed = str(settings["seed"]).strip()
        settings["seed"] = (int(seed) if seed.lstrip("-").isdigit() else seed) if seed else None
        return settings

    def write(self, settings: dict[str, Any], prompt: str, chat: bool) -> None:
        """Show these values in the fields."""
        self.prompt.value, self.mode.value = prompt, chat
        for name, value in settings.items():
            new = ("" if value is None else str(value)) if name == "seed" else value
            if self.fields[name].value != new:
                self.fields[name].value = new

    def show(self, view: LiveView, running: bool) -> None:
        """Draw a view; only what changed is sent."""
        drawn = {
            "meters": meters_html(view.meters),
            "answers": answers_html(view.answers),
            "pages": pages_html(view.pages) if view.pages is not None else "",
            "occupancy": occupancy_html(view.occupancy) if view.occupancy is not None else "",
            "log": log_html(view.log),
        }
        for name, html in drawn.items():
            if self._panes[name].value != _body(html):
                self._panes[name].value = _body(html)
        self.stop.disabled = not running

    def close(self) -> None:
        """Close every widget, in the browser too."""
        todo = [self.box]
        while todo:
            widget = todo.pop()
            todo += getattr(widget, "children", ())
            widget.close()
