"""Whatever the numbers of heads and ranks: ranks compute what the uncut model computes, or say why they cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adkit.contract import ShardingError
from tests.sharding.models import bench
from tests.zoo import tiny


@pytest.mark.slow
@settings(
    max_examples=8,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(["llama", "qwen3", "phi3", "mixtral"]),
    kv_heads=st.sampled_from([1, 2, 3, 4]),
    groups=st.sampled_from([1, 2, 4]),
    ffn=st.sampled_from([24, 36, 60]),
    tp=st.sampled_from([2, 3, 4]),
)
def test_sharded_equals_unsharded(
    tmp_path: Path, kind: str, kv_heads: int, groups: int, ffn: int, tp: int
) -> None:
    heads = kv_heads * groups
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn}
    if kind == "mixtral":
        sizes["num_local_experts"] = 12
    path = tmp_path / f"{kind}-{heads}-{kv_heads}-{ffn}"
    if not path.exists():
        tiny(kind, num_hidden_layers=1, vocab_size=144, hidden_size=12 * heads, **sizes)[1].save_pretrained(
            path
        )
    wb = bench(path)
    try:
        v = wb.shard(tp)
    except ShardingError as error:
        if _can_be(kv_heads, heads, tp):
            raise
        assert f"tp={tp}" in str(error)  # noqa: PT017 (some worlds that divide badly stay whole instead)
        return
    found = v.check()
    assert found.ok, found


@pytest.mark.slow
@settings(
    max_examples=6,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    kind=st.sampled_from(["llama", "phi3", "mixtral"]),
    heads=st.sampled_from([(3, 1), (4, 2), (2, 2)]),
    tp=st.sampled_from([2, 3, 4]),
    layers=st.sampled_from([None, ["moe", "mlp"], ["vocab"], ["moe", "mlp", "vocab"]]),
)
def test_ranks_with_sequences_of_their_own_equal_unsharded(
    tmp_path: Path, kind: str, heads: tuple[int, int], tp: int, layers: list[str] | None
) -> None:
    """Heads need not divide: attention is not cut."""
    sizes = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "intermediate_size": 24}
    if kind == "mixtral":
        sizes["num_local_experts"] = 12
    path = tmp_path / f"{kind}-{heads[0]}-{heads[1]}"
    if not path.exists():
        tiny(kind, num_hidden_layers=1, vocab_size=144, hidden_size=12 * heads[0], **sizes)[
            1
        ].save_pretrained(path)
    v = bench(path).shard(tp, attention_dp=True, shard_layers=layers)
    found = v.check()
    assert found.ok, found
    found = v.check(cached=True)
    assert found.ok, found


def _can_be(kv_heads: int, heads: int, tp: int) -> bool:
    """Heads are shared evenly; of kv heads there are whole shares, or whole numbers of copies."""
    return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)
