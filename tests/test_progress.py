"""What is told of work that takes long."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tqdm.auto
import tqdm.std

from adkit.progress import Bars


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    """``told.texts`` of bars without a count; ``told.comes(text)`` waits for one."""

    class Told:
        closed = 0

        def __init__(self) -> None:
            self.texts: list[str] = []
            self.news = threading.Condition()

        def comes(self, text: str) -> bool:
            with self.news:
                return self.news.wait_for(lambda: text in self.texts, 60)

    seen = Told()

    class Bar:
        start_t = 0.0
        disable = False

        def __init__(self, **_: Any) -> None:
            self.n = 0

        def set_description_str(self, text: str) -> None:
            with seen.news:
                seen.texts.append(text)
                seen.news.notify_all()

        def update(self, n: int) -> None:
            self.n += n

        def close(self) -> None:
            seen.closed += 1

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    monkeypatch.setattr("adkit.progress._QUIET_SECONDS", 0.0)
    monkeypatch.setattr("adkit.progress._TICK_SECONDS", 0.001)
    return seen


def ticking() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "adkit-progress"]


def test_work_that_cannot_say_how_far_it_is_is_named(told) -> None:
    bars = Bars()
    with bars.busy("outer"):
        with bars.busy("inner"):
            assert told.comes("outer / inner")
        told.texts.clear()
        assert told.comes("outer")
    assert told.closed == 1
    assert not ticking()


def test_it_ends_with_the_work_whatever_happens_and_begins_anew(told) -> None:
    bars = Bars()

    def interrupted() -> None:
        with bars.busy("work"):
            assert told.comes("work")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert told.closed == 1
    assert not ticking()
    with bars.busy("again"):
        assert told.comes("again")


def test_nothing_is_told_where_nobody_wants_it(told) -> None:
    with Bars(enabled=False).busy("work"):
        assert not ticking()
    assert told.texts == []


def test_a_machine_that_switches_bars_off_sees_none(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    made = threading.Event()

    class Off(tqdm.std.tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(disable=True, **options)
            made.set()

    monkeypatch.setattr(tqdm.auto, "tqdm", Off)
    monkeypatch.setattr("adkit.progress._QUIET_SECONDS", 0.0)
    monkeypatch.setattr("adkit.progress._TICK_SECONDS", 0.001)
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    with Bars().busy("work"):
        assert made.wait(60)
    assert failed == []
    assert capsys.readouterr().err == ""


def test_no_bar_where_the_environment_wants_none(told, monkeypatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")  # tqdm's bars for notebooks do not look at it
    bars = Bars()
    with bars.busy("work"):
        bars.show(1, 2, "pieces")
        assert not ticking()
    assert told.texts == []
    assert told.closed == 0
