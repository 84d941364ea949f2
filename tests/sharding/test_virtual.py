"""``wb.shard``: virtual ranks compute what the uncut model computes, and mistakes are named where they happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from transformers import AutoConfig, AutoModelForCausalLM

import adkit
from adkit.contract import ConfigError, ShardingError
from adkit.graph.placement import ShardingPlan
from adkit.models.bundled import bundled_config
from adkit.sharding import Rank, ShardingCheck, VirtualRanks
from adkit.sharding.forks import graph_module
from tests.reference import hf_greedy
from tests.sharding.models import MOE_TYPES, TYPES, bench, mutated, nodes
from tests.zoo import tiny_config

ops: Any = torch.ops.adkit
PROMPTS = [[5, 9, 33, 2, 71, 8, 100, 31, 4], [17, 3, 3]]


@pytest.mark.parametrize(
    ("kind", "tp"), [*((k, 4) for k in TYPES), ("llama", 2), ("phi3", 2), ("gpt_oss", 2)]
)
def test_logits_on_ranks_are_the_uncut_models(models, kind: str, tp: int) -> None:
    found = models.shard(kind, tp).check()
    assert found.ok, found
    assert found.rmse_ratio <= 1e-5
    assert found.compared > 40
    assert found.held["partial"] > 3
    assert any(how.startswith("cut") for how in found.held)


@pytest.mark.parametrize("kind", ["gpt2", "falcon", "gpt_bigcode"])
def test_weights_stored_turned_around_and_one_kv_head_for_all(models, kind: str) -> None:
    v = models.shard(kind, 4)
    attention = [r for r in v.plan if r.layer == 0 and r.layer_type == "mha" and r.decision != "follow"]
    assert [r.decision for r in attention] == ["colwise", "rowwise"]
    found = v.check()
    assert found.ok, found
    assert v.check(PROMPTS, cached=True).ok
    heads = 8 if kind == "gpt2" else 1
    whole = 2 * 2 * heads * 12 * 4  # keys and values of two layers, 12 elements of 4 bytes
    assert [r.memory.cache_per_token for r in v.ranks] == [whole // min(heads, 4)] * 4


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_more_ranks_than_kv_heads(models, kind: str) -> None:
    v = models.shard(kind, 8)
    assert v.check().ok
    assert [r.memory.cache_per_token for r in v.ranks] == [v.ranks[0].memory.cache_per_token] * 8


@pytest.mark.parametrize(("tp", "moe_ep"), [(4, 2), (2, 1)])
@pytest.mark.parametrize("kind", MOE_TYPES)
def test_experts_by_expert_and_by_feature(models, kind: str, tp: int, moe_ep: int) -> None:
    v = models.shard(kind, tp, moe_ep=moe_ep)
    assert (v.dist.moe_ep_size, v.dist.moe_tp_size) == (moe_ep, tp // moe_ep)
    assert v.check().ok


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "olmo2"])
def test_generation_over_a_cache_a_rank_is_greedy_as_hugging_face(models, kind: str) -> None:
    params = adkit.SamplingParams(max_tokens=32, ignore_eos=True)
    found = models.shard(kind, 4).generate(PROMPTS, params, progress=False)
    model = AutoModelForCausalLM.from_pretrained(
        models.path(kind), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for c, prompt in zip(found, PROMPTS, strict=True):
        tokens, _ = hf_greedy(model, torch.tensor(prompt), 32)
        assert list(c.token_ids) == tokens[len(prompt) :].tolist()
    assert not models(kind).loaded  # the Workbench itself did not run on


@pytest.mark.parametrize("kind", ["phi3", "gemma2", "mixtral"])
def test_logits_over_a_cache_a_rank_are_the_uncut_models(models, kind: str) -> None:
    found = models.shard(kind, 2).check(PROMPTS, cached=True)
    assert found.ok, found
    assert found.prompts == ((1, 9), (1, 3))


def test_a_bfloat16_model_keeps_its_float32_stream_on_ranks(models) -> None:
    v = bench(models.path("llama"), dtype="bfloat16").shard(2)
    found = v.check(PROMPTS, cached=True)
    assert found.ok, found
    tokens = v.generate(PROMPTS, adkit.SamplingParams(max_tokens=4, ignore_eos=True), progress=False)
    assert [len(c.token_ids) for c in tokens] == [4, 4]


def test_each_step_of_the_stage_can_be_checked(models) -> None:
    steps = models.shard("llama", 2).steps
    assert steps.keys()[0] == "detect_sharding"
    hinted = steps["sharding_transform_executor"]
    assert hinted.check().ok
    assert hinted.check().how == "whole graph"
    cut = steps["apply_sharding_hints"].check()
    assert isinstance(cut, ShardingCheck)
    assert cut.ok


def test_run_gives_logits_and_prompts_can_be_given(models) -> None:
    v = models.shard("llama", 2)
    ids = torch.tensor([PROMPTS[0]])
    logits = v.run(input_ids=ids)
    assert logits.shape == (1, len(PROMPTS[0]), 144)
    found = v.check(prompts=PROMPTS)
    assert found.ok
    assert found.prompts == ((1, 9), (1, 3))
    with pytest.raises(ConfigError, match="list of"):
        v.check(prompts=[])


# --- sequences of their own

EVERY_LAYER = {"shard_layers": ["moe", "mlp", "vocab"]}


@pytest.mark.parametrize(("kind", "moe_ep"), [("mixtral", 2), ("mixtral", 4), ("qwen3_moe", 4)])
def test_with_attention_dp_ranks_have_sequences_of_their_own(models, kind: str, moe_ep: int) -> None:
    v = models.shard(kind, 4, moe_ep=moe_ep, attention_dp=True)
    found = v.check()
    assert found.ok, found
    assert found.prompts == ((4, 23),)
    assert found.held["cut(0)"] > 40
    assert v.check(prompts=PROMPTS).prompts == ((4, 9), (4, 3))
    assert {c.kind for c in v.comm} == {"all_gather", "reduce_scatter"}
    assert v.ranks[0].memory.fraction("experts") == 1 / 4
    assert v.ranks[0].memory.fraction("attention") == 1
    with pytest.raises(ShardingError, match="do not divide by 4"):
        v.run(input_ids=torch.tensor(PROMPTS[:1]))


@pytest.mark.parametrize("kind", TYPES)
def test_with_attention_dp_layers_that_are_named_are_cut_too(models, kind: str) -> None:
    v = models.shard(kind, 4, attention_dp=True, **EVERY_LAYER)
    found = v.check()
    assert found.ok, found
    assert found.rmse_ratio <= 1e-5
    decided = {r.decision for r in v.plan}
    assert {"vocab", "gather"} < decided
    assert decided & {"experts", "rowwise"}
    assert {r.decision for r in v.plan if r.layer_type == "mha"} == {"whole"}
    assert v.ranks[0].memory.fraction("vocabulary") == 1 / 4
    sums = sum(r.reduce for r in v.plan)
    assert sum(c.kind == "reduce_scatter" for c in v.comm) == sums
    assert not any(c.kind == "all_reduce" for c in v.comm)
    assert [c.rows for c in v.comm][-2:] == ["last", "last"]  # hidden states and logits that are sampled from


@pytest.mark.parametrize(
    ("kind", "options"), [("llama", EVERY_LAYER), ("phi3", {}), ("mixtral", EVERY_LAYER)]
)
def test_with_attention_dp_a_cache_a_rank_gives_the_uncut_models_logits(
    models, kind: str, options: Any
) -> None:
    v = models.shard(kind, 2, attention_dp=True, **options)
    found = v.check(PROMPTS, cached=True)
    assert found.ok, found
    assert found.prompts == ((2, 9), (2, 3))


@pytest.mark.parametrize(
    ("kind", "tp", "options"),
    [("llama", 4, {}), ("llama", 2, EVERY_LAYER), ("gpt_oss", 4, EVERY_LAYER), ("olmo2", 3, {})],
)
def test_with_attention_dp_greedy_is_hugging_faces(models, kind: str, tp: int, options: Any) -> None:
    v = models.shard(kind, tp, attention_dp=True, **options)
    params = adkit.SamplingParams(max_tokens=32, ignore_eos=True)
    prompts = [*PROMPTS, PROMPTS[0] * 2, [8], [8, 9]]
    found = v.generate(prompts, params, progress=False)
    model = AutoModelForCausalLM.from_pretrained(
        models.path(kind), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for c, prompt in zip(found, prompts, strict=True):
        tokens, _ = hf_greedy(model, torch.tensor(prompt), 32)
        assert list(c.token_ids) == tokens[len(prompt) :].tolist()
    assert v.check(PROMPTS[:1], cached=True).ok  # which writes over the caches
    again = v.generate(prompts, params, progress=False)
    assert [c.token_ids for c in again] == [c.token_ids for c in found]


def test_with_attention_dp_each_cache_is_a_share(models) -> None:
    whole = models.shard("llama", 1)
    v = models.shard("llama", 4, attention_dp=True)
    assert v.ranks[1].memory.cache * 4 == whole.ranks[0].memory.cache
    assert v.ranks[1].memory.cache_per_token == whole.ranks[0].memory.cache_per_token
    assert v.ranks[1].wb.memory_estimate().kv_cache * 4 == whole.ranks[0].wb.memory_estimate().kv_cache
    one, engine = whole.llm().engine, v.llm().engine
    assert [p.capacity * 4 for p in engine.pools] == [one.pages.capacity] * 4
    pools = [engine.model.caches, *engine.model.caches.others]
    bytes_ = [sum(t.nbytes for t in p.tensors.values()) for p in pools]
    padding = one.model.caches.bytes_per_page
    assert [4 * (n - padding) for n in bytes_] == [
        sum(t.nbytes for t in one.model.caches.tensors.values()) - padding
    ] * 4
    assert engine.capacity == one.capacity


def test_with_attention_dp_the_plan_tells_where_tokens_go(models) -> None:
    v = models.shard("llama", 2, attention_dp=True)
    assert {r.decision for r in v.plan} == {"whole"}
    assert {str(r.placement) for r in v.plan} == {"cut(0)"}
    assert [r.tokens for r in v.plan if r.tokens] == ["joined"]
    assert [c.kind for c in v.comm] == ["all_gather"]
    cut = models.shard("llama", 2, attention_dp=True, **EVERY_LAYER)
    told = {r.module.rpartition(".")[2]: (r.decision, r.tokens, r.reduce) for r in cut.plan}
    assert told["gate_proj"] == ("colwise", "gathered", False)
    assert told["down_proj"] == ("rowwise", "", True)
    assert told["embed_tokens"] == ("vocab", "gathered", True)
    assert told["lm_head"] == ("gather", "gathered", False)
    assert "tokens" in cut.plan.table().columns
    assert "tokens" not in models.shard("llama", 2).plan.table().columns
    assert models("llama").shard(2, plan=cut.plan).check().ok
    with pytest.raises(ShardingError, match="reads tokens of all ranks, and"):
        models("llama").shard(2, plan=cut.plan.edit("*.layers.0.self_attn.q_proj", "colwise"))


def test_with_attention_dp_a_broken_world_is_caught(models) -> None:
    v = models.shard("llama", 2, attention_dp=True, **EVERY_LAYER)
    scatter = ops.torch_dist_reduce_scatter.default

    def keeps_the_others_tokens(gm: GraphModule, rank: int) -> None:
        n = [n for n in gm.graph.nodes if n.target is scatter][1]
        with gm.graph.inserting_after(n):
            turned = gm.graph.call_function(torch.ops.aten.mul.Scalar, (n, 1.0 if rank else 0.5))
        turned.meta = dict(n.meta)
        n.replace_all_uses_with(turned, delete_user_cb=lambda user: user is not turned)

    found = mutated(v, keeps_the_others_tokens).check()
    assert not found.ok
    assert found.first_divergence is not None
    assert found.first_divergence.layer == 0


def test_with_attention_dp_a_models_own_hints_cut_nothing(models) -> None:
    wb = adkit.Workbench(models.path("llama"), lean=True, device="cpu", max_seq_len=64, progress=False)
    v = wb.shard(2, attention_dp=True)
    assert v.check().ok
    assert v.ranks[0].memory.share == 2
    assert [c.kind for c in v.comm] == ["all_gather"]  # logits are joined all the same


@pytest.mark.parametrize("kind", ["falcon", "deepseek_v3"])
def test_values_are_compared_as_they_were_when_they_were_made(models, kind: str) -> None:
    """Falcon adds in place to a value that was compared; DeepSeek makes memory, which holds anything, and fills it."""
    found = models.shard(kind, 2, attention_dp=True).check()
    assert found.ok, found


def test_with_attention_dp_decoding_is_estimated(models) -> None:
    table = models.shard("mixtral", 2, attention_dp=True).scaling((1, 2), batch=8)
    assert table.loc[1, "comm us (b8)"] == 0
    assert table.loc[2, "comm us (b8)"] > table.loc[2, "comm us (b1)"] > 0
    assert table.loc[2, "compute us (b8)"] < table.loc[1, "compute us (b8)"]


def test_a_config_without_weights_is_checked_with_random_ones() -> None:
    wb = adkit.Workbench(
        tiny_config("llama", num_hidden_layers=1, vocab_size=144), device="cpu", progress=False
    )
    v = wb.shard(2)
    found = v.check(seed=3)
    assert found.ok
    assert found.weights == "random"
    assert v.check(seed=3, cached=True).rmse_ratio <= 1e-5
    with pytest.raises(ShardingError, match="no weights to generate with"):
        v.generate(PROMPTS)
    with pytest.raises(ConfigError, match="expected auto"):
        v.check(weights="loaded")
    with pytest.raises(ConfigError, match="at least 1"):
        v.check(tokens=0)


# --- mistakes


def without(target: Any, module: str) -> Any:
    def change(gm: GraphModule, rank: int) -> None:
        (n,) = nodes(gm, ops.torch_linear_simple.default, module)[0].users
        assert n.target is target
        n.replace_all_uses_with(n.args[0])
        gm.graph.erase_node(n)

    return change


def test_a_dropped_all_reduce_is_found(models) -> None:
    v = mutated(
        models.shard("llama", 2), without(ops.torch_dist_all_reduce.default, "layers.1.mlp.down_proj")
    )
    found = v.check()
    assert not found.ok
    d = found.first_divergence
    assert d is not None
    assert d.layer == 1
    assert "all_reduce" in d.why
    assert d.reference


def test_an_expert_that_no_rank_has_is_found(models) -> None:
    """Rank 1 was given rank 0's experts, so half of them are on no rank."""
    v = models.shard("mixtral", 2)
    first, second = v.ranks
    theirs = graph_module(second.wb).meta["adkit_local"]
    taken = [w for w in theirs if "layers.0" in w and "experts" in w]
    theirs.update({w: first.local[w] for w in taken})
    found = v.check()
    assert len(taken) == 2
    assert not found.ok
    d = found.first_divergence
    assert d is not None
    assert d.layer == 0
    assert d.rank is None  # no rank is wrong by itself, their sum is
    assert "moe" in d.op


