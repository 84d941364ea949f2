"""Progress bars of a Workbench: one a kind of work, shown when it takes longer than two seconds."""

from __future__ import annotations

from typing import Any

_QUIET_SECONDS = 2


class Bars:
    """``with bars:`` around the work, ``bars.show(done, total, what)`` within it; all are closed at the end."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._bars: dict[str, Any] = {}

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
