"""A mask function is understood by what it does, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from adkit.models.hf.masks import (
    KnownOnes,
    MaskDescriptor,
    MaskUsedAsTensor,
    describe,
    known_ones,
    mask_interface,
)

POSITIONS = 20_000
NO_PADDING = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (causal_mask_function, MaskDescriptor()),
        (bidirectional_mask_function, MaskDescriptor(causal=False)),
        (or_masks(sliding_window_overlay(8), causal_mask_function), MaskDescriptor(causal=False)),
        (sliding_window_causal_mask_function(8), MaskDescriptor(window=8)),
        (sliding_window_causal_mask_function(1), MaskDescriptor(window=1)),
        (sliding_window_causal_mask_function(4096), MaskDescriptor(window=4096)),
        (sliding_window_causal_mask_function(POSITIONS), MaskDescriptor()),  # never reached
        (sliding_window_bidirectional_mask_function(5), MaskDescriptor(causal=False, window=6)),
        (and_masks(chunked_overlay(64, NO_PADDING), causal_mask_function), MaskDescriptor(chunk=64)),
        (and_masks(chunked_overlay(8192, NO_PADDING), causal_mask_function), MaskDescriptor(chunk=8192)),
        (
            and_masks(chunked_overlay(64, NO_PADDING), sliding_window_causal_mask_function(7)),
            MaskDescriptor(window=7, chunk=64),
        ),
    ],
)
def test_known_masks_are_described(function: Any, expected: MaskDescriptor) -> None:
    assert describe(function, positions=POSITIONS, heads=4) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0),
        lambda b, h, q, k: (k <= q) & ((q - k < 8) | (k < 4)),  # a window and sinks
        lambda b, h, q, k: (k <= q) | (q < 100) & (k < 100),  # a bidirectional prefix
        lambda b, h, q, k: (k <= q) & (k != 15_000),
        lambda b, h, q, k: (k <= q) & (q - k < 8 + h),  # another window a head
        or_masks(sliding_window_causal_mask_function(8), lambda b, h, q, k: q == k + 20),
    ],
)
def test_other_masks_are_a_problem(function: Any) -> None:
    found = describe(function, positions=POSITIONS, heads=4)
    assert found.problem is not None


def test_a_mask_over_the_batchs_data_is_a_problem() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        groups = torch.zeros(2, 16, dtype=torch.long)
    found = describe(lambda b, h, q, k: groups[b, q] == groups[b, k], positions=16)
    assert found.problem is not None


def test_padding_is_a_problem_unless_it_is_known_to_be_none() -> None:
    class Config:
        max_position_embeddings = 64
        num_attention_heads = 4

    def ask(padding: torch.Tensor | None) -> MaskDescriptor:
        return mask_interface(mask_function=causal_mask_function, attention_mask=padding, config=Config())

    assert ask(None) == MaskDescriptor()
    assert ask(torch.ones(2, 5)).problem is not None
    with KnownOnes():
        made = torch.ones(2, 5).to(torch.bool)
        changed = torch.ones(2, 5).mul(2)
    assert known_ones(made)
    assert ask(made) == MaskDescriptor()
    assert not known_ones(changed)


def test_a_cache_offset_is_a_problem() -> None:
    assert mask_interface(mask_function=causal_mask_function, q_offset=3).problem is not None


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m[:, :, :4],
        lambda m: m + 1,
        lambda m: 1.0 - m,
        lambda m: m.to(torch.float32),
        lambda m: torch.zeros(2) + m,
        lambda m: torch.where(m, 0.0, 1.0),
        lambda m: m.shape,
    ],
)
def test_a_descriptor_is_no_tensor(use: Any) -> None:
    with pytest.raises(MaskUsedAsTensor):
        use(MaskDescriptor())
