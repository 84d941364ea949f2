"""The memory estimate against sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from adkit.contract import EngineConfig, MemoryLimitError
from adkit.models import resolve
from adkit.models.memory import free_bytes, human, kv_bytes_per_token, limited
from tests.zoo import tiny_config

ENGINE = EngineConfig(max_seq_len=100, max_batch_size=3, page_size=16, max_num_tokens=64)


def test_weights_are_the_models_bytes_by_dtype_with_tied_ones_once():
    estimate = resolve("llama-3.2-1b", dtype="bfloat16").memory_estimate(ENGINE, "cpu")
    assert estimate.weights_by_dtype["bfloat16"] == 1_235_814_400 * 2
    assert estimate.weights_by_dtype["float32"] < 10_000  # rotary frequencies


def test_kv_cache_is_whole_pages_for_every_layer():
    estimate = resolve("llama-3.1-8b", dtype="bfloat16").memory_estimate(ENGINE, "cpu")
    per_token = 32 * 2 * 8 * 128 * 2
    assert estimate.kv_minimum == per_token * 112  # 100 tokens take 7 pages of 16
    assert estimate.kv_cache == 3 * estimate.kv_minimum


def test_uneven_key_and_value_widths():
    config = resolve("deepseek-v3").config
    assert kv_bytes_per_token(config, torch.bfloat16) == 61 * 128 * (192 + 128) * 2


def test_free_memory_of_the_host_is_plausible():
    free = free_bytes(torch.device("cpu"))
    assert 10 * 2**20 < free < 2**60


def test_what_cannot_fit_is_refused_and_says_the_sums():
    estimate = resolve("llama-3.1-405b", dtype="bfloat16").memory_estimate(ENGINE, "cpu")
    small = dataclasses.replace(estimate, free=16 * 10**9)
    assert not small.fits
    with pytest.raises(
        MemoryLimitError,
        match=r"llama-3.1-405b needs at least 8\d\d\.\d GB.*cpu has 16\.0 GB free.*force=True",
    ):
        small.require()
    assert "does not fit" in repr(small)
    dataclasses.replace(estimate, free=10**13).require()


def test_repr_names_every_part():
    estimate = resolve(tiny_config("llama"), device="cpu").memory_estimate(ENGINE, "cpu")
    estimate.require()
    text = repr(dataclasses.replace(estimate, free=estimate.needed))
    for part in ("weights", "KV cache", "workspace", "total", "free", "fits with a smaller KV cache"):
        assert part in text
    assert "-> fits" in repr(estimate)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (16_100_000_000, "16.1 GB"), (5e15, "5000.0 TB")]
)
def test_human(count, text):
    assert human(count) == text


def test_layers_of_different_widths():
    estimate = resolve(tiny_config("gemma3n_text"), dtype="float32").memory_estimate(ENGINE, "cpu")
    assert estimate.kv_minimum == 2 * 2 * (12 + 12) * 4 * 112


def test_a_lack_of_memory_is_told_although_another_error_came_of_it():
    def broken_off():
        try:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")
        finally:
            raise RuntimeError("capture failed")

    with (
        pytest.raises(MemoryLimitError, match=r"no memory left on cpu to try: lower it\. .*3 GiB"),
        limited("to try", torch.device("cpu"), "lower it"),
    ):
        broken_off()
    with pytest.raises(RuntimeError, match="another"), limited("to try", torch.device("cpu"), ""):
        raise RuntimeError("another")
