"""Stacked experts from checkpoint to logits: ranks hold, load and multiply their own, and mistakes are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM

import adkit
from adkit.sharding.forks import graph_module
from adkit.sharding.pictures import held_slices
from tests.forked_ranks import forked
from tests.reference import hf_greedy
from tests.sharding.models import bench, mutated
from tests.sharding.stacked import saved_stacked
from tests.zoo import tiny_config

aten: Any = torch.ops.aten
ops: Any = torch.ops.adkit
PROMPTS = [[5, 9, 33, 2, 71, 8, 100, 31, 4], [17, 3, 3]]


@pytest.fixture(scope="module")
def wb(tmp_path_factory: pytest.TempPathFactory) -> adkit.Workbench:
    """The model written by hand, before sharding."""
    return bench(saved_stacked(tmp_path_factory.mktemp("stacked")))


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_of_stacked_experts_compute_what_the_uncut_model_does(wb: adkit.Workbench, tp: int) -> None:
    v = wb.shard(tp)
    told = {r.weights[0].partition("model.")[2]: r for r in v.plan if "mlp" in r.module and r.weights}
    assert {name: r.decision for name, r in told.items()} == {
        "layers.0.mlp.up": "batch", "layers.0.mlp.down": "batch", "layers.0.mlp.router.weight": "whole",
        "layers.1.mlp.up": "batch", "layers.1.mlp.down": "gather",
    }  # fmt: skip
    found = v.check()
    assert found.ok, found
    assert found.weights == "checkpoint"
    assert v.check(PROMPTS, cached=True).ok
    assert [r.memory.fraction("experts") for r in v.ranks] == [1 / tp] * tp
    held = graph_module(v.ranks[1].wb).meta["adkit_local"]["model.layers.1.mlp.up"]
    assert held.cuts[0].ranges == ((4 // tp, 8 // tp),)
    kinds = [c.kind for c in v.comm if c.layer in (0, 1)]
    assert kinds == ["all_reduce", "all_reduce", "all_reduce", "all_gather"]


def test_generation_with_stacked_experts_is_hugging_faces(wb: adkit.Workbench) -> None:
    params = adkit.SamplingParams(max_tokens=16, ignore_eos=True)
    found = wb.shard(4).generate(PROMPTS, params, progress=False)
    model = AutoModelForCausalLM.from_pretrained(
        wb.factory.directory, dtype=torch.float32, attn_implementation="eager"
    )
    for c, prompt in zip(found, PROMPTS, strict=True):
        tokens, _ = hf_greedy(model.eval(), torch.tensor(prompt), 16)
        assert list(c.token_ids) == tokens[len(prompt) :].tolist()


def test_processes_compute_what_one_does(wb: adkit.Workbench) -> None:
    params = adkit.SamplingParams(max_tokens=8, ignore_eos=True)
    alone = bench(wb.factory.directory).llm().generate(PROMPTS, params, progress=False)
    with forked(), wb.llm(tp=2, timeout=60) as together:
        found = together.generate(PROMPTS, params, progress=False)
    assert [c.token_ids for c in found] == [c.token_ids for c in alone]


def test_pictures_show_who_has_which_matrices(wb: adkit.Workbench) -> None:
    v = wb.shard(2)
    (up,) = [tensor for tensor in held_slices(v, 0) if tensor.name == "up"]
    assert (up.shape, up.note) == ((4, 32, 40), "batch")
    assert [(s.ranks, s.ranges) for s in up.slices] == [((0,), {0: ((0, 2),)}), ((1,), {0: ((2, 4),)})]
    details = [b.detail[0] for b in v.layer(0).picture.boxes if b.detail]
    assert details.count("batch, cut(0)") == 2
    assert "batch" in v.plan._repr_mimebundle_()["text/html"]


def the(gm: GraphModule, target: Any, module: str) -> Any:
    """The first call of ``target`` in a module."""
    return next(
        n
        for n in gm.graph.nodes
        if n.target is target
        and any(module in str(p[0]) for p in (n.meta.get("nn_module_stack") or {}).values())
    )


def test_a_sum_of_experts_that_is_dropped_is_found(wb: adkit.Workbench) -> None:
    def change(gm: GraphModule, rank: int) -> None:
        total = the(gm, aten.sum.dim_IntList, "layers.0.mlp")
        reduce = next(
            n for n in gm.graph.nodes if n.target is ops.torch_dist_all_reduce.default and n > total
        )
        reduce.replace_all_uses_with(reduce.args[0])
        gm.graph.erase_node(reduce)

    d = mutated(wb.shard(2), change).check().first_divergence
    assert d is not None
    assert d.layer in (0, 1)
    assert "all_reduce" in d.why


def test_stacks_that_two_ranks_swapped_are_found(wb: adkit.Workbench) -> None:
    v = wb.shard(2)
    name = "model.layers.1.mlp.up"
    first, second = (r.local[name] for r in v.ranks)
    for rank, recipe in zip(v.ranks, (second, first), strict=True):
        graph_module(rank.wb).meta["adkit_local"][name] = recipe
    d = v.check().first_divergence
    assert d is not None
    assert d.layer == 1
    assert "baddbmm" in d.op


def test_a_rank_that_weighs_its_experts_with_anothers_gates_is_found(wb: adkit.Workbench) -> None:
    def change(gm: GraphModule, rank: int) -> None:
        part = [n for n in gm.graph.nodes if n.target is aten.slice.Tensor and n.args[2:4] == (2, 4)]
        for n in part:
            n.args = (*n.args[:2], 0, 2)

    found = mutated(wb.shard(2), change).check()
    assert not found.ok
    assert found.first_divergence is not None
    assert found.first_divergence.layer == 0


@pytest.mark.parametrize(
    ("kind", "tp", "stacks"), [("inkling_text", 2, 6), ("deepseek_v4", 4, 2), ("xlnet", 2, 4)]
)
def test_stacked_weights_of_real_types(kind: str, tp: int, stacks: int) -> None:
    """Inkling's shared experts, DeepSeek V4's output projections of groups of heads, XLNet's heads (einsum)."""
    wb = adkit.Workbench(tiny_config(kind, vocab_size=144), device="cpu", progress=False, random_weights=True)
    v = wb.shard(tp)
    rows = [r for r in v.plan if r.decision == "batch"]
    assert len(rows) == stacks
    name = rows[0].weights[0]
    (cut,) = v.ranks[tp - 1].local[name].cuts
    ((start, stop),) = cut.ranges
    assert start == (tp - 1) * (stop - start)
    assert graph_module(v.ranks[0].wb).get_parameter(name).shape[cut.dim] == stop - start
    found = v.check()
    assert found.ok, found
