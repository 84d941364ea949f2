"""What the graph looks like once attention is cached."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from adkit import Workbench
from adkit.graph.cost import node_costs, total_cost
from adkit.graph.snapshot import Snapshot

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def cached() -> Snapshot:
    config = LlamaConfig(num_hidden_layers=4, vocab_size=96, **SIZES)
    return Workbench(config, page_size=8, progress=False).run(until="insert_cached_attention").graph


def test_layers_still_fold(cached: Snapshot) -> None:
    counts = [len(v.blocks) for s in cached.folding for v in s.variants]
    assert counts == [1, 3]  # the first layer's norm follows no sum


def test_sizes_that_are_equal_are_one_symbol(cached: Snapshot) -> None:
    shape = {n.target: n.shape for n in cached if n.op == "placeholder"}
    assert len({s[0] for name, s in shape.items() if name.endswith("_cache")}) == 1
    assert shape["page_table"][0] == shape["cache_lens"][0]
    assert shape["cu_seqlens"] == (f"{shape['cache_lens'][0]} + 1",)
    assert shape["slot_mapping"][0] == shape["input_ids"][1]


def test_the_cost_of_a_decode_step_needs_tokens_sequences_and_context(cached: Snapshot) -> None:
    def bytes_at(context: int) -> float:
        sizes = {"tokens": 3, "sequences": 3, "context": context}
        return total_cost(node_costs(cached, "H100 SXM", sizes).values()).bytes

    kv_of_a_token = 2 * 2 * 16 * 4  # keys and values, 2 heads of 16, float32
    page_table_entry = 4
    assert bytes_at(108) - bytes_at(100) == 4 * 3 * (8 * kv_of_a_token + page_table_entry)
