"""Steps in flight: what is launched before what is known, and what becomes of it when things go wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adkit.contract import EngineError, MemoryLimitError, SamplingParams
from adkit.runtime import launch

IGNORE = SamplingParams(max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module", params=["overlapped", "replayed"])
def lab(modes, request):
    return modes[request.param]


def after(steps, fault):
    """A fault that strikes once, at the model's run after so many."""

    def strike(model):
        if model.steps == steps:
            model.fault = lambda model: None
            fault()

    return strike


def test_a_step_is_launched_before_the_one_before_is_read(lab):
    engine, model = lab.engine()
    handle = engine.add([1, 2, 3], IGNORE)
    assert engine.step() == []
    assert (model.steps, handle.num_output, handle.num_pending) == (1, 0, 1)
    (delta,) = engine.step()
    assert (model.steps, handle.num_output, handle.num_pending) == (2, 1, 1)
    assert delta.token_ids == tuple(handle.output)
    lab.drain(engine)
    assert handle.output == lab.greedy_alone([1, 2, 3], 10, ignore_eos=True)


def test_a_request_that_ends_by_length_runs_no_step_in_vain(lab):
    engine, model = lab.engine()
    engine.add([1, 2, 3], IGNORE)
    lab.drain(engine)
    assert model.steps == 10


def test_a_request_that_stops_runs_one_step_in_vain_and_shows_nothing_of_it(lab):
    expected = lab.greedy_alone([3, 1], 20, ignore_eos=True)
    engine, model = lab.engine()
    params = SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=[expected[5]])
    handle = engine.add([3, 1], params)
    lab.drain(engine)
    until = expected.index(expected[5]) + 1
    assert handle.output == expected[:until]
    assert (model.steps, engine.stats.output_tokens) == (until + 1, until)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompts=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=9), min_size=2, max_size=6),
    steps=st.integers(1, 12),
    num_pages=st.integers(6, 14),
)
def test_freed_pages_are_reused_while_their_last_holder_is_in_flight(lab, prompts, steps, num_pages):
    engine, _ = lab.engine(num_pages, 2, max_seq_len=20)
    cancelled = [engine.add(p, IGNORE) for p in prompts]
    for _ in range(steps):
        engine.step()
    for handle in cancelled:
        engine.cancel(handle)
    assert engine.pages.held == 0
    handles = [engine.add(p, IGNORE) for p in reversed(prompts)]
    lab.drain(engine)
    room = min(20, engine.capacity + 1)
    for handle, prompt in zip(handles, reversed(prompts), strict=True):
        assert handle.output == lab.greedy_alone(prompt, 10, room, ignore_eos=True)


def test_cancelling_in_mid_stream_keeps_what_was_read_and_spares_the_others(lab):
    engine, _ = lab.engine()
    stays, goes = engine.add([1, 2], IGNORE), engine.add([3, 4], IGNORE)
    for _ in range(4):
        engine.step()
    engine.cancel(goes)
    assert (goes.finish_reason, goes.num_output, goes.num_pending) == ("cancelled", 3, 1)
    assert engine.pages.held == len(stays.pages)
    lab.drain(engine)
    assert goes.num_output == 3
    assert stays.output == lab.greedy_alone([1, 2], 10, ignore_eos=True)


def test_a_launch_that_fails_loses_nothing_of_the_step_in_flight(lab):
    engine, model = lab.engine(max_batch_size=2)
    handles = [engine.add([n, 2], IGNORE) for n in (1, 2, 3)]

    def out_of_memory():
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    model.fault = after(4, out_of_memory)
    lab.drain(engine)
    for handle, first in zip(handles[:2], (1, 2), strict=True):
        assert (handle.finish_reason, handle.num_output) == ("error", 4)
        assert isinstance(handle.error, MemoryLimitError)
        assert "2 tokens in 2 sequences" in str(handle.error)
        assert handle.output == lab.greedy_alone([first, 2], 10, ignore_eos=True)[:4]
    assert handles[2].output == lab.greedy_alone([3, 2], 10, ignore_eos=True)


