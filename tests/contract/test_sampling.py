"""Sampling values out of range are refused with the value and the range."""

from __future__ import annotations

import numpy as np
import pytest

from adkit.contract import Completion, Completions, RequestError, SamplingParams


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.5},
        {"max_tokens": None},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -2.0},
        {"seed": 0.5},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": 5},
        {"stop_token_ids": ["a"]},
        {"ignore_eos": "no"},
        {"ignore_eos": 1},
        {"logprobs": -1},
        {"logprobs": 21},
        {"logprobs": True},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(RequestError, match=f"SamplingParams.{name} is .*expected"):
        SamplingParams(**wrong)


def test_stops_become_tuples_and_numpy_numbers_are_numbers():
    params = SamplingParams(stop="x", stop_token_ids=[1, 2], top_k=np.int64(3), temperature=np.float32(0.5))
    assert params.stop == ("x",)
    assert params.stop_token_ids == (1, 2)
    assert SamplingParams(stop_token_ids=7).stop_token_ids == (7,)
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams().greedy
    assert not params.greedy


def test_completions_print_one_a_line_and_shorten_what_is_long():
    answers = Completions(
        [Completion("a" * 1000, (1, 2), "length"), Completion("", (3,), "error", error="broke")]
    )
    first, second = repr(answers).splitlines()
    assert len(first) < 400
    assert first.endswith("2 tokens, 'length')")
    assert second == "[1] Completion([3], 1 tokens, 'error', error='broke')"