def test_swapped_shards_are_found_where_they_are_read(models) -> None:
    v = models.shard("qwen3", 2)
    name = next(w for w in v.ranks[0].local if "layers.1.mlp.up_proj" in w)
    first, second = (r.local[name] for r in v.ranks)
    for rank, recipe in zip(v.ranks, (second, first), strict=True):
        graph_module(rank.wb).meta["adkit_local"][name] = recipe
    d = v.check().first_divergence
    assert d is not None
    assert "up_proj" in d.module
    assert d.layer == 1


def test_a_norm_that_is_not_summed_is_found(models) -> None:
    def change(gm: GraphModule, rank: int) -> None:
        n = nodes(gm, ops.torch_dist_sharded_rmsnorm.default)[0]
        n.target, n.kwargs = ops.torch_rmsnorm.default, {}

    d = mutated(models.shard("olmo2", 2), change).check().first_divergence
    assert d is not None
    assert d.op == "adkit.torch_rmsnorm"
    assert d.layer == 0


def test_a_wrong_vocabulary_offset_is_found(models) -> None:
    def change(gm: GraphModule, rank: int) -> None:
        n = nodes(gm, ops.torch_vocab_embedding.default)[0]
        n.args = (*n.args[:2], n.args[2] + 3)

    d = mutated(models.shard("llama", 2), change).check().first_divergence
    assert d is not None
    assert "embed" in d.op


