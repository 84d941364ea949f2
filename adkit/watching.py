"""Explorers that watch a Workbench: told at once what runs and what failed, given the walk when they ask for it.

While a cell runs the kernel can send but not listen, so what is sent then is small (how each step went); the record
is made anew only when a browser asks, which it does as soon as the kernel is free.
"""

from __future__ import annotations

import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adkit.graph.serialize import portable
from adkit.graph.step import Step

if TYPE_CHECKING:
    from adkit.viz.explorer import Explorer
    from adkit.workbench import Workbench

#: Seconds between two messages about one step's progress.
_PAUSE = 0.2
#: Messages a second about one step's log. What is written faster is told with the next message.
_LINES_A_SECOND = 5
#: Lines of a traceback, or of the log of the step at work, that are shown.
_MOST_LINES = 30


class Watching:
    """The explorers of one Workbench; every method is free of charge while there are none."""

    def __init__(self, wb: Workbench) -> None:
        self._wb = weakref.ref(wb)
        self._explorers: weakref.WeakSet[Explorer] = weakref.WeakSet()
        self._live: dict[str, Any] = {}
        self._running = False
        self._began = self._told = 0.0
        self._lines: deque[float] = deque(maxlen=_LINES_A_SECOND)

    def add(self, explorer: Explorer) -> None:
        """From now on this one is told."""
        self._explorers.add(explorer)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around several steps: between two of them nothing is said to be at rest."""
        outer, self._running = self._running, True
        try:
            yield
        finally:
            self._running = outer
            self.changed()

    def starts(self, step: str) -> None:
        """A step begins."""
        self._began = time.perf_counter()
        self._live = {"running": step}
        self._tell()

    def progress(self, done: int, total: int, what: str) -> None:
        """So much of the step at work is done."""
        if self._explorers and time.perf_counter() - self._told > _PAUSE:
            self._live["progress"] = {"what": what, "done": done, "total": total}
            self._live["elapsed"] = time.perf_counter() - self._began
            self._tell(quick=True)

    def log(self, line: str) -> None:
        """The step at work wrote a line to its log."""
        if self._explorers:
            self._live["log"] = [*self._live.get("log", []), portable(str(line))][-_MOST_LINES:]
            now = time.perf_counter()
            if len(self._lines) < _LINES_A_SECOND or now - self._lines[0] > 1:
                self._lines.append(now)
                self._live["elapsed"] = now - self._began
                self._tell(quick=True)

    def restored(self) -> None:
        """Steps were taken from a cache; others go on from there, which may take long."""
        self._live = {}
        self._tell()

    def failed(self, step: str, error: BaseException) -> None:
        """The step at work ended in an error (or was interrupted)."""
        if self._explorers:
            lines = "".join(traceback.format_exception(error)).splitlines()[-_MOST_LINES:]
            head = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            told = {"step": step, "text": portable(f"{head}\n\n" + "\n".join(lines))}
            self._live = {"error": told, "log": self._live.get("log", [])}

    def changed(self) -> None:
        """The walk is another than before: steps ran, were undone, or the pipeline was changed."""
        if self._running or not self._explorers:
            return
        self._live = {k: v for k, v in self._live.items() if k in ("error", "log") and "error" in self._live}
        self._tell(changed=True)

    def _tell(self, *, changed: bool = False, quick: bool = False) -> None:
        wb = self._wb()
        if wb is None or not self._explorers:
            return
        if not quick:
            self._live["heads"] = [_head(s) for s in wb.steps if s.status != "disabled"]
        self._told = time.perf_counter()
        for explorer in self._explorers:
            explorer.tell(self._live, changed=changed)


def _head(s: Step) -> dict[str, Any]:
    """A step as the timeline tells it."""
    if s.status == "pending":
        return {"name": s.name, "status": s.status}
    diff = s.diff if s.changed else None
    return {
        "name": s.name,
        "status": s.status,
        "seconds": s.seconds,
        "memory_bytes": s.memory_bytes,
        "created": len(diff.created) if diff is not None else 0,
        "erased": len(diff.erased) if diff is not None else 0,
        "changed": len(diff.changed) if diff is not None else 0,
        "reason": portable(s.info.reason),
        "log": [portable(str(line)) for line in s.log],
    }


__all__ = ["Watching"]
