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
        ctx.report("one leg is off")
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
    assert told[0] == told[-1] == {"what": "breaking", "done": 1, "total": 3}
    error = messages[-1]["error"]
    assert error["step"] == "broken"
    assert "ValueError: no good" in error["text"]
    assert messages[-1]["log"] == ["one leg is off"], "what it said before it failed"
    assert "running" not in messages[-1]
    wb.disable("broken")
    wb.run(until="post_export")
    assert not {"error", "log"} & set(messages[-1])


class Talking(Pass):
    """Says more than can be followed."""

    key = "talking"
    stage = Stage.POST_EXPORT

    def apply(self, gm: Any, ctx: Any) -> PassInfo:
        for n in range(100):
            ctx.report(f"line {n}")
        ctx.progress(1, 1, "talking")
        return PassInfo()


def test_what_a_step_writes_to_its_log_is_told_while_it_runs(exported, monkeypatch) -> None:
    """A few lines at once; of a flood the first ones, and the last ones with the next message."""
    wb = exported().insert(Talking, after="cleanup_noop_slice")
    wb.run(until="cleanup_noop_slice")
    messages = heard(wb.explore())
    now = [0.0]
    monkeypatch.setattr("adkit.watching.time.perf_counter", lambda: now[0])
    wb.step()
    logs = [m["log"] for m in messages if m.get("running") == "talking" and "log" in m]
    assert logs == [[f"line {n}" for n in range(k + 1)] for k in range(5)]
    now[0] = 2.0
    messages.clear()
    wb.rewind("talking")
    wb.step()
    assert next(m["log"] for m in messages if "log" in m) == ["line 0"], "later it may speak again"
    (head,) = (h for h in messages[-1]["heads"] if h["name"] == "talking")
    assert head["log"] == [f"line {n}" for n in range(100)]
    assert "log" not in messages[-1]


def test_progress_brings_the_rest_of_the_log(exported, monkeypatch) -> None:
    monkeypatch.setattr("adkit.watching._PAUSE", -1.0)
    monkeypatch.setattr("adkit.watching.time.perf_counter", lambda: 0.0)
    wb = exported().insert(Talking, after="cleanup_noop_slice")
    wb.run(until="cleanup_noop_slice")
    messages = heard(wb.explore())
    wb.step()
    (told,) = (m["log"] for m in messages if "progress" in m)
    assert told == [f"line {n}" for n in range(70, 100)], "the last ones"


def test_steps_restored_from_the_cache_are_told_before_the_next_one_runs(exported) -> None:
    wb = exported()
    messages = heard(wb.explore())
    wb.run(until="pattern_matcher")
    assert messages[0]["running"] == "pipeline_cache"
    told = messages[1]
    assert "running" not in told
    restored = [h for h in told["heads"] if h["status"] != "pending"]
    assert {h["status"] for h in restored} == {"skipped"}
    assert all(h["reason"].startswith("restored from the pipeline cache") for h in restored)
    names = [s.name for s in wb.steps if s.status != "disabled"]
    assert names[: len(restored)] == [h["name"] for h in restored]
    assert messages[2]["running"] == names[len(restored)]


def test_going_back_is_seen(exported) -> None:
    wb = exported().run(until="post_export")
    explorer = wb.explore()
    steps = len([s for s in explorer.data.steps if s.status == "pending"])
    wb.rewind("cleanup_noop_slice")
    assert len([s for s in explorer.data.steps if s.status == "pending"]) > steps
    assert explorer.step_name != ""
