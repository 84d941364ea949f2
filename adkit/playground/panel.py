"""The panel that a notebook holds: ``panel = wb.play()``."""

from __future__ import annotations

import atexit
import re
import threading
import time
import weakref
from collections.abc import Sequence as Seq
from typing import Any

from adkit.contract import AdkitError, Completions, RequestError, SamplingParams, nearest
from adkit.playground.driver import Driver, Request
from adkit.playground.gauge import Gauge, PlayStats
from adkit.playground.view import answer, meters, page_map
from adkit.runtime import LiveModel
from adkit.viz.live import LiveView, PageMap

_RESTING = 0.5  # seconds between looks at an engine that does nothing
_MOST_DRAWING = 0.05  # share of the time: what Python does here it does not do for the engine
_KEPT_RUNS = 32
_DEFAULTS: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": None,
    "max_tokens": 128,
    "copies": 1,
}


class Playground:
    """A panel to generate with while the kernel stays free: it runs the engine on a thread of its own.

    Everything that can be clicked can be called: ``panel.generate("Once")``, ``panel.stop()``, ``panel.wait()``,
    ``panel.reset()``, ``panel.text``. ``prompt``, ``chat``, ``copies`` and sampling fields (``temperature=0.8``)
    fill in the controls. It draws at most every ``interval`` seconds while the engine is at work, whoever uses
    it: other cells and panels may, at the same time. ``close()`` ends its requests and leaves its last state as
    a picture; until then it keeps the engine, and with it the cache's memory.

    Raises RequestError for sampling fields that cannot be.
    """

    def __init__(
        self,
        llm: LiveModel,
        *,
        name: str = "",
        prompt: str | None = None,
        chat: bool | None = None,
        interval: float = 0.1,
        **sampling: Any,
    ) -> None:
        self.llm = llm
        self.name = name
        self.interval = interval
        self.can_chat = bool(getattr(llm.tokenizer, "chat_template", None))
        self._settings = {**_DEFAULTS, **sampling}
        self._params(self._settings)  # refuses what cannot be, before anything is shown
        self._runs: list[list[Request]] = []
        self._talk: list[dict[str, str]] = []
        self._log: list[str] = []
        self._displays: list[Any] = []
        self._busy = False
        self._closed = threading.Event()
        self._woken = threading.Event()
        self._drawing = threading.Lock()
        self._driver = Driver(llm, self._fault)
        self._gauge = Gauge(llm.engine, interval)
        if prompt is None:
            prompt = "" if llm.tokenizer is not None else "1 2 3 4 5 6 7 8"
        self._prompt = prompt
        self._chat = self.can_chat if chat is None else chat
        self._controls = self._build()
        self._draw()
        me = weakref.ref(self)
        threading.Thread(target=_keep_drawn, args=(me,), name="adkit-panel", daemon=True).start()
        atexit.register(_close, me)

    # --- asking

    def generate(
        self, prompt: str | Seq[int] | None = None, *, chat: bool | None = None, **sampling: Any
    ) -> Playground:
        """Start ``copies`` requests of a prompt (default: what the controls say) and return at once.

        ``chat`` sends it through the chat template, after what was said in this panel before. Other
        keywords are ``copies`` and fields of :class:`~adkit.SamplingParams`; those that the controls have are shown
        there. With a seed, copy n takes seed + n. Requests that run already go on beside it. Raises
        RequestError for a request that cannot be served.
        """
        if self._closed.is_set():
            raise RequestError("This panel is closed; make a new one with wb.play()")
        if isinstance(prompt, (list, tuple)) and any(isinstance(p, (str, list, tuple)) for p in prompt):
            raise RequestError(
                "the panel takes one prompt at a time, a string or token ids; call generate() once for each, and they "
                "run side by side"
            )
        settings = {**self._settings, **(self._controls.read() if self._controls else {}), **sampling}
        params = self._params(settings)
        if prompt is None:
            prompt = self._controls.prompt.value if self._controls else self._prompt
        if chat is None:
            chat = bool(self._controls.mode.value if self._controls else self._chat)
        self._settings |= {k: settings[k] for k in _DEFAULTS}
        shown = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
        chat = chat and isinstance(prompt, str)
        self._prompt, self._chat = shown, chat
        if self._controls:
            self._controls.write({k: settings[k] for k in _DEFAULTS}, shown, chat)
        asked: Any = self._ids(prompt)
        if chat:
            asked = [*self._said(), {"role": "user", "content": shown}]
        requests = self._driver.submit([(asked, p) for p in params], shown=shown, chat=chat)
        if chat:
            self._talk = asked
        self._runs = [*self._runs[1 - _KEPT_RUNS :], requests]
        self._woken.set()
        return self

    def stop(self) -> None:
        """End this panel's requests before the engine's next step; what came so far is kept."""
        self._driver.stop()
        self._driver.wait(timeout=10)
        self._woken.set()

    def wait(self, timeout: float | None = None) -> Completions:
        """Wait for this panel's requests and return the completions of the latest run.

        An interrupt (Ctrl-C) stops them. Raises TimeoutError when ``timeout`` (seconds) runs out; they go on then.
        """
        try:
            done = self._driver.wait(timeout)
        except KeyboardInterrupt:
            self.stop()
            raise
        self._draw()
        if not done:
            raise TimeoutError(f"still generating after {timeout} s; panel.stop() ends it")
        return self.completions

    def reset(self) -> None:
        """Stop, and forget answers, conversation, errors and measurements."""
        self.stop()
        self._runs, self._talk, self._log = [], [], []
        self._gauge.reset()
        self._draw()

    def close(self) -> None:
        """Stop and end the panel; where it was shown its last state stays, as a picture."""
        if self._closed.is_set():
            return
        self.stop()
        self._closed.set()
        self._woken.set()
        view = self.view
        if self._controls:
            self._controls.close()
        for display in self._displays:
            display.update(view._repr_mimebundle_(), raw=True)

    def __enter__(self) -> Playground:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- reading

    @property
    def running(self) -> bool:
        """True while a request of this panel is unfinished."""
        return self._driver.running

    @property
    def texts(self) -> list[str]:
        """What the requests of the latest run have said so far."""
        return [r.handle.text for r in self._latest]

    @property
    def text(self) -> str:
        """What the first request of the latest run has said so far."""
        return self.texts[0] if self._latest else ""

    @property
    def completions(self) -> Completions:
        """The finished requests of the latest run."""
        return Completions(r.handle.completion() for r in self._latest if r.handle.finished)

    @property
    def errors(self) -> list[str]:
        """Messages of what went wrong, oldest first."""
        failed = [(r.number, r.handle.error) for run in self._runs for r in run]
        return [*self._log, *(f"request {number}: {error}" for number, error in failed if error is not None)]

    @property
    def stats(self) -> PlayStats:
        """Figures of the latest run, and of the engine now."""
        return self._gauge.stats(self._latest)

    @property
    def pages(self) -> PageMap:
        """The cache's pages as they are now, as a picture."""
        return page_map(self.llm.engine, [r for run in self._runs for r in run if not r.handle.finished])

    @property
    def view(self) -> LiveView:
        """All that the panel shows now, as a picture."""
        return LiveView(
            heading=self.name,
            meters=meters(self.stats),
            answers=tuple(answer(r) for run in self._runs for r in run),
            pages=self.pages,
            occupancy=self._gauge.occupancy,
            log=tuple(self.errors),
        )

    # --- inside

    @property
    def _latest(self) -> list[Request]:
        return self._runs[-1] if self._runs else []

    def _params(self, settings: dict[str, Any]) -> list[SamplingParams]:
        """The parameters of each copy."""
        copies, seed = settings["copies"], settings["seed"]
        if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
            raise RequestError(f"copies is {copies!r}; expected a whole number, at least 1")
        fields = {k: v for k, v in settings.items() if k != "copies"}
        known = SamplingParams.__dataclass_fields__
        for name in fields:
            if name not in known:
                raise RequestError(f"there is no sampling field {name!r}{nearest(name, ['copies', *known])}")
        first = SamplingParams(**fields)
        if seed is None:
            return [first] * copies
        return [SamplingParams(**{**fields, "seed": seed + n}) for n in range(copies)]

    def _ids(self, prompt: str | Seq[int]) -> str | Seq[int]:
        """Token ids typed as text, where there is no tokenizer."""
        if self.llm.tokenizer is None and isinstance(prompt, str):
            words = re.split(r"[\s,]+", prompt.strip("[]() \n"))
            if all(w.isdigit() for w in words):
                return [int(w) for w in words]
        return prompt

    def _said(self) -> list[dict[str, str]]:
        """The conversation so far, with the latest answer in it; without a question that got none."""
        last = next((run[0] for run in reversed(self._runs) if run[0].chat), None)
        if not self._talk or last is None:
            return []
        if last.handle.finished and last.handle.text:
            return [*self._talk, {"role": "assistant", "content": last.handle.text}]
        return self._talk[:-1]

    def _fault(self, error: BaseException) -> None:
        self._log = [*self._log, f"the engine failed, and everything in it was cancelled: {error!r}"]

    # --- showing

    def _build(self) -> Any:
        try:
            import ipywidgets  # noqa: F401
        except ImportError:
            return None
        from adkit.playground.controls import Controls

        return Controls(
            {k: self._settings[k] for k in _DEFAULTS},
            self._prompt,
            heading=self.name,
            chat=self._chat and self.can_chat,
            can_chat=self.can_chat,
            on_generate=self._asked,
            on_stop=self._driver.stop,
            on_reset=self.reset,
        )

    def _asked(self) -> None:
        """Generate was clicked: what cannot be done is said in the panel."""
        try:
            self.generate()
        except (AdkitError, TypeError) as error:
            self._log = [*self._log, str(error)]
            self._draw()

    def _draw(self) -> None:
        with self._drawing:
            if self._controls and not self._closed.is_set():
                self._controls.show(self.view, self.running)

    def _tick(self) -> None:
        """Draw if there is something new, then rest."""
        before, self._busy = self._busy, self._gauge.tick() or self._woken.is_set() or self.running
        if self._busy or before:  # once more when it has come to rest: a step is counted when it begins
            self._woken.clear()
            start = time.perf_counter()
            self._draw()
            took = time.perf_counter() - start
            self._closed.wait(max(self.interval, took / _MOST_DRAWING))
        elif self._woken.wait(_RESTING):
            self._closed.wait(self.interval / 4)  # the first token first

    def __repr__(self) -> str:
        return (
            f"Playground({self.name or 'engine'}, {'running' if self.running else 'at rest'}, {self.stats!r})"
        )

    def _bundle(self) -> dict[str, Any]:
        static = self.view._repr_mimebundle_()
        if self._closed.is_set():
            return static
        if self._controls is None:
            static["text/plain"] += "\n(ipywidgets is not installed: pip install ipywidgets)"
            return static
        return {**static, **self._controls.box._repr_mimebundle_(), "text/plain": static["text/plain"]}

    def _ipython_display_(self) -> None:
        from IPython.display import display

        handle = display(self._bundle(), raw=True, display_id=True)
        if handle is not None and not self._closed.is_set():
            self._displays.append(handle)


def _keep_drawn(panel: weakref.ref[Playground]) -> None:
    """Draw a panel until it is closed or nobody has it any more."""
    while (me := panel()) is not None and not me._closed.is_set():
        try:
            me._tick()
        except Exception as error:  # the panel is no reason to stop; next time may go well
            me._log = [*me._log[-20:], f"could not draw: {error!r}"]
            me._closed.wait(_RESTING)
        del me


def _close(panel: weakref.ref[Playground]) -> None:
    me = panel()
    if me is not None:
        me.close()