def test_a_request_that_ended_in_flight_is_no_part_of_the_failure(lab):
    expected = lab.greedy_alone([3, 1], 5, ignore_eos=True)
    engine, model = lab.engine()

    def fail():
        raise ValueError("bad luck")

    model.fault = after(2, fail)
    ends = engine.add([3, 1], SamplingParams(stop_token_ids=[expected[1]], ignore_eos=True))
    fails = engine.add([1, 2], IGNORE)
    lab.drain(engine)
    assert (ends.finish_reason, fails.finish_reason) == ("stop", "error")
    assert ends.output == expected[:2]
    assert isinstance(fails.error, EngineError)
    assert "ValueError: bad luck" in str(fails.error)


def test_an_error_that_shows_when_tokens_are_read_ends_that_steps_requests(lab, monkeypatch):
    engine, _ = lab.engine(max_batch_size=1)
    bad, good = engine.add([1, 2], IGNORE), engine.add([3, 4], IGNORE)
    engine.step()

    def lost(step):
        monkeypatch.undo()
        raise RuntimeError("the device went away")

    monkeypatch.setattr(launch.InFlight, "wait", lost)
    lab.drain(engine)
    assert bad.finish_reason == "error"
    assert "the device went away" in str(bad.error)
    assert good.output == lab.greedy_alone([3, 4], 10, ignore_eos=True)


def test_logits_that_turn_bad_in_flight_end_one_request_and_its_pages_are_wiped(lab):
    expected = lab.greedy_alone([1, 2], 10, ignore_eos=True)
    engine, model = lab.engine(16, 4)
    poison = model.poison = next(t for n, t in enumerate(expected) if n > 2 and t not in expected[:n])
    other = next(
        p for p in range(3, 30) if p != poison and poison not in lab.greedy_alone([p, p], 10, ignore_eos=True)
    )
    bad, good = engine.add([1, 2], IGNORE), engine.add([other, other], IGNORE)
    lab.drain(engine)
    assert bad.finish_reason == "error"
    assert "not finite" in str(bad.error)
    assert bad.output == expected[: expected.index(poison) + 1]
    assert good.output == lab.greedy_alone([other, other], 10, ignore_eos=True)
    assert (model.pool.tensors["record_cache"][..., 0] != poison).all()


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_an_interrupt_cancels_what_is_in_flight_too(lab, monkeypatch, where):
    engine, model = lab.engine(16, 4)
    handles = [engine.add([n, 2], IGNORE) for n in (1, 2)]
    for _ in range(3):
        engine.step()

    def interrupt(*_):
        monkeypatch.undo()
        model.fault = lambda model: None
        raise KeyboardInterrupt

    if where == "launch":
        model.fault = interrupt
    else:
        monkeypatch.setattr(launch.InFlight, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [(h.finish_reason, h.num_output) for h in handles] == [("cancelled", 2)] * 2
    assert not engine.has_work
    assert engine.step() == []
    handle = engine.add([1, 2], IGNORE)
    lab.drain(engine)
    assert handle.output == lab.greedy_alone([1, 2], 10, ignore_eos=True)


def test_the_repetition_penalty_counts_the_token_in_flight(lab):
    """With so strong a penalty no token comes twice while there are others."""
    engine, _ = lab.engine()
    params = SamplingParams(max_tokens=lab.VOCAB - 2, ignore_eos=True, repetition_penalty=1e6)
    handle = engine.add([1, 2], params)
    lab.drain(engine)
    assert len({1, 2, *handle.output}) == lab.VOCAB


def test_a_steady_batch_is_packed_once(modes, monkeypatch):
    lab, packed = modes["replayed"], []
    engine, _ = lab.engine()
    build = launch.build_batch
    monkeypatch.setattr(
        launch, "build_batch", lambda *args, **more: packed.append(args) or build(*args, **more)
    )
    handles = [engine.add([n, 2], SamplingParams(max_tokens=30, ignore_eos=True)) for n in (1, 2)]
    lab.drain(engine)
    assert len(packed) == 2, "the prompts, and the first decode step"
    for handle, first in zip(handles, (1, 2), strict=True):
        assert handle.output == lab.greedy_alone([first, 2], 30, ignore_eos=True)


def test_after_a_launch_that_failed_rows_are_not_counted_on(modes):
    lab = modes["replayed"]
    engine, model = lab.engine()
    fails = engine.add([1, 2], IGNORE)

    def fail():
        raise ValueError("bad luck")

    model.fault = after(4, fail)
    lab.drain(engine)
    assert fails.finish_reason == "error"
    handle = engine.add([1, 2], IGNORE)
    lab.drain(engine)
    assert handle.output == lab.greedy_alone([1, 2], 10, ignore_eos=True)