def test_a_wrong_head_count_in_a_view_is_found(models) -> None:
    """Half the heads, each twice as wide: it runs, and is wrong."""

    def change(gm: GraphModule, rank: int) -> None:
        n = next(n for n in gm.graph.nodes if len(getattr(n.meta.get("val"), "shape", ())) == 4)
        n.args = (n.args[0], [*n.args[1][:2], 2, 24])

    d = mutated(models.shard("llama", 2), change).check().first_divergence
    assert d is not None
    assert d.layer == 0
    assert "view" in d.op


# --- what is shown without weights


@pytest.fixture(scope="module")
def shapes() -> VirtualRanks:
    return adkit.Workbench("llama-3.2-1b", dtype="bfloat16", device="cpu", progress=False).shard(4)


def test_memory_and_comm_hold_on_shapes(shapes: VirtualRanks) -> None:
    for rank in shapes.ranks:
        m = rank.memory
        assert m.share < 1.01
        assert sum(m.by_kind.values()) == m.weights
        assert m.cache_per_token * 4 == 16 * 2 * 8 * 64 * 2
    comm = shapes.comm
    kinds = [c.kind for c in comm]
    assert kinds.count("all_reduce") == 1 + 2 * 16
    assert kinds.count("all_gather") == 1
    layer = [c for c in comm if c.layer == 3]
    assert [c.token_bytes for c in layer] == [2048 * 2] * 2
    assert layer[0].sent(10) == 10 * 2048 * 2 * 2 * 3 / 4
    gather = comm[-1]
    assert gather.token_bytes == 128256 // 4 * 2
    assert gather.sent(1000) == gather.sent(1) == gather.token_bytes * 3  # only the last token's logits
    assert comm.on(1e9, 0.0).seconds(1) == pytest.approx(comm.sent(1) / 1e9)
    with pytest.raises(ConfigError, match="expected more than 0 bytes/s"):
        comm.on(0, 0)
    table = comm.table(100)
    assert len(table) == len(comm)
    assert table["decode bytes"].sum() == pytest.approx(table.attrs["total"]["decode bytes"])


