"""One rank's whole walk: local heads in the cache, weights by part, back and forth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adkit.contract import DistConfig, ShardingError
from adkit.models.loading import LOCAL, graph_tensor_names
from adkit.passes.tensors import tensor_at
from adkit.sharding.forks import graph_module
from adkit.sharding.lockstep import Together
from adkit.workbench import Workbench
from tests.models.checkpoints import save_tiny
from tests.zoo import tiny_config

SMALL: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 2, "progress": False, "device": "cpu"}


def tensors(wb: Workbench) -> dict[str, Tensor]:
    gm: Any = wb.module
    return {n: tensor_at(gm, n).detach().clone() for n in graph_tensor_names(gm)}  # type: ignore[union-attr]


def walk(model: Any, rank: int = 1, tp: int = 2, **options: Any) -> Workbench:
    return Workbench(model, dist=DistConfig.of(tp, rank=rank), **{**SMALL, **options})


@pytest.fixture
def llama(tmp_path: Any) -> Any:
    save_tiny(tmp_path, "llama", vocab_size=132)
    return tmp_path


def test_a_ranks_graph_gets_a_cache_for_its_own_heads(llama: Any) -> None:
    wb = walk(llama).run()
    specs = wb._state.caches.specs  # type: ignore[union-attr]
    assert {s.page_shape[1] for s in specs} == {1}  # of two key and value heads
    assert wb.steps["gather_logits_before_lm_head"].info.num_matches == 1
    assert wb.steps["fuse_allreduce_residual_rmsnorm"].info.num_matches == 4
    assert wb.steps["apply_sharding_hints"].log == ["21 nodes processed"]
    compiled = wb._state.compiled
    assert compiled is not None
    assert compiled.vocab_size == 132
    whole = Workbench(llama, **SMALL).memory_estimate()
    mine = wb.memory_estimate()
    assert mine.kv_cache * 2 == whole.kv_cache
    assert whole.weights / 2 < mine.weights < whole.weights * 0.52


@pytest.mark.parametrize("place", ["fuse_gemms", "load_weights", "apply_sharding_hints", "detect_sharding"])
def test_going_back_and_forth_leads_to_the_same_weights(llama: Any, place: str) -> None:
    wb = walk(llama).run()
    before = tensors(wb)
    wb.rewind(place)
    query = wb.graph.find("q_proj.weight")[0].target
    held: Any = tensor_at(wb.module, query)  # type: ignore[arg-type]
    cut = place in ("fuse_gemms", "load_weights")
    assert tuple(held.shape) == ((24, 48) if cut else (48, 48))
    assert held.is_meta == (place != "fuse_gemms")
    assert (LOCAL in wb.module.meta) == cut  # type: ignore[union-attr, operator]
    wb.run()
    after = tensors(wb)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_parts_of_a_rank_equal_parts_of_the_whole(llama: Any) -> None:
    whole = dict(walk(llama).factory.load())
    joined = {}
    for rank in range(2):
        wb = walk(llama, rank).run(until="load_weights")
        local = wb.module.meta[LOCAL]  # type: ignore[union-attr]
        for name, tensor in tensors(wb).items():
            if name in local:
                assert torch.equal(tensor, local[name].take(whole[local[name].name]))
                joined.setdefault(name, []).append(tensor)
            else:
                assert torch.equal(tensor, whole[name])
    assert torch.equal(torch.cat(joined["lm_head.weight"]), whole["lm_head.weight"])


def test_random_weights_are_parts_of_the_unsharded_ones() -> None:
    config = tiny_config("mixtral", vocab_size=128)
    whole = dict(Workbench(config, random_weights=True, seed=5, **SMALL).factory.load())
    wb = walk(config, random_weights=True, seed=5).run(until="load_weights")
    local = wb.module.meta[LOCAL]  # type: ignore[union-attr]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(tensors(wb)[name], whole[name][2:])
    for name, part in local.items():
        assert torch.equal(tensors(wb)[name], part.take(whole[part.name]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wide_residual_stream_comes_through_the_sums_over_ranks(tmp_path: Any, dtype: str) -> None:
    save_tiny(tmp_path, "llama", vocab_size=132)
    ranks = [walk(tmp_path, rank, dtype=dtype) for rank in range(2)]
    ids = torch.tensor([[5, 9, 33, 2, 71, 8, 100]])

    def logits(until: str) -> Tensor:
        for wb in ranks:
            wb.run(until=until)
        both = Together([graph_module(wb) for wb in ranks])
        feed = {"input_ids": ids, "position_ids": torch.arange(7)[None]}
        return both.run([{n: feed[n] for n in both.inputs}] * 2)[0][0]

    steps = logits("fuse_swiglu")
    fused = logits("fuse_allreduce_residual_rmsnorm")
    assert ranks[0].steps["widen_residual_stream"].info.num_matches == 4
    assert ranks[0].steps["fuse_allreduce_residual_rmsnorm"].info.num_matches == 4
    assert torch.equal(steps, fused)


def test_a_failed_cut_leaves_the_graph_as_it_was(llama: Any) -> None:
    wb = walk(llama).run(until="sharding_transform_executor")
    before = wb.graph
    wb.configure("apply_sharding_hints", dist_mapping={"tp": 4})
    with pytest.raises(ShardingError, match=r"tp_size=4 \(running: 2\)"):
        wb.run()
    assert wb.graph is before
    wb.configure("apply_sharding_hints", dist_mapping={"tp": 2})
    wb.run(until="load_weights")
    assert tensors(wb)["lm_head.weight"].shape == (66, 48)


def test_a_world_of_one_changes_nothing(llama: Any) -> None:
    wb = Workbench(llama, **SMALL).run(until="sharding")
    for key in ("detect_sharding", "sharding_transform_executor", "apply_sharding_hints"):
        assert wb.steps[key].before is wb.steps[key].after
    assert LOCAL not in wb.module.meta  # type: ignore[union-attr, operator]


def test_the_pipeline_cache_keeps_parts_and_plan(llama: Any, tmp_path: Any) -> None:
    def cached(rank: int = 1) -> Workbench:
        wb = walk(llama, rank).configure("pipeline_cache", enabled=True, root=str(tmp_path / "cache"))
        return wb.move("pipeline_cache", after="apply_sharding_hints")

    first, again = (cached().run(until="load_weights") for _ in range(2))
    assert "restored" in again.steps["apply_sharding_hints"].info.reason
    metas = [wb.module.meta for wb in (first, again)]  # type: ignore[union-attr]
    assert metas[0][LOCAL] == metas[1][LOCAL]
    assert metas[0]["adkit_plan"] == metas[1]["adkit_plan"]
    one, other = tensors(first), tensors(again)
    assert all(torch.equal(one[n], other[n]) for n in one)
    other_rank = cached(0).run(until="apply_sharding_hints")
    assert "restored" not in other_rank.steps["apply_sharding_hints"].info.reason
