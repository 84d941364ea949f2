"""The thread that runs the engine for a panel, as long as the panel has a request in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from adkit.contract import SamplingParams
from adkit.runtime import LiveModel, Sequence

# A lock goes to whoever asks first after its release, which is nearly always the thread that just had it. So the
# loop leaves the engine alone for a moment now and then: another cell's request gets its turn.
_BREATH_EVERY, _BREATH = 0.02, 0.0003  # seconds


@dataclass(eq=False)
class Request:
    """A request of a panel: its number there, what was asked, its handle, and when what happened (seconds)."""

    number: int
    prompt: str
    chat: bool
    handle: Sequence
    asked: float
    first: float | None = None
    ended: float | None = None
    stopping: bool = False

    @property
    def first_token_seconds(self) -> float | None:
        """Seconds from the question to the first token; None before it."""
        return None if self.first is None else self.first - self.asked


class Driver:
    """Runs an engine's steps while requests submitted here are unfinished.

    Others may use the engine at the same time: its methods take turns. ``on_fault`` is called with an
    exception that left the engine; the requests in flight are cancelled then.
    """

    def __init__(self, llm: LiveModel, on_fault: Callable[[BaseException], None]) -> None:
        self.llm = llm
        self._on_fault = on_fault
        self._changed = threading.Condition()
        self._live: list[Request] = []
        self._guests = 0
        self._count = 0
        self._thread: threading.Thread | None = None
        # A thread begins on the first GPU, whichever its maker has chosen.
        index = torch.cuda.current_device() if llm.engine.model.device.type == "cuda" else -1
        self._gpu = index if llm.engine.model.device.index is None else llm.engine.model.device.index

    @property
    def running(self) -> bool:
        """True while a request of this driver is unfinished."""
        return bool(self._live)

    def submit(
        self, prompts: Iterable[tuple[Any, SamplingParams]], *, shown: str, chat: bool = False
    ) -> list[Request]:
        """Queue requests and see that they run; returns at once.

        Raises RequestError for the first that cannot be served; those before it are taken back.
        """
        requests: list[Request] = []
        with self._changed:
            self._guests += 1
        try:
            for prompt, params in prompts:
                handle = self.llm.submit(prompt, params)
                requests.append(Request(0, shown, chat, handle, time.perf_counter()))
        except BaseException:
            for request in requests:
                self.llm.engine.cancel(request.handle)
            raise
        finally:
            with self._changed:
                self._guests -= 1
                self._changed.notify_all()
        with self._changed:
            for request in requests:
                self._count += 1
                request.number = self._count
            self._live += requests
            if self._thread is None and self._live:
                self._thread = threading.Thread(target=self._run, name="adkit-playground", daemon=True)
                self._thread.start()
        return requests

    def stop(self) -> None:
        """Ask for the end of every unfinished request; they end before another step is run."""
        with self._changed:
            for request in self._live:
                request.stopping = True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every request has ended; False when the time (seconds) ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._live, timeout)

    def _run(self) -> None:
        if self._gpu >= 0:
            torch.cuda.set_device(self._gpu)
        engine = self.llm.engine
        breath = time.perf_counter()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._guests)
                if not self._live:
                    self._thread = None
                    return
            try:
                for request in self._live:
                    if request.stopping:
                        engine.cancel(request.handle)
                if not all(r.handle.finished for r in self._live):
                    engine.step()
            except BaseException as error:  # whatever it is: the panel must outlive it and say it
                for request in self._live:
                    engine.cancel(request.handle)
                self._on_fault(error)
            now = time.perf_counter()
            self._look(now)
            if now - breath > _BREATH_EVERY:
                time.sleep(_BREATH)
                breath = time.perf_counter()

    def _look(self, now: float) -> None:
        """Note first tokens, and let go of what has ended."""
        for request in self._live:
            if request.first is None and request.handle.num_output:
                request.first = now
            if request.handle.finished:
                request.ended = now
        if any(r.ended is not None for r in self._live):
            with self._changed:
                self._live = [r for r in self._live if r.ended is None]
                self._changed.notify_all()
