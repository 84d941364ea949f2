"""The packed batch of a mixed step, written out by hand."""

from __future__ import annotations

import torch

from adkit.contract import BatchLayout, SamplingParams
from adkit.runtime.batch import DecodeRows, build_batch
from adkit.runtime.sequence import Sequence


def sequence(tokens, prompt_len, pages, cached, scheduled):
    seq = Sequence(0, tokens[:prompt_len], SamplingParams(), 100)
    seq.tokens.extend(tokens[prompt_len:])
    seq.pages.extend(pages)
    seq.num_cached, seq.num_scheduled = cached, scheduled
    return seq


def test_decode_chunk_and_recompute_in_one_batch():
    batch = build_batch(
        [
            sequence([10, 11, 12, 13, 14], 3, [7, 2, 5], cached=4, scheduled=1),  # a decode
            sequence(
                [20, 21, 22, 23, 24, 25], 6, [3, 1, 4], cached=1, scheduled=3
            ),  # a chunk, the end not reached
            sequence([30, 31, 32], 2, [9, 8], cached=0, scheduled=3),  # all anew after a preemption
        ],
        page_size=2,
    ).to("cpu")
    expected = {
        "input_ids": [[14, 21, 22, 23, 30, 31, 32]],
        "position_ids": [[4, 1, 2, 3, 0, 1, 2]],
        "rope_lengths": [[5, 6, 6, 6, 2, 2, 3]],
        "cu_seqlens": [0, 1, 4, 7],
        "cache_lens": [4, 1, 0],
        "page_table": [[*pages, *[0] * 13] for pages in ([7, 2, 5], [3, 1, 4], [9, 8, 0])],
        "slot_mapping": [10, 7, 2, 3, 18, 19, 16],
        "logits_indices": [0, 6],
    }
    int32 = {"cu_seqlens", "cache_lens", "page_table"}
    for name in batch.names():
        tensor = getattr(batch, name)
        assert tensor.tolist() == expected[name], name
        assert tensor.dtype == (torch.int32 if name in int32 else torch.int64), name


def test_a_batch_in_which_nobody_samples_still_asks_for_one_row():
    batch = build_batch([sequence([1, 2, 3], 3, [1, 2], 0, 2)], 2).to("cpu")
    assert batch.logits_indices.tolist() == [1]


def test_a_pending_token_is_taken_from_its_row_of_the_step_before():
    known = sequence([10, 11], 2, [3], cached=1, scheduled=1)
    pending = sequence([20, 21], 2, [4, 5], cached=2, scheduled=1)
    pending.num_pending, pending.row = 1, 2
    host = build_batch([pending, known], 2, num_previous=3)
    assert host.continues
    batch = host.to("cpu", previous=torch.tensor([7, 8, 9]))
    assert batch.input_ids.tolist() == [[9, 11]]
    assert (batch.position_ids.tolist(), batch.slot_mapping.tolist()) == ([[2, 1]], [10, 7])
    not_finite = host.to("cpu", previous=torch.tensor([7, 8, -1]))
    assert not_finite.input_ids.tolist() == [[0, 11]]


def test_a_decode_step_is_padded_with_sequences_of_page_0():
    rows = [sequence([10, 11, 12], 1, [3, 6], cached=2, scheduled=1), sequence([20], 1, [4], 0, 1)]
    host = build_batch(rows, 2, num_previous=8, padded=BatchLayout(4, 4, 3, 4))
    fields = host.layout.arrays(host.buffer)
    expected = {
        "input_ids": [[12, 20, 0, 0]],
        "sources": [8, 9, 10, 11],
        "position_ids": [[2, 0, 0, 0]],
        "rope_lengths": [[3, 1, 1, 1]],
        "slot_mapping": [12, 8, 0, 0],
        "logits_indices": [0, 1, 2, 3],
        "cu_seqlens": [0, 1, 2, 3, 4],
        "cache_lens": [2, 0, 0, 0],
        "page_table": [[3, 6, 0], [4, 0, 0], [0, 0, 0], [0, 0, 0]],
    }
    assert {name: array.tolist() for name, array in fields.items()} == expected


def test_a_step_with_prompts_is_padded_with_tokens_of_nobody_and_sequences_without_tokens():
    rows = [sequence([10, 11, 12], 1, [3, 6], cached=2, scheduled=1), sequence([20, 21, 22], 3, [4, 5], 0, 2)]
    host = build_batch(rows, 2, num_previous=8, padded=BatchLayout(6, 4, 3, 4))
    assert host.logits == 1
    fields = host.layout.arrays(host.buffer)
    expected = {
        "input_ids": [[12, 20, 21, 0, 0, 0]],
        "sources": [8, 9, 10, 11, 12, 13],
        "position_ids": [[2, 0, 1, 0, 0, 0]],
        "rope_lengths": [[3, 3, 3, 1, 1, 1]],
        "slot_mapping": [12, 8, 9, 0, 0, 0],
        "logits_indices": [0, 0, 0, 0],
        "cu_seqlens": [0, 1, 3, 3, 3],
        "cache_lens": [2, 0, 0, 0],
        "page_table": [[3, 6, 0], [4, 5, 0], [0, 0, 0], [0, 0, 0]],
    }
    assert {name: array.tolist() for name, array in fields.items()} == expected


def test_counting_on_equals_packing_anew():
    """Over page boundaries, from the state that a launch leaves behind."""
    page_size, padded = 2, BatchLayout(4, 4, 8, 4)
    rows = [
        sequence([10, 11, 12], 1, [3, 6], 2, 1),
        sequence([20, 21], 1, [4], 1, 1),
        sequence([7], 1, [9], 0, 1),
    ]
    kept = DecodeRows(rows, build_batch(rows, page_size, num_previous=4, padded=padded), page_size)
    fresh_pages = iter(range(10, 30))
    for step in range(5):
        for row, seq in enumerate(rows):
            if step:  # the token before last has come back
                seq.tokens.append(50 + step)
            seq.num_cached += 1
            seq.num_pending, seq.row, seq.num_scheduled = 1, row, 1
            if seq.num_cached == len(seq.pages) * page_size:
                seq.pages.append(next(fresh_pages))
        anew = build_batch(rows, page_size, num_previous=4, padded=padded)
        counted = kept.advance(pinned=False)
        assert (counted.layout, counted.logits, counted.continues) == (anew.layout, 3, True)
        ours, theirs = (h.layout.arrays(h.buffer) for h in (counted, anew))
        for name in theirs:
            if name != "input_ids":  # not looked at: every token is the step before's
                assert ours[name].tolist() == theirs[name].tolist(), name
        assert ours["sources"].tolist()[:3] == [0, 1, 2]