@pytest.mark.slow
def test_large_models_are_cut_fairly() -> None:
    """Whole layers of them, at their full widths; all of their layers are in benchmarks/sharding.py."""
    options = {"dtype": "bfloat16", "device": "cpu", "progress": False}
    config = AutoConfig.for_model(**bundled_config("llama-3.1-405b") | {"num_hidden_layers": 2})
    v = adkit.Workbench(config, **options).shard(8)
    assert all(r.memory.share <= 1.01 for r in v.ranks)
    config = AutoConfig.for_model(**bundled_config("deepseek-v3") | {"num_hidden_layers": 4})
    v = adkit.Workbench(config, **options).shard(8, moe_ep=8)
    assert all(r.memory.fraction("experts") == 1 / 8 for r in v.ranks)
    assert sorted(i for r in v.ranks for i in _experts(r)) == list(range(256))


def _experts(rank: Rank) -> range:
    """Numbers of the experts that a rank has of layer 3."""
    (cuts,) = {w.cuts[0] for n, w in rank.local.items() if "layers.3.mlp.experts" in n and "gate_up" in n}
    return range(*cuts.ranges[0])


def test_shapes_alone_show_themselves(shapes: VirtualRanks) -> None:
    text = repr(shapes)
    assert "4 virtual ranks" in text
    assert "all_reduce" in text
    assert "rank 2 of 4" in repr(shapes.ranks[2])
    for thing in (shapes, shapes.comm, shapes.ranks[0], shapes.ranks[0].memory, shapes.plan):
        assert thing._repr_mimebundle_()["text/plain"] == repr(thing)
    assert list(shapes.memory().columns[:2]) == ["weights", "x fair share"]
    assert shapes.steps["detect_sharding"].status == "done"


