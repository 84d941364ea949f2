"""Filters against transformers' own, draws against the distribution they invert."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.generation import logits_process as hf

from adkit.contract import SamplingParams
from adkit.ops import sampling
from adkit.runtime import sampler
from adkit.runtime.batch import build_batch
from adkit.runtime.sampler import _draw, _penalise_repetition, filter_scores, sample
from adkit.runtime.sequence import Sequence

PARAMS = [
    SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product((0.3, 1.0, 1.7), (0, 1, 7, 500), (1.0, 0.9, 0.05), (0.0, 0.1, 1.0))
]


def request(params, prompt=(1, 2, 3), output=()):
    sequence = Sequence(0, list(prompt), params, 10**6)
    sequence.tokens.extend(output)
    return sequence


def transformers_scores(logits, params):
    scores = hf.TemperatureLogitsWarper(params.temperature)(None, logits)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = hf.MinPLogitsWarper(params.min_p)(None, scores)
    return scores


def test_filtered_distributions_equal_transformers_one_by_one_in_one_batch():
    logits = torch.randn(len(PARAMS), 97, generator=torch.Generator().manual_seed(0)) * 3
    ours = filter_scores(logits, PARAMS).softmax(-1)
    theirs = torch.cat(
        [transformers_scores(x[None], p) for x, p in zip(logits, PARAMS, strict=True)]
    ).softmax(-1)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs)


def test_a_rows_distribution_does_not_depend_on_the_other_rows():
    logits = torch.randn(len(PARAMS), 97, generator=torch.Generator().manual_seed(1)) * 3
    together = filter_scores(logits, PARAMS)
    for i, params in enumerate(PARAMS):
        assert torch.equal(together[i : i + 1], filter_scores(logits[i : i + 1], [params]))


def test_repetition_penalty_equals_transformers_over_prompt_and_output():
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(2))
    prompt, output = [3, 4, 4], [9, 3]
    seen = torch.tensor([prompt + output])
    for penalty in (0.5, 1.8):
        expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits[:1])
        seqs = [
            request(SamplingParams(repetition_penalty=penalty), prompt, output),
            request(SamplingParams()),
        ]
        got = _penalise_repetition(logits, seqs)
        torch.testing.assert_close(got[:1], expected)
        assert torch.equal(got[1], logits[1])


def test_penalty_changes_the_greedy_choice():
    logits = torch.tensor([[1.0, 2.0, 1.9]])
    params = SamplingParams(repetition_penalty=1.5)
    assert sample(logits, [request(params, prompt=[1])]).token_ids.tolist() == [2]


def test_draws_invert_the_distribution_exactly():
    scores = torch.tensor([0.5, 0.0, 0.3, 0.2]).log()[None]
    uniform = torch.linspace(0, 1 - 2**-32, 1001, dtype=torch.float64)
    tokens = _draw(scores.expand(1001, -1), uniform)
    shares = torch.bincount(tokens, minlength=4) / 1001
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0, 0.3, 0.2]), atol=0.002, rtol=0)
    assert tokens.diff().min() >= 0


def test_draws_never_take_a_token_that_was_ruled_out():
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    uniform = torch.tensor([0.0, 0.5 - 2**-40, 0.5, 1 - 2**-32], dtype=torch.float64)
    assert _draw(scores.expand(4, -1), uniform).tolist() == [1, 1, 3, 3]


def test_seed_gives_the_same_tokens_again_and_other_seeds_others():
    logits = torch.zeros(1, 1000)

    def draw(seed):
        sequence = request(SamplingParams(temperature=1.0, seed=seed))
        return [sample(logits, [sequence]).token_ids.item() for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(-1) == draw(-1) != draw(1)
    assert len(set(draw(1))) > 4


def test_random_numbers_are_uniform_in_the_unit_interval():
    sequence = request(SamplingParams(seed=0))
    numbers = torch.tensor([sequence.uniform() for _ in range(4000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    deciles = torch.histc(numbers, 10, 0, 1) / 400
    assert (deciles - 1).abs().max() < 0.2


def test_greedy_and_sampled_rows_mix():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    seqs = [request(SamplingParams(temperature=float(i % 2), top_k=1)) for i in range(6)]
    assert torch.equal(sample(logits, seqs).token_ids, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1e-30, 1e9])
def test_extreme_temperatures_stay_finite(temperature):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(4))
    token = sample(
        logits, [request(SamplingParams(temperature=temperature, seed=0, top_p=0.9))]
    ).token_ids.item()
    assert 0 <= token < 50
    if temperature < 1:
        assert token == logits.argmax()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.5, seed=0)])
def test_rows_that_are_not_finite_are_marked_and_the_others_sampled(bad, params):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(5))
    clean = sample(logits, [request(params) for _ in range(3)]).token_ids.tolist()
    logits[1, 7] = bad
    got = sample(logits, [request(params) for _ in range(3)]).token_ids.tolist()
    assert got == [clean[0], -1, clean[2]]


def test_tokens_ruled_out_by_the_model_itself_are_no_fault():
    logits = torch.full((1, 5), -torch.inf)
    logits[0, 3] = 0.0
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=0.9, top_k=4, repetition_penalty=1.2),
    ):
        assert sample(logits, [request(params)]).token_ids.tolist() == [3]


def test_logprobs_are_the_models_own():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(6)).bfloat16()
    params = [
        SamplingParams(logprobs=0),
        SamplingParams(temperature=2.0, top_k=3, repetition_penalty=1.5, logprobs=4, seed=1),
        SamplingParams(),
    ]
    rows = sample(logits, [request(p) for p in params]).to_host(params)
    expected = logits.float().log_softmax(-1)
    (token0, logprob0), (token1, logprob1), (_, none) = rows
    assert none is None
    assert logprob0.token_id == token0
    assert logprob0.top == {}
    assert logprob0.logprob == pytest.approx(expected[0, token0].item())
    assert logprob1.logprob == pytest.approx(expected[1, token1].item())
    best = expected[1].topk(4)
    assert list(logprob1.top) == best.indices.tolist()
    assert list(logprob1.top.values()) == pytest.approx(best.values.tolist())


def test_where_a_kernel_does_not_compile_torch_draws_the_same_tokens(monkeypatch):
    asked = []

    def refuse(launcher, module, args, kwargs):
        asked.append(launcher)
        return NotImplemented

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(8))
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=3)
    for p, kernels in ((params, ["draw", "greedy"]), (SamplingParams(), ["greedy"])):
        for module in (sampler, sampling):
            monkeypatch.setattr(module, "kernels_can_run", lambda on_cuda: False)
        sequences = [request(p) for _ in range(3)]
        want = [sample(logits, sequences) for _ in range(2)]
        for module in (sampler, sampling):
            monkeypatch.setattr(module, "kernels_can_run", lambda on_cuda: True)
        monkeypatch.setattr(sampling, "attempt", refuse)
        sequences = [request(p) for _ in range(3)]
        got = [sample(logits, sequences) for _ in range(2)]
        assert asked == kernels * 2
        assert [g.token_ids.tolist() for g in got] == [w.token_ids.tolist() for w in want]
        asked.clear()


def test_draws_are_compiled_with_every_combination_of_filters(monkeypatch):
    asked = []

    def record(launcher, module, args, kwargs):
        logits, settings, top_k, top_p = args
        asked.append((launcher, logits.dtype, tuple(logits.shape), tuple(settings.shape), top_k, top_p))

    monkeypatch.setattr(sampling, "attempt", record)
    monkeypatch.setattr(sampling, "kernels_can_run", lambda on_cuda: on_cuda)
    sampling.compile_draws(50, torch.bfloat16, torch.device("cpu"))
    assert not asked, "no kernel runs on a CPU"
    monkeypatch.setattr(sampling, "kernels_can_run", lambda on_cuda: True)
    sampling.compile_draws(50, torch.bfloat16, torch.device("cpu"))
    kinds = itertools.product((False, True), repeat=2)
    assert asked == [("draw", torch.bfloat16, (1, 50), (5, 1), k, p) for k, p in kinds]


@pytest.mark.gpu
def test_on_a_gpu_packing_and_sampling_never_wait_and_give_the_cpus_tokens():
    params = [
        SamplingParams(logprobs=2),
        SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, seed=1),
        SamplingParams(temperature=0.8, top_k=20, repetition_penalty=1.2, seed=2, logprobs=1),
    ]
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(7))
    on_gpu = logits.cuda()
    sequences = [request(p) for p in params]
    for sequence in sequences:
        sequence.pages.append(1)
        sequence.num_scheduled = 3
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = build_batch(sequences, 16, pinned=True).to(on_gpu.device)
        sampled = sample(on_gpu, sequences).fetch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert batch.input_ids.tolist() == [[1, 2, 3] * 3]
    ours, theirs = sampled.to_host(params), sample(logits, [request(p) for p in params]).to_host(params)
    assert [token for token, _ in ours] == [token for token, _ in theirs]
    assert ours[0][1].logprob == pytest.approx(theirs[0][1].logprob)
