"""An engine over two processes gives what an engine in one gives."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from adkit.contract import DistConfig, RankError, SamplingParams
from adkit.runtime import LiveModel
from adkit.runtime.ranks import start_processes
from tests.forked_ranks import gone
from tests.runtime.conftest import Lab
from tests.runtime.ranks.conftest import engine_of, start

PROMPTS = [[i + 1, 2, 3] * (1 + i % 3) for i in range(6)]
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)
KINDS = [{}, {"replay": True, "drift": True}]


@pytest.fixture(params=KINDS, ids=["eager", "replayed_and_drifting"])
def world(worlds, request):
    """Ranks that differ in their logits (``drift``) must all the same go on with rank 0's tokens."""
    return worlds(**request.param)


@pytest.mark.parametrize("overlap", [False, True])
def test_greedy_answers_are_the_models_own(world, overlap):
    engine = engine_of(world, overlap=overlap, max_batch_size=4, max_num_tokens=8)
    handles = [engine.add(p, GREEDY) for p in PROMPTS]
    Lab.drain(engine)
    assert [h.output for h in handles] == [Lab.greedy_alone(p, 20, ignore_eos=True) for p in PROMPTS]


@pytest.mark.parametrize("overlap", [False, True])
def test_sampled_answers_and_logprobs_are_those_of_one_process(world, overlap):
    params = [
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.9, seed=5, top_k=7),
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.3, seed=6, top_p=0.8, logprobs=3),
        SamplingParams(max_tokens=12, ignore_eos=True, repetition_penalty=1e6),
        SamplingParams(max_tokens=12, ignore_eos=True),
    ]
    alone, _ = Lab.engine(64, 4, overlap=overlap)
    together = engine_of(world, overlap=overlap)
    answers = []
    for engine in (alone, together):
        handles = [engine.add(p, q) for p, q in zip(PROMPTS, params, strict=False)]
        Lab.drain(engine)
        answers.append([h.completion() for h in handles])
    assert answers[0] == answers[1]


def test_pages_run_short_and_requests_make_room(worlds):
    engine = engine_of(worlds(), overlap=True)
    engine.pages._free = type(engine.pages._free)(list(engine.pages._free)[:12])
    engine.pages.num_pages = 13
    engine.pages._holders = [0] * 13
    handles = [engine.add(p, GREEDY) for p in PROMPTS]
    Lab.drain(engine)
    assert engine.stats.preemptions
    assert [h.output for h in handles] == [Lab.greedy_alone(p, 20, ignore_eos=True) for p in PROMPTS]


def test_streaming_cancelling_and_going_on(world):
    live = LiveModel(world[0], engine_of(world).config, device=world[1])
    stream = live.stream([PROMPTS[0], PROMPTS[1]], GREEDY)
    first = next(stream)
    assert first.token_ids == (Lab.greedy_alone(PROMPTS[0], 1, ignore_eos=True)[0],)
    stream.close()
    assert not live.engine.has_work
    answer = live.generate(PROMPTS[2], GREEDY, progress=False)
    assert list(answer.token_ids) == Lab.greedy_alone(PROMPTS[2], 20, ignore_eos=True)


def test_a_request_whose_logits_turn_bad_ends_alone_and_its_pages_are_wiped_everywhere(worlds):
    expected = Lab.greedy_alone([1, 2], 10, ignore_eos=True)
    poison = next(t for n, t in enumerate(expected) if n > 2 and t not in expected[:n])
    engine = engine_of(worlds(poison=poison), overlap=True)
    bad = engine.add([1, 2], GREEDY)
    Lab.drain(engine)
    assert bad.finish_reason == "error"
    assert bad.output == expected[: expected.index(poison) + 1]
    prompt = next(
        [p, p] for p in range(3, 30) if poison not in [p, *Lab.greedy_alone([p, p], 10, ignore_eos=True)]
    )
    good = engine.add(prompt, SamplingParams(max_tokens=10, ignore_eos=True))
    Lab.drain(engine)
    assert good.output == Lab.greedy_alone(prompt, 10, ignore_eos=True)


@pytest.mark.parametrize("seconds", [0.02, 0.035, 0.05])
def test_an_interrupt_leaves_ranks_that_go_on(world, seconds):
    """It strikes while the engine waits for a step, or packs, or sends."""
    live = LiveModel(world[0], engine_of(world, overlap=True).config, device=world[1])
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - it may come before the first request
        timer.start()
        live.generate(PROMPTS * 40, SamplingParams(max_tokens=50, ignore_eos=True), progress=False)
    assert not live.engine.has_work
    answer = live.generate(PROMPTS[3], GREEDY, progress=False)
    assert list(answer.token_ids) == Lab.greedy_alone(PROMPTS[3], 20, ignore_eos=True)


def test_exchanges_over_any_dimension_and_dtype():
    model, device = start_processes(
        "tests.runtime.ranks.toy:exchanges", {}, DistConfig.of(tp=2), device="cpu"
    )
    assert model.vocab_size == Lab.VOCAB
    device.close()


def test_close_ends_the_processes_and_what_comes_after_says_so():
    world = start()
    pids = [m.pid for m in world[1].crew.members.values()]
    with LiveModel(world[0], engine_of(world).config, device=world[1]) as live:
        live.generate(PROMPTS[0], GREEDY, progress=False)
    assert gone(pids)
    with pytest.raises(RankError, match="close"):
        live.generate(PROMPTS[0], GREEDY, progress=False)
    live.close()
