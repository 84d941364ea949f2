"""A record that grew with the walk is the one that is made of it at once, whatever the Workbench went through."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule

import adkit
from adkit.contract import PassError
from adkit.passes import Pass, PassInfo, Stage
from adkit.recording import writer
from adkit.sharding.forks import fork
from adkit.viz.record import RecordWriter

PLACES = ("cleanup_noop_slice", "match_rmsnorm_pattern", "insert_cached_attention", "fuse_gemms")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is told as soon as it ran, whatever it takes."""
    monkeypatch.setattr("adkit.growing.SHARE", float("inf"))


class Doubled(Pass):
    """Puts a product behind the embedding."""

    key = "doubled"
    stage = Stage.POST_EXPORT

    def apply(self, gm: GraphModule, ctx: Any) -> PassInfo:
        at = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.embedding.default)
        users = list(at.users)
        with self.site(gm, [at], label="doubled", before=at.next) as s:
            made = s.call(torch.ops.aten.mul.Tensor, (at, 2.0), like=at)
            for user in users:
                user.replace_input_with(at, made)
        return PassInfo(num_matches=1)


class Failing(Doubled):
    """Changes the graph, then fails."""

    key = "failing"

    def apply(self, gm: GraphModule, ctx: Any) -> PassInfo:
        super().apply(gm, ctx)
        raise ValueError("no good")


def whole(made: RecordWriter) -> str:
    made.costs()
    return made.complete().model_dump_json()


def same(
    wb: adkit.Workbench, of: Callable[[RecordWriter], str] = lambda made: made.record.model_dump_json()
) -> None:
    """What grew is what is made at once; without more, in its light form."""
    assert of(RecordWriter(wb.steps, walked=wb.growing.walked)) == of(RecordWriter(wb.steps))


def run(wb: adkit.Workbench, n: int) -> None:
    """Some steps; where a pass fails it is switched off."""
    for _ in range(min(n, len(wb.steps) - wb.position)):
        try:
            wb.step()
        except PassError:
            same(wb)
            wb.disable(Failing.key)


def rewind(wb: adkit.Workbench, n: int) -> None:
    wb.rewind(n % (wb.position + 1))


def insert(wb: adkit.Workbench, n: int) -> None:
    if Doubled.key not in wb.steps:
        wb.insert(Doubled, after=PLACES[n % len(PLACES)])


def fail(wb: adkit.Workbench, n: int) -> None:
    """A pass that fails: the run goes on without it, or ends there."""
    if Failing.key not in wb.steps:
        wb.insert(Failing({"skip_on_error": n % 2 == 0}), after=PLACES[n % len(PLACES)])
        run(wb, n)


def switch(wb: adkit.Workbench, n: int) -> None:
    step = wb.steps[PLACES[n % len(PLACES)]]
    wb.configure(step.name, enabled=step.status == "disabled")


def look(wb: adkit.Workbench, n: int) -> None:
    """A look on the way fills in parts, of which nothing may stay behind."""
    writer(wb).complete()


def part(wb: adkit.Workbench, n: int) -> None:
    """A fork runs on; neither of the two sees what the other does."""
    if wb.position and isinstance(wb._state.module, GraphModule):
        other = fork(wb, wb.position)
        run(other, n)
        same(other)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.sampled_from([run, run, rewind, insert, fail, switch, look, part]), st.integers(1, 60)),
        min_size=2,
        max_size=6,
    )
)
def test_what_grew_is_what_is_made_at_once(exported: Any, eager: None, went: list[tuple[Any, int]]) -> None:
    wb = exported().run("post_export")
    for act, n in went:
        act(wb, n)
        same(wb)
    same(wb, whole)


def test_a_walk_is_told_while_it_runs(exported: Any, eager: None) -> None:
    wb = exported()
    wb.run()
    walked = wb.growing.walked
    assert len(walked.told) == wb.position
    assert walked.snapshots[-1] is [s for s in wb.steps if s.changed][-1].after
    told, graphs = walked.told[:], walked.graphs[:]
    same(wb, whole)
    assert all(a is b for a, b in zip(walked.told, told, strict=False)), "nothing was told a second time"
    assert all(a is b for a, b in zip(walked.graphs, graphs, strict=True))


def test_a_short_walk_is_told_when_somebody_looks(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adkit.growing.SECONDS_A_NODE", 1e6)
    wb = exported()
    wb.run()
    assert wb.growing._walked is None
    wb.explore()
    assert len(wb.growing.walked.told) == len(wb.steps)


def test_a_record_stays_as_it_was_when_the_walk_goes_on(exported: Any, eager: None) -> None:
    wb = exported().run("pattern_matcher")
    made = writer(wb)
    before = made.record.model_dump_json()
    fresh = RecordWriter(wb.steps)
    wb.run()
    wb.rewind("match_rmsnorm_pattern")
    assert made.record.model_dump_json() == before
    assert made.complete().graphs == fresh.complete().graphs
    assert made.costed() == fresh.costed()
    assert made.record.steps[-1].status == "pending"


def test_graphs_that_were_given_up_are_not_kept(exported: Any, eager: None) -> None:
    wb = exported()
    wb.run()
    index = wb.steps.keys().index("match_rmsnorm_pattern")
    given_up = [weakref.ref(s.after) for s in wb.steps[index:] if s.changed]
    assert len(given_up) > 1
    wb.rewind(index).step()  # what ran last is held by its log until the next one runs
    gc.collect()
    assert [g() for g in given_up] == [None] * len(given_up)
    same(wb)


def test_a_pass_does_not_fail_because_it_cannot_be_told(exported: Any, eager: None) -> None:
    wb = exported().run("post_export")

    def broken(*_: object) -> None:
        raise TypeError("cannot be told")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adkit.viz.record.rows.Rows.of", broken)
        wb.run()
        with pytest.raises(TypeError, match="cannot be told"):
            wb.explore()
    same(wb)
