"""What was told of a walk is dropped whole where the walk went another way, and told once where it went on."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from adkit.graph.step import Step, Steps
from adkit.viz.record import RecordWriter, Walked
from tests.graph.samples import sample


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    """A walk that goes over to a graph of another model, so that every table grows at its end."""
    told = [s for s in sample("llama") if len(s.after)]
    other = [s for s in sample("gpt_oss") if len(s.after)][-1].after
    return [*told, Step("other", "graph", {}, "", "done", told[-1].after, other)]


def all_of(x: Any) -> Any:
    """Everything that is held, in order; snapshots and nodes by identity."""
    if isinstance(x, BaseModel):
        return x.model_dump()
    if isinstance(x, dict):
        return [(k, all_of(v)) for k, v in x.items()]
    if isinstance(x, list):
        return [all_of(v) for v in x]
    return x


def state(walked: Walked) -> dict[str, Any]:
    """All that is held, by name; that of the rows beside it."""
    own = {k: all_of(v) for k, v in vars(walked).items() if k not in ("lock", "rows")}
    return own | {f"rows.{k}": all_of(v) for k, v in vars(walked.rows).items()}


def test_going_back_leaves_nothing_behind(steps: list[Step]) -> None:
    walked = Walked()
    for k in range(len(steps)):
        walked.follow(steps[:k])
        before = state(walked)
        walked.follow(steps)
        grown = state(walked)
        walked.keep(steps[:k])
        assert state(walked) == before
    assert [n for n in grown if grown[n] == before[n]] == ["rows._category"], "all else grows"


def test_what_was_told_is_not_told_again(steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    walked = Walked()
    walked.follow(steps)
    record = RecordWriter(steps, walked=walked).record
    monkeypatch.setattr("adkit.viz.record.rows.Rows.of", lambda *_: pytest.fail("told again"))
    assert RecordWriter(Steps(steps), walked=walked).record == record
    walked.follow(steps[:-1])
    assert len(walked.graphs) == len(record.graphs) - 1
    with pytest.raises(BaseException, match="told again"):
        walked.follow(steps)
    assert walked.told == [], "a graph half told is dropped"


def test_two_walks_may_share_what_was_told(steps: list[Step]) -> None:
    walked = Walked()
    for some in (steps, steps[:3], steps, [steps[-1]], steps[1:], []):
        assert RecordWriter(some, walked=walked).record == RecordWriter(some).record
