"""Sampling kernels against a plain sort in float64: in triton's interpreter, or on a GPU; run by test_sampling.py."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adkit.ops.triton import sampling

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
assert INTERPRETED or torch.cuda.is_available(), "run through test_sampling.py"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OFF = (1.0, math.inf, math.inf, -math.inf)

if INTERPRETED:  # several slices without a large vocabulary
    sampling._SLICE = 16


def draw(logits: Tensor, rows: list[tuple[float, ...]]) -> list[int]:
    """``rows``: temperature, k, p, log of min-p and the uniform number of each."""
    given = torch.tensor(rows, dtype=torch.float64, device=DEVICE).T.contiguous()
    k, p = any(r[1] < math.inf for r in rows), any(r[2] < math.inf for r in rows)
    return sampling.draw(logits.to(DEVICE), given, k, p).tolist()


def intervals(logits: Tensor, temperature: float, k: float, p: float, min_p: float) -> Tensor:
    """The distribution function [V + 1] that is to be inverted; equal scores stand or fall together."""
    scores = (logits.double() - logits.double().max()) / temperature
    ranked = scores.sort(descending=True).values[: int(min(k, len(scores)))]
    probs = ranked.softmax(0)
    if p < math.inf:
        ranked = ranked[(probs.cumsum(0) - probs < p).nonzero().flatten()]
    allowed = (scores >= ranked[-1]) & (scores >= min_p)
    mass = torch.where(allowed, scores.exp(), 0.0)
    return torch.cat((torch.zeros(1).double(), (mass / mass.sum()).cumsum(0)))


def assert_drawn(token: int, logits: Tensor, row: tuple[float, ...]) -> None:
    bounds = intervals(logits, *row[:4])
    assert bounds[token] < bounds[token + 1], "ruled out"
    assert bounds[token] - 1e-6 <= row[4] <= bounds[token + 1] + 1e-6


@st.composite
def rows(draw: Any) -> tuple[float, ...]:
    return (
        draw(st.sampled_from([0.2, 1.0, 1.9])),
        draw(st.sampled_from([math.inf, 1.0, 2.0, 7.0, 20.0])),
        draw(st.sampled_from([math.inf, 0.05, 0.4371, 0.9123])),
        draw(st.sampled_from([-math.inf, math.log(0.1234), 0.0])),
        draw(st.sampled_from([0.0, 0.1379, 0.5113, 0.83119, 1 - 2**-32])),
    )


@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    vocab=st.sampled_from([1, 15, 16, 40]),
    wanted=st.lists(rows(), min_size=1, max_size=3),
    step=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 1000),
)
def test_any_filters_on_any_logits(
    dtype: torch.dtype, vocab: int, wanted: list[tuple[float, ...]], step: float, seed: int
) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    logits = torch.randn(len(wanted), vocab, generator=generator, device="cpu") * 2
    if step:
        logits = (logits / step).round() * step  # many equal scores, zeros of both signs
    logits = logits.to(dtype)
    tokens = draw(logits, wanted)
    for token, x, row in zip(tokens, logits, wanted, strict=True):
        assert_drawn(token, x, row)
    alone = draw(logits[:1], wanted[:1])
    assert alone == tokens[:1], "a row depends on its batch"


def test_the_draw_inverts_the_distribution_at_every_number() -> None:
    probs = torch.tensor([0.1, 0.0, 0.3, 0.05, 0.25, 0.3])
    numbers = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)
    tokens = draw(probs.log().expand(41, -1), [(*OFF, float(u)) for u in numbers])
    assert tokens == torch.searchsorted(probs.double().cumsum(0), numbers, right=True).tolist()
    assert set(tokens) == {0, 2, 3, 4, 5}


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_the_first_of_the_best(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(dtype)
    logits[0, 3] = logits[0, 40] = 9.0
    logits[1] = -math.inf
    logits[1, 33] = -5.0
    logits[2, 49] = 9.0
    want = [3, 33, 49, int(logits[3].argmax())]
    assert sampling.greedy(logits.to(DEVICE)).tolist() == want
    assert draw(logits, [(0.0, 5.0, 0.5, -math.inf, 0.9)] * 4) == want
    wide = torch.zeros(4, 100, dtype=dtype)
    wide[:, ::2] = logits
    assert sampling.greedy(wide.to(DEVICE)[:, ::2]).tolist() == want


@pytest.mark.parametrize("bad", [[math.nan], [math.inf], [-math.inf] * 50])
def test_rows_that_are_not_finite_give_no_token(bad: list[float]) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    wanted = [(1.0, 7.0, 0.9, -math.inf, 0.3)] * 3
    clean, best = draw(logits, wanted), logits.argmax(-1).tolist()
    logits[1, : len(bad)] = torch.tensor(bad)
    assert draw(logits, wanted) == [clean[0], -1, clean[2]]
    assert sampling.greedy(logits.to(DEVICE)).tolist() == [best[0], -1, best[2]]


def test_no_rows_give_no_tokens() -> None:
    empty = torch.zeros(0, 9, device=DEVICE)
    assert sampling.greedy(empty).shape == (0,)
    assert sampling.draw(empty, torch.zeros(5, 0, dtype=torch.float64), True, True).shape == (0,)
