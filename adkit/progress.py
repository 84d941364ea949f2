"""Progress bars of a Workbench: one a kind of work, shown when it takes longer than two seconds."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_QUIET_SECONDS = 2.0
_TICK_SECONDS = 0.5


class Bars:
    """``with bars:`` around the work, ``bars.show(done, total, what)`` within it; all are closed at the end.

    None are drawn where TQDM_DISABLE is set: tqdm itself overlooks it in notebooks.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled and not os.environ.get("TQDM_DISABLE")
        self._bars: dict[str, Any] = {}
        self._at_work: list[str] = []

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Around work that may not say how far it is: then its name and the seconds it takes are shown.

        A thread tells them, because the work itself has no moment to. Within other such work it is named after that.
        """
        over = threading.Event()
        self._at_work.append(what)
        clock = None
        if self.enabled and len(self._at_work) == 1:
            clock = threading.Thread(target=self._tick, args=(over,), name="adkit-progress", daemon=True)
            clock.start()
        try:
            with self:
                yield
        finally:
            over.set()
            if clock is not None:
                clock.join()
            self._at_work.pop()

    def _tick(self, over: threading.Event) -> None:
        if over.wait(_QUIET_SECONDS):
            return
        from tqdm.auto import tqdm

        bar: Any = None
        while not over.wait(_TICK_SECONDS):
            if bar is None and not self._bars:  # a bar that tells more makes this one needless
                # Not drawn before it is told what it stands for.
                bar = tqdm(bar_format="{desc}: {elapsed}", leave=False, delay=1e-9)
                if bar.disable:
                    return
                bar.start_t -= _QUIET_SECONDS + _TICK_SECONDS
            if bar is not None:
                bar.set_description_str(" / ".join(self._at_work))
        if bar is not None:
            bar.close()

    def show(self, done: int, total: int, what: str) -> None:
        """So much of ``what`` is done; counts over a million are bytes."""
        if not self.enabled:
            return
        from tqdm.auto import tqdm

        if what not in self._bars:
            big = total > 1 << 20
            self._bars[what] = tqdm(
                total=total,
                desc=what,
                unit="B" if big else "",
                unit_scale=big,
                leave=False,
                delay=_QUIET_SECONDS,
            )
        bar = self._bars[what]
        bar.update(done - bar.n)

    def loading(self, done: int, total: int) -> None:
        """So many bytes of weights are in."""
        self.show(done, total, "loading")

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exc: object) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars = {}
