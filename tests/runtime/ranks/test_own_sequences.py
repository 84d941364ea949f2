"""Two processes that each have sequences, and a cache, of their own: the engine gives what it gives in one."""

from __future__ import annotations

import pytest
import torch

from adkit.contract import BatchLayout, HostBatch, SamplingParams, SplitBatch
from adkit.runtime.ranks.messages import Step, decode, encode
from tests.runtime.conftest import Lab
from tests.runtime.ranks.conftest import engine_of
from tests.runtime.split import balanced, drain

PROMPTS = [[i + 1, 2, 3] * (1 + i % 3) for i in range(7)]
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
KINDS = [{}, {"replay": True, "drift": True}]


@pytest.fixture(params=KINDS, ids=["eager", "replayed_and_drifting"])
def world(worlds, request):
    return worlds(attention_dp=True, **request.param)


@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_answers_are_the_models_own(world, overlap):
    engine = engine_of(world, overlap=overlap, max_batch_size=6, max_num_tokens=12)
    handles = [engine.add(p, GREEDY) for p in PROMPTS]
    engine.step()
    assert len(engine.pools) == 2
    assert all(pages.held for pages in engine.pools)  # both have some
    drain(engine)
    assert [h.output for h in handles] == [Lab.greedy_alone(p, 20, ignore_eos=True) for p in PROMPTS]
    assert {h.pool for h in handles} == {0, 1}


@pytest.mark.parametrize("overlap", [False, True])
def test_sampled_answers_and_logprobs_are_those_of_one_process(world, overlap):
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, seed=5, top_k=7),
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.3, seed=6, top_p=0.8, logprobs=3),
        SamplingParams(max_tokens=12, ignore_eos=True, repetition_penalty=1e6),
        SamplingParams(max_tokens=12, ignore_eos=True),
    ]
    alone, _ = Lab.engine(64, 4, overlap=overlap)
    answers = []
    for engine in (alone, engine_of(world, overlap=overlap)):
        handles = [engine.add(p, q) for p, q in zip(PROMPTS, params, strict=False)]
        drain(engine)
        answers.append([h.completion() for h in handles])
    assert answers[0] == answers[1]


def test_one_request_alone_and_prefixes_again(world):
    engine = engine_of(world, overlap=True)
    prompt = list(range(1, 18))
    for again in range(2):
        handle = engine.add(prompt, GREEDY)
        drain(engine)
        assert handle.output == Lab.greedy_alone(prompt, 20, ignore_eos=True)
        assert engine.stats.reused_tokens == 16 * again


def test_rank_0_samples_for_sequences_in_flight_on_another_rank(world):
    """It has none itself by then, and must know all the same which token the other's penalty counts last."""
    engine = engine_of(world, overlap=True)
    params = SamplingParams(max_tokens=14, ignore_eos=True, repetition_penalty=1e6)
    engine.add([9, 9, 9], SamplingParams(max_tokens=2, ignore_eos=True))
    handle = engine.add([1, 2], params)
    drain(engine)
    assert handle.pool == 1
    alone, _ = Lab.engine(64, 4)
    again = alone.add([1, 2], params)
    Lab.drain(alone)
    assert handle.output == again.output
    assert len(set(handle.output)) == 14


def test_pages_run_short_and_requests_make_room(worlds):
    engine = engine_of(worlds(attention_dp=True, pages=12), overlap=True)
    handles = [engine.add(p, GREEDY) for p in PROMPTS]
    while engine.has_work:
        engine.step()
        balanced(engine)
    assert engine.stats.preemptions
    assert [h.output for h in handles] == [Lab.greedy_alone(p, 20, ignore_eos=True) for p in PROMPTS]


def test_bad_logits_end_one_request_and_spare_the_other_ranks_pages(worlds):
    expected = Lab.greedy_alone([1, 2], 10, ignore_eos=True)
    poison = next(t for n, t in enumerate(expected) if n > 2 and t not in expected[:n])
    prompt = next(
        [p, p] for p in range(3, 30) if poison not in [p, *Lab.greedy_alone([p, p], 20, ignore_eos=True)]
    )
    engine = engine_of(worlds(attention_dp=True, poison=poison), overlap=True)
    bad, good = engine.add([1, 2], GREEDY), engine.add(prompt, GREEDY)
    drain(engine)
    assert (bad.pool, good.pool) == (0, 1)
    assert bad.finish_reason == "error"
    assert bad.output == expected[: expected.index(poison) + 1]
    assert good.output == Lab.greedy_alone(
        prompt, 20, ignore_eos=True
    )  # page numbers are those of the bad one


def test_a_part_of_a_step_survives_the_wire():
    layout = BatchLayout(3, 2, 16, 2)
    parts = []
    for rank in range(2):
        buffer = torch.randint(256, (layout.nbytes,), dtype=torch.uint8)
        parts.append(HostBatch(layout, buffer, rank, continues=True, shares=(1, 2)))
    step = Step(7, True, False, 3, SplitBatch(tuple(parts)))
    for rank, part in enumerate(parts):
        got = decode(memoryview(encode(step.of(rank))))
        assert (got.number, got.replay, got.plain, got.rows) == (7, True, False, 3)
        assert torch.equal(got.host.buffer, part.buffer)
        assert (got.host.layout, got.host.logits) == (layout, rank)
        assert (got.host.continues, got.host.shares) == (True, (1, 2))
