"""Ranks with sequences of their own: whoever serves a request, it gets the answer it gets alone."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adkit.contract import EngineConfig, RequestError, SamplingParams
from tests.runtime.conftest import Lab
from tests.runtime.split import balanced, drain, engine_of

GREEDY = SamplingParams(max_tokens=10, ignore_eos=True)
MODES = {"in_turn": {}, "overlapped": {"overlap": True}, "replayed": {"overlap": True, "replay": True}}

requests = st.lists(
    st.tuples(
        st.lists(st.integers(1, 4), min_size=1, max_size=24),  # few tokens: prefixes are often equal
        st.integers(1, 12),  # max_tokens
        st.integers(0, 8),  # arrives at this step
        st.none() | st.integers(0, 12),  # is cancelled at this step
    ),
    min_size=1,
    max_size=10,
)


@pytest.fixture(params=MODES, scope="session")
def mode(request):
    return MODES[request.param]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=requests,
    pools=st.integers(2, 3),
    num_pages=st.integers(8, 20),
    page_size=st.sampled_from([1, 2, 4]),
    max_num_tokens=st.integers(1, 60),
    max_batch_size=st.integers(1, 7),
)
def test_every_output_equals_running_alone(
    mode, requests, pools, num_pages, page_size, max_num_tokens, max_batch_size
):
    config = {"max_seq_len": 32, "max_num_tokens": max_num_tokens, "max_batch_size": max_batch_size}
    engine, models = engine_of(pools, num_pages, page_size, **config, **mode)
    handles, step, refused = {}, 0, 0
    while engine.has_work or len(handles) + refused < len(requests):
        for i, (prompt, max_tokens, arrival, _) in enumerate(requests):
            if arrival == step:
                try:
                    params = SamplingParams(max_tokens=max_tokens, ignore_eos=i % 2 == 0)
                    handles[i] = engine.add(prompt, params)
                except RequestError:
                    assert len(prompt) > engine.longest
                    refused += 1
        for i, handle in handles.items():
            if requests[i][3] == step:
                engine.cancel(handle)
        engine.step()
        balanced(engine)
        assert [s.id for s in engine.scheduler.waiting] == sorted(s.id for s in engine.scheduler.waiting)
        assert len(engine.scheduler.running) <= max_batch_size
        step += 1
        assert step < 3000, "no progress"
    assert not any(pages.held for pages in engine.pools)
    assert all(len(layouts) == 1 for layouts in engine.device.layouts), "ranks would wait for each other"
    share = EngineConfig(**config).share(pools)
    for model in models:
        assert all(t <= share.max_num_tokens and r <= share.max_batch_size for r, t, _ in model.shapes), (
            "more than a rank's share"
        )

    for i, handle in handles.items():
        prompt, max_tokens = requests[i][:2]
        expected = Lab.greedy_alone(prompt, max_tokens, min(32, engine.longest + 1), ignore_eos=i % 2 == 0)
        got = list(handle.completion().token_ids)
        assert got == expected[: len(got)]
        if handle.finish_reason != "cancelled":
            assert got == expected


def test_seeded_sampling_and_penalties_do_not_depend_on_ranks(mode):
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [2, 2], [3]]

    def params(i):
        return SamplingParams(
            max_tokens=12,
            ignore_eos=True,
            temperature=0.8 * (i % 2),
            seed=i,
            repetition_penalty=1 + 0.4 * (i % 3),
        )

    engine, _ = engine_of(2, 40, **mode)
    handles = [engine.add(p, params(i)) for i, p in enumerate(prompts)]
    drain(engine)
    assert {h.pool for h in handles} == {0, 1}
    for i, (handle, prompt) in enumerate(zip(handles, prompts, strict=True)):
        alone, _ = Lab.engine(64, 4)
        again = alone.add(prompt, params(i))
        Lab.drain(alone)
        assert handle.output == again.output


def test_requests_go_where_most_pages_are_left(mode):
    engine, _ = engine_of(3, 40, **mode)
    prompts = [[1] * 20, [2] * 4, [3] * 4, [4] * 4, [5] * 16]
    handles = [engine.add(p, GREEDY) for p in prompts]
    engine.step()
    assert [h.pool for h in handles] == [0, 1, 2, 1, 2]
    drain(engine)
    for handle, prompt in zip(handles, prompts, strict=True):
        assert handle.output == Lab.greedy_alone(prompt, 10, ignore_eos=True)
    assert engine.capacity == 3 * engine.longest == 3 * 39 * 4


def test_a_prefix_is_reused_by_the_rank_that_has_it_and_by_no_other(mode):
    engine, _ = engine_of(2, 40, **mode)
    prefix = list(range(1, 17))
    filler = [9, 9, 9, 9, 9]
    first = [engine.add(p, GREEDY) for p in (filler, [*prefix, 5])]
    drain(engine)
    assert [h.pool for h in first] == [0, 1]
    second = engine.add([*prefix, 6], GREEDY)
    drain(engine)
    assert second.pool == 1
    assert engine.stats.reused_tokens == 16
    assert second.output == Lab.greedy_alone([*prefix, 6], 10, ignore_eos=True)


def test_the_youngest_of_a_rank_makes_room_there_and_may_go_on_elsewhere(mode):
    engine, _ = engine_of(2, 12, 2, max_num_tokens=64, **mode)
    long = SamplingParams(max_tokens=14, ignore_eos=True)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [1, 1], [5], [6, 6]]
    handles = [engine.add(p, long) for p in prompts]
    seen: list[set[int]] = [set() for _ in handles]
    while engine.has_work:
        engine.step()
        balanced(engine)
        for i, h in enumerate(handles):
            seen[i] |= {h.pool} if len(h.pages) else set()
    assert engine.stats.preemptions > 0
    for handle, prompt in zip(handles, prompts, strict=True):
        assert handle.output == Lab.greedy_alone(prompt, 14, ignore_eos=True)
    assert all(seen)


def test_a_rank_without_sequences_runs_padding(mode):
    engine, models = engine_of(3, 20, **mode)
    only = engine.add([1, 2, 3], GREEDY)
    drain(engine)
    assert only.output == Lab.greedy_alone([1, 2, 3], 10, ignore_eos=True)
    assert models[0].steps == 10
    assert [m.idle for m in models[1:]] == [10, 10]
    assert [m.steps for m in models[1:]] == [0, 0]


def test_bad_logits_end_one_request_and_wipe_pages_of_its_own_rank_alone(mode):
    engine, models = engine_of(2, 20, **mode)
    for model in models:
        model.poison = 30
    good, bad = engine.add([1, 2, 3], GREEDY), engine.add([30, 2, 3], GREEDY)
    drain(engine)
    assert (good.pool, bad.pool) == (0, 1)
    assert bad.finish_reason == "error"
    expected = Lab.greedy_alone([1, 2, 3], 10, ignore_eos=True)
    clean = expected.index(30) + 1 if 30 in expected else len(expected)
    assert good.output[:clean] == expected[:clean]
    caches = [m.pool.tensors["record_cache"] for m in models]
    assert caches[0][1:].max() > 0  # what the good one wrote
    assert not (caches[1][1:] > 0).any()


def test_sizes_are_shared_out():
    config = EngineConfig(max_batch_size=5, max_num_tokens=100)
    assert config.share(1) is config
    share = config.share(3)
    assert (share.max_batch_size, share.max_num_tokens, share.max_seq_len) == (2, 34, config.max_seq_len)