def test_a_large_model_without_weights_is_not_run(shapes: VirtualRanks) -> None:
    with pytest.raises(ShardingError, match="too large for random"):
        shapes.check()
    with pytest.raises(ShardingError, match="no checkpoint"):
        shapes.check(weights="checkpoint")


def test_scaling_is_estimated(shapes: VirtualRanks) -> None:
    table = shapes.scaling((1, 2, 64), batch=8)
    assert table.loc[1, "comm us (b1)"] == 0
    assert table.loc[2, "compute us (b1)"] < table.loc[1, "compute us (b1)"]
    assert table.loc[2, "weights GB"] < 0.51 * table.loc[1, "weights GB"]
    assert table.loc[1, "speedup (b8)"] == 1
    assert "64" in table.loc[64, "note"]


# --- what is asked of it


def test_one_rank_is_the_model_itself(models) -> None:
    v = models.shard("llama", 1)
    assert len(v.comm) == 0
    assert v.check().ok
    assert v.ranks[0].memory.share == 1


def test_an_edited_plan_is_what_is_cut(models) -> None:
    v = models.shard("llama", 2)
    edited = v.plan.edit("model.layers.1.mlp*", "whole")
    again = models("llama").shard(2, plan=edited)
    assert again.plan == edited
    assert again.check().ok
    assert again.ranks[0].memory.weights > v.ranks[0].memory.weights
    assert len(again.comm) == len(v.comm) - 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tp": 0}, "1 or more"),
        ({"tp": 2.0}, "number of ranks"),
        ({"tp": True}, "number of ranks"),
        ({"tp": "2"}, "number of ranks"),
        ({"tp": 4, "moe_ep": 3}, "does not divide"),
        ({"tp": 2, "plan": "everything"}, "ShardingPlan"),
    ],
)
def test_impossible_worlds(models, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ShardingError, match=words):
        models("llama").shard(**options)


def test_a_plan_of_another_world_or_model_is_refused(models) -> None:
    plan = models.shard("llama", 2).plan
    with pytest.raises(ShardingError, match="made for tp=2"):
        models("llama").shard(4, plan=plan)
    with pytest.raises(ShardingError, match="another model"):
        models("mixtral").shard(2, plan=plan)
    with pytest.raises(ConfigError, match="with a plan"):
        models("llama").shard(2, plan=plan, manual_config={})
    assert isinstance(plan, ShardingPlan)


def test_unknown_settings_are_refused(models) -> None:
    with pytest.raises(ConfigError, match="did you mean 'allreduce_strategy'"):
        models("llama").shard(2, all_reduce_strategy="ONESHOT")


def test_settings_reach_the_passes_that_have_them(models) -> None:
    v = models.shard("llama", 2, allreduce_strategy="ONESHOT", shard_layers=["mlp"])
    assert {c.strategy for c in v.comm} == {"ONESHOT"}
    assert [c.module for c in v.comm] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert v.check().ok
