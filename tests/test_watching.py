"""An explorer is told what a Workbench does while it does it."""

from __future__ import annotations

from typing import Any

import pytest

from adkit.contract import PassError
from adkit.passes import Pass, PassInfo, Stage


class Broken(Pass):
    """Fails."""

    key = "broken"
    stage = Stage.POST_EXPORT

    def apply(self, gm: Any, ctx: Any) -> PassInfo:
        ctx.progress(1, 3, "breaking")
        raise ValueError("no good")


def heard(explorer: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    explorer.observe(lambda change: messages.append(change["new"]), names="live")
    return messages


def test_steps_appear_while_it_runs(exported) -> None:
    wb = exported()
    explorer = wb.explore()
    assert explorer.step_name == ""
    messages = heard(explorer)
    wb.run(until="pattern_matcher")
    running = [m["running"] for m in messages if m.get("running")]
    done = [s.name for s in wb.steps[: wb.position]]
    assert running == done[-len(running) :]
    last = messages[-1]
    assert "running" not in last
    told = {h["name"]: h for h in last["heads"]}
    for s in wb.steps[: wb.position]:
        if s.status != "disabled":
            assert told[s.name]["status"] == s.status
            assert told[s.name]["created"] == (len(s.diff.created) if s.changed else 0)
    # The record itself comes when it is asked for, by the browser or by Python.
    assert last["edition"] == explorer.edition + 1
    assert explorer.step_name == [s.name for s in wb.steps if s.changed][-1]
    assert explorer.edition == last["edition"]


def test_a_failure_names_its_transform(exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adkit.watching._PAUSE", 0.0)
    wb = exported()
    wb.insert(Broken, after="cleanup_noop_slice")
    explorer = wb.explore()
    messages = heard(explorer)
    with pytest.raises(PassError):
        wb.run()
    told = [m["progress"] for m in messages if "progress" in m]
    assert told == [{"what": "breaking", "done": 1, "total": 3}]
    error = messages[-1]["error"]
    assert error["step"] == "broken"
    assert "ValueError: no good" in error["text"]
    assert "running" not in messages[-1]
    wb.disable("broken")
    wb.run(until="post_export")
    assert "error" not in messages[-1]


def test_going_back_is_seen(exported) -> None:
    wb = exported().run(until="post_export")
    explorer = wb.explore()
    steps = len([s for s in explorer.data.steps if s.status == "pending"])
    wb.rewind("cleanup_noop_slice")
    assert len([s for s in explorer.data.steps if s.status == "pending"]) > steps
    assert explorer.step_name != ""
