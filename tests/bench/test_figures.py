"""Lengths, timelines and the work of a model: figures against what can be worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

import adkit
from adkit.bench import machine
from adkit.bench.machine import Ceilings
from adkit.bench.timeline import Timeline, latency_figures, percentiles, throughput_figures
from adkit.bench.work import Attention, Work, least_seconds, work_of
from adkit.bench.workload import Lengths, make_workload
from adkit.contract import ConfigError


def test_lengths_are_a_number_or_a_range():
    assert Lengths.parse("128", "prompt") == Lengths.parse(128, "prompt") == Lengths(128, 128)
    assert Lengths.parse(" 100-1024 ", "prompt") == Lengths(100, 1024)
    assert str(Lengths(100, 1024)) == "100-1024"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0", "at least 1"),
        ("9-5", "9 is more than 5"),
        ("abc", "expected a number"),
        ("-3", "expected"),
        ("1-2-3", "expected"),
    ],
)
def test_bad_lengths_say_which_and_why(text, why):
    with pytest.raises(ConfigError, match=f"prompt is .*{why}"):
        Lengths.parse(text, "prompt")


def test_a_workload_is_uniform_and_follows_its_seed():
    load = make_workload(400, Lengths(10, 20), Lengths(3, 5), 50, seed=7)
    assert load == make_workload(400, Lengths(10, 20), Lengths(3, 5), 50, seed=7)
    assert load != make_workload(400, Lengths(10, 20), Lengths(3, 5), 50, seed=8)
    assert {len(p) for p in load.prompts} == set(range(10, 21))
    assert set(load.news) == {3, 4, 5}
    assert {t for p in load.prompts for t in p} == set(range(50))
    assert load.first(2, 4).news == [min(n, 4) for n in load.news[:2]]


def test_decode_rate_counts_what_comes_after_the_first_token():
    one = Timeline(10.0, [[11.0, 11.5, 12.0]])
    assert one.decode_rate == 2 / 1.0  # (new tokens - 1) / (last token - first token)
    assert one.seconds == 2.0
    two = Timeline(0.0, [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert two.decode_rate == 4 / 2.0
    late = Timeline(0.0, [[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])  # the other's wait counts against it
    assert late.decode_rate == 4 / 3.0


def test_figures_of_runs():
    row = latency_figures([Timeline(0.0, [[1.0, 1.0 + d, 1.0 + 2 * d]]) for d in (0.1, 0.2, 0.4)])
    assert (row["batch"], row["tokens_per_second"], row["steps_per_second"]) == (1, 5.0, 5.0)
    assert row["inter_token_seconds"]["p50"] == 0.2
    stopped = latency_figures([Timeline(0.0, [[1.0, 2.0]]), Timeline(0.0, [[1.0, 2.0, 3.5]], cut=True)])
    assert (stopped["cut"], stopped["seconds"]) == (True, 3.5)
    assert "cut" not in row
    cut = throughput_figures(Timeline(0.0, [[1.0, 2.0], []], cut=True), [30, 40])
    assert cut["cut"] is True
    assert cut["output_tokens_per_second"] == 1.0
    assert cut["total_tokens_per_second"] == (30 + 2) / 2.0


def test_percentiles_are_values_that_came():
    values = [i / 100 for i in range(100)]
    assert percentiles(values) == {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    assert percentiles([], (50,)) == {"p50": 0.0}


def _llama(tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=96, tie_word_embeddings=tied,
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_work_of_a_llama_is_what_its_shapes_say(tied):
    d, f, layers, v = 32, 48, 3, 96
    linears = layers * (d * 32 + 2 * d * 16 + 32 * d + 3 * d * f)
    norms = (2 * layers + 1) * d
    wb = adkit.Workbench(_llama(tied), device="cpu", progress=False).run("pattern_matcher")
    work = work_of(wb)
    small = work.dense_bytes - 4 * (linears + norms + v * d)  # what RoPE reads: frequencies
    assert 0 <= small <= 64
    assert work.weight_bytes() == work.weight_bytes(100) == work.dense_bytes
    assert work.token_flops == 2 * linears
    assert work.row_flops == 2 * v * d
    assert work.cache_token_bytes == layers * 2 * 2 * 8 * 4
    t = 10
    pairs = t * (t + 1) // 2
    assert work.prefill_flops(t) == 2 * linears * t + 2 * v * d + layers * 2 * 4 * (8 + 8) * pairs


def test_of_experts_only_those_that_are_hit_count():
    config = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, vocab_size=96, decoder_sparse_step=1,
        mlp_only_layers=[],
    )  # fmt: skip
    work = work_of(adkit.Workbench(config, device="cpu", progress=False).run("pattern_matcher"))
    each = 3 * 32 * 16
    assert work.expert_bytes == 2 * 8 * each * 4
    assert work.active == 2 / 8
    assert work.weight_bytes(1) - work.dense_bytes == 2 * 2 * each * 4
    assert math.isclose(work.weight_bytes(3) - work.dense_bytes, work.expert_bytes * (1 - 0.75**3))
    attention = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32)
    router = 2 * 32 * 8
    assert work.token_flops == 2 * (attention + router + 2 * 2 * each)


def test_a_window_bounds_what_is_read_and_computed():
    work = Work(0, 0, 1.0, 0.0, 0.0, (Attention(2.0, 10, None), Attention(2.0, 10, 4)))
    assert work.cache_bytes(np.array([3, 9])) == 10 * (3 + 9) + 10 * (3 + 4)
    assert work.attention_flops(6) == 2.0 * (21 + (1 + 2 + 3 + 4 + 4 + 4))


def test_least_time_adds_up():
    """Two requests, worked out by hand: 100 bytes of weights a step, 1 FLOP a token, 8 bytes of cache a token."""
    work = Work(100, 0, 1.0, 1.0, 0.0, (Attention(0.0, 8, None),))
    memory_bound = Ceilings(memory=1.0, matmul=1e9)
    # step 1: both prompts; step 2: both decode, contexts 3 + 1 and 5 + 1; step 3: the second alone, 5 + 2
    expected = 100 + (100 + 8 * (4 + 6)) + (100 + 8 * 7)
    assert least_seconds(work, memory_bound, [3, 5], [2, 3], 1000) == pytest.approx(expected, rel=1e-6)
    compute_bound = Ceilings(memory=1e12, matmul=1.0)
    assert least_seconds(work, compute_bound, [3, 5], [2, 3], 1000) == pytest.approx(8 + 2 + 1, rel=1e-6)
    # A cache for one at a time: each pays for its own steps.
    alone = [least_seconds(work, memory_bound, [p], [n], 1000) for p, n in ((3, 2), (5, 3))]
    assert least_seconds(work, memory_bound, [3, 5], [2, 3], 8) == pytest.approx(sum(alone), rel=1e-6)


def test_a_cpus_ceiling_is_reading_as_much_as_the_weights_are(monkeypatch):
    """Weights may lie in its caches, which give them faster than a copy goes: shares of a copy would exceed 100%."""
    asked = []

    def seconds(run, device):
        asked.append(run())
        return 2.0 if len(asked) == 1 else 0.5  # the product is the faster way

    monkeypatch.setattr(machine, "_seconds", seconds)
    rate = machine.read_rate(3 << 20)
    assert rate == (3 << 20) / 0.5
    assert asked[0] == (3 << 20) / 4  # the sum of as many ones
    assert asked[1].tolist() == [1024.0] * (3 << 20 >> 12)
    monkeypatch.setattr(machine, "_MOST_READ", 1 << 20)
    assert machine.read_rate(1e12) == (1 << 20) / 0.5
    cpu = machine.ceilings(torch.device("cpu"), torch.float32, 10)
    assert (cpu.memory, cpu.access) == (4096 / 0.5, "read")
    assert Ceilings(memory=1.0, matmul=1.0).access == "copy"


def test_a_result_is_plain_data(tmp_path):
    from adkit.bench import results

    path = results.write({"what": "x", "rows": []}, tmp_path / "a.json")
    assert json.loads(path.read_text()) == {"what": "x", "rows": []}
