"""Whatever happens around a request, it gets the answer it gets alone, and the pages come back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adkit.contract import EngineError, MemoryLimitError, RequestError, SamplingParams

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

requests = st.lists(
    st.tuples(
        st.lists(st.integers(1, 4), min_size=1, max_size=24),  # few tokens: prefixes are often equal
        st.integers(1, 12),  # max_tokens
        st.integers(0, 8),  # arrives at this step
        st.none() | st.integers(0, 12),  # is cancelled at this step
        st.lists(st.integers(0, 30), max_size=3).map(tuple),  # stop tokens
    ),
    min_size=1,
    max_size=8,
)


@FAST
@given(
    requests=requests,
    num_pages=st.integers(8, 24),
    page_size=st.sampled_from([1, 2, 4]),
    max_num_tokens=st.integers(1, 40),
    max_batch_size=st.integers(1, 6),
)
def test_every_output_equals_running_alone(
    lab, requests, num_pages, page_size, max_num_tokens, max_batch_size
):
    engine, model = lab.engine(
        num_pages, page_size, max_seq_len=32, max_num_tokens=max_num_tokens, max_batch_size=max_batch_size
    )
    handles, step, refused = {}, 0, 0
    while engine.has_work or len(handles) + refused < len(requests):
        for i, (prompt, max_tokens, arrival, _, stop) in enumerate(requests):
            if arrival == step:
                try:
                    params = SamplingParams(max_tokens=max_tokens, ignore_eos=i % 2 == 0, stop_token_ids=stop)
                    handles[i] = engine.add(prompt, params)
                except RequestError:
                    assert len(prompt) > engine.capacity
                    refused += 1
        for i, handle in handles.items():
            if requests[i][3] == step:
                engine.cancel(handle)
        assert bool(engine.step()) <= bool(handles)
        engine.pages.check(s.pages for s in engine.scheduler)
        in_line = [s.id for s in engine.scheduler]
        assert in_line == sorted(in_line), "somebody jumped the queue"
        assert len(engine.scheduler.running) <= max_batch_size
        step += 1
        assert step < 3000, "no progress"
    assert engine.pages.held == 0
    assert (
        engine._in_flight is None or not lab.OVERLAP or all(s.finished for s in engine._in_flight.sequences)
    )
    assert all(tokens <= max_num_tokens and rows <= max_batch_size for rows, tokens, _ in model.shapes)

    for i, handle in handles.items():
        prompt, max_tokens, _, _, stop = requests[i]
        most = min(32, engine.capacity + 1)
        expected = lab.greedy_alone(prompt, max_tokens, most, ignore_eos=i % 2 == 0, stop=stop)
        got = handle.completion()
        assert list(got.token_ids) == expected[: len(got.token_ids)]
        if got.finish_reason != "cancelled":
            assert list(got.token_ids) == expected
            stopped = expected[-1] in stop or (expected[-1] == lab.EOS and i % 2)
            assert got.finish_reason == ("stop" if stopped else "length")


@FAST
@given(requests=requests, num_pages=st.integers(10, 20), max_num_tokens=st.integers(1, 30))
def test_seeded_sampling_does_not_depend_on_company(lab, requests, num_pages, max_num_tokens):
    def params(i):
        return SamplingParams(
            max_tokens=requests[i][1],
            temperature=0.7 + 0.2 * (i % 3),
            top_k=[0, 5, 0, 12][i % 4],
            top_p=[1.0, 1.0, 0.8, 0.9][i % 4],
            min_p=[0.0, 0.05][i % 2],
            repetition_penalty=[1.0, 1.3, 1.0][i % 3],
            seed=i,
        )

    engine, _ = lab.engine(num_pages, 4, max_seq_len=37, max_num_tokens=max_num_tokens, max_batch_size=4)
    together = [engine.add(r[0], params(i)) for i, r in enumerate(requests)]
    lab.drain(engine)
    for i, handle in enumerate(together):
        alone, _ = lab.engine(64, 4, max_seq_len=37)
        again = alone.add(requests[i][0], params(i))
        lab.drain(alone)
        assert handle.output == again.output


def test_preemption_recomputes_and_changes_nothing(lab):
    engine, _ = lab.engine(9, 2, max_num_tokens=64)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    handles = [engine.add(p, SamplingParams(max_tokens=10, ignore_eos=True)) for p in prompts]
    lab.drain(engine)
    assert engine.stats.preemptions > 0
    for handle, prompt in zip(handles, prompts, strict=True):
        assert handle.output == lab.greedy_alone(prompt, 10, ignore_eos=True)


def test_equal_prefixes_are_computed_once(lab):
    engine, _ = lab.engine(64, 4)
    prefix = list(range(1, 17))
    first = engine.add([*prefix, 5], SamplingParams(max_tokens=3, ignore_eos=True))
    lab.drain(engine)
    computed = engine.stats.computed_tokens
    second = engine.add([*prefix, 6], SamplingParams(max_tokens=3, ignore_eos=True))
    lab.drain(engine)
    assert engine.stats.reused_tokens == 16
    assert engine.stats.computed_tokens - computed == 1 + 2
    assert first.output == lab.greedy_alone([*prefix, 5], 3, ignore_eos=True)
    assert second.output == lab.greedy_alone([*prefix, 6], 3, ignore_eos=True)


def test_prefix_is_not_shared_across_prompt_lengths_where_rope_depends_on_them(lab):
    engine, _ = lab.engine(64, 4)
    prefix = list(range(1, 17))
    for prompt in ([*prefix, 5], [*prefix, 5, 6]):
        handle = engine.add(prompt, SamplingParams(max_tokens=3, ignore_eos=True))
        lab.drain(engine)
        assert handle.output == lab.greedy_alone(prompt, 3, ignore_eos=True)
    assert engine.stats.reused_tokens == 0


def test_long_prompt_is_chunked_while_others_decode(lab):
    engine, model = lab.engine(64, 4, max_num_tokens=8)
    short = engine.add([1, 2], SamplingParams(max_tokens=12, ignore_eos=True))
    engine.step()
    long = engine.add(list(range(1, 31)), SamplingParams(max_tokens=2, ignore_eos=True))
    engine.step()
    assert model.shapes[-1] == (2, 8, 1), (
        "one decode token and seven of the prompt, logits for the decode only"
    )
    assert (short.num_output + short.num_pending, long.num_cached, long.num_output) == (2, 7, 0)
    lab.drain(engine)
    assert long.output == lab.greedy_alone(list(range(1, 31)), 2, ignore_eos=True)


def test_first_come_first_served(lab):
    engine, _ = lab.engine(64, 4, max_batch_size=1)
    handles = [engine.add([i + 1], SamplingParams(max_tokens=2, ignore_eos=True)) for i in range(4)]
    order = []
    while engine.has_work:
        order += [d.index for d in engine.step() if d.finish_reason]
    assert order == [h.id for h in handles]


def test_out_of_memory_ends_the_steps_requests_and_not_the_waiting_ones(lab):
    engine, model = lab.engine(64, 4, max_batch_size=2)
    handles = [engine.add([i + 1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True)) for i in range(3)]

    def fail(model):
        model.fault = lambda model: None
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    model.fault = fail
    deltas = engine.step()
    assert [(d.index, d.finish_reason) for d in deltas] == [(0, "error"), (1, "error")]
    assert all(isinstance(h.error, MemoryLimitError) for h in handles[:2])
    assert "6 tokens in 2 sequences" in deltas[0].error
    assert "max_num_tokens" in deltas[0].error
    assert engine.pages.held == 0
    lab.drain(engine)
    assert handles[2].output == lab.greedy_alone([3, 2, 3], 4, ignore_eos=True)


def test_not_finite_logits_end_only_their_own_request(lab):
    engine, model = lab.engine(64, 4)
    model.poison = 7
    good = engine.add([1, 2, 3, 4, 5], SamplingParams(max_tokens=6, ignore_eos=True))
    bad = engine.add([1, 2, 3, 4, 7], SamplingParams(max_tokens=6, ignore_eos=True))
    sampled = engine.add([2, 7], SamplingParams(max_tokens=6, temperature=1.0, top_p=0.9, logprobs=2))
    lab.drain(engine)
    for request in (bad, sampled):
        assert request.finish_reason == "error"
        assert isinstance(request.error, EngineError)
        assert "not finite" in request.completion().error
        assert request.output == []
    expected = lab.greedy_alone([1, 2, 3, 4, 5], 6, ignore_eos=True)
    poisoned_at = next((n for n, t in enumerate(expected) if t == 7), len(expected) - 1)
    assert good.output == expected[: poisoned_at + 1]


def test_pages_of_a_failed_request_are_wiped_and_not_found_again(lab):
    engine, model = lab.engine(6, 4)
    model.poison = 7
    engine.add([7, 1, 2, 3, 4], SamplingParams())
    lab.drain(engine)
    assert engine.pages.find([]) == []
    assert not engine.pages._page_of
    assert (model.pool.tensors["record_cache"] != 7).all()
    model.poison = None
    handle = engine.add([7, 1, 2, 3, 4], SamplingParams(max_tokens=3, ignore_eos=True))
    lab.drain(engine)
    assert handle.output == lab.greedy_alone([7, 1, 2, 3, 4], 3, ignore_eos=True)


def test_interrupt_cancels_everything_and_leaves_the_engine_usable(lab):
    engine, model = lab.engine(16, 4, max_batch_size=2)
    handles = [engine.add([i + 1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True)) for i in range(3)]
    lab.answered(engine)

    def interrupt(model):
        model.fault = lambda model: None
        raise KeyboardInterrupt

    model.fault = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert [h.finish_reason for h in handles] == ["cancelled"] * 3
    assert handles[0].num_output == 1
    assert not engine.has_work
    assert engine.pages.held == 0
    handle = engine.add([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    lab.drain(engine)
    assert handle.output == lab.greedy_alone([1, 2, 3], 4, ignore_eos=True)
    assert engine.stats.requests == 4


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "empty"),
        ([1, 31], SamplingParams(), "Token id 31 at position 1.*31 tokens"),
        ([-1], SamplingParams(), "Token id -1 at position 0"),
        ([1.5], SamplingParams(), "integers"),
        ([2**70], SamplingParams(), "integers"),
        (
            [1] * 64,
            SamplingParams(),
            r"64 tokens; max_seq_len is 64, .*Shorten the prompt, or raise max_seq_len\.$",
        ),
        ([1], {"temperature": 1}, "expected a SamplingParams"),
        ([1], SamplingParams(stop="x"), "stop_token_ids"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(lab, prompt, params, message):
    engine, _ = lab.engine()
    with pytest.raises(RequestError, match=message):
        engine.add(prompt, params)
    assert not engine.has_work


def test_prompt_that_can_never_fit_the_cache_is_refused_with_the_numbers(lab):
    engine, _ = lab.engine(4, 4)
    with pytest.raises(
        RequestError, match=r"13 tokens.*max_seq_len is 64, but the cache holds 12 tokens.*Shorten"
    ):
        engine.add([1] * 13)
    handle = engine.add([1] * 12, SamplingParams(max_tokens=5))
    lab.drain(engine)
    assert handle.num_output == 1, "the first new token needs no room in the cache"


def test_output_ends_where_max_seq_len_does(lab):
    engine, _ = lab.engine(64, 4, max_seq_len=10)
    handle = engine.add([1] * 6, SamplingParams(max_tokens=50, ignore_eos=True))
    lab.drain(engine)
    assert (handle.num_output, handle.finish_reason) == (4, "length")


def test_stop_token_ids_end_as_eos_does(lab):
    expected = lab.greedy_alone([3, 1], 20, ignore_eos=True)
    engine, _ = lab.engine()
    handle = engine.add([3, 1], SamplingParams(max_tokens=20, ignore_eos=True, stop_token_ids=[expected[5]]))
    lab.drain(engine)
    assert handle.output == expected[: expected.index(expected[5]) + 1]
    assert handle.finish_reason == "stop"


def test_a_cache_without_room_is_refused(lab):
    with pytest.raises(MemoryLimitError, match="1 pages"):
        lab.engine(1)


def test_unseeded_sampling_follows_torch_manual_seed(lab):
    def run():
        torch.manual_seed(3)
        engine, _ = lab.engine()
        handle = engine.add([1, 2], SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True))
        other = engine.add([1, 2], SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True))
        lab.drain(engine)
        assert handle.output != other.output
        return handle.output

    assert run() == run()
