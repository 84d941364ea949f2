"""Plans of tiny models: what is cut where, and what stays whole and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adkit.contract import DistConfig, ShardingError
from adkit.graph.placement import PLAN, REPLICATED, ShardingPlan
from tests.passes.graphs import rmse_ratio
from tests.passes.sharding.tiny import canonical, hinted, logits, logits_on_ranks, planned, run, short
from tests.zoo import INTERFACE_TYPES

QKV = {f"self_attn.{n}_proj": "colwise 12" for n in "qkv"}
ATTENTION = {**QKV, "self_attn.o_proj": "rowwise 12 sum"}
MLP = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise sum"}
FUSED_MLP = {"mlp.gate_up_proj": "colwise (80, 80)", "mlp.down_proj": "rowwise sum"}
EXPERTS = {"mlp.experts": "experts", "mlp": "follow sum"}
EDGES = {"model.embed_tokens": "vocab sum", "lm_head": "gather"}

#: The first layer's rows, and those outside layers: decision, smallest piece, blocks, whether a sum over ranks follows.
PLANS: dict[str, dict[str, str]] = {
    "llama": {**EDGES, **ATTENTION, **MLP},
    "qwen3": {**EDGES, **ATTENTION, **MLP},
    "gemma2": {**EDGES, **ATTENTION, **MLP, "model.embed_tokens": "vocab / follow sum"},
    "phi3": {
        **EDGES, **FUSED_MLP,
        "self_attn.qkv_proj": "colwise 12 (48, 24, 24)", "self_attn.o_proj": "rowwise 12 sum",
    },
    "gpt_oss": {**EDGES, **ATTENTION, **EXPERTS, "mlp.router": "whole", "self_attn": "follow"},
    "mixtral": {**EDGES, **ATTENTION, **EXPERTS, "mlp.gate": "whole"},
    "qwen3_moe": {**EDGES, **ATTENTION, **EXPERTS, "mlp.gate": "whole"},
    "cohere2": {
        **EDGES, **ATTENTION, **MLP,
        "self_attn.o_proj": "rowwise 12", "mlp.down_proj": "rowwise", "model.layers.0": "follow sum",
    },
    "olmo2": {**EDGES, **ATTENTION, **MLP, "self_attn.q_norm": "follow 12", "self_attn.k_norm": "follow 12"},
    "glm4": {**EDGES, **ATTENTION, **FUSED_MLP},
}  # fmt: skip


def table(plan: ShardingPlan) -> dict[str, str]:
    """The rows of the first layer and outside layers as short words by module."""
    found: dict[str, str] = {}
    for row in plan:
        if row.layer not in (0, None):
            continue
        words = [row.decision]
        words += [str(row.min_local)] if row.min_local > 1 else []
        words += [str(row.sizes)] if row.sizes else []
        words += ["sum"] if row.reduce else []
        name = short(row)
        found[name] = f"{found[name]} / {' '.join(words)}" if name in found else " ".join(words)
    return found


@pytest.mark.parametrize("kind", PLANS)
def test_what_is_cut(kind: str) -> None:
    assert table(planned(canonical(kind))) == PLANS[kind]


@pytest.mark.parametrize("kind", PLANS)
def test_the_hinted_graph_computes_the_same(kind: str) -> None:
    gm = canonical(kind)
    expected = logits(gm)
    assert rmse_ratio(logits(hinted(gm)), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [*sorted({*INTERFACE_TYPES, "deepseek_v2", "falcon", "gptj"} - {*PLANS}), "bloom"]
)
def test_every_type_is_cut_or_says_why_not(kind: str) -> None:
    gm = canonical(kind)
    expected, dist = logits(gm), DistConfig.of(tp=2)
    plan = planned(gm, dist)
    assert all(r.why for r in plan)
    assert sum(r.decision != "whole" for r in plan) >= 2, "at least the vocabulary"
    run(gm, "sharding_transform_executor", dist)
    assert rmse_ratio(logits(gm), expected) < 1e-6
    for out in logits_on_ranks(gm, dist):
        assert rmse_ratio(out, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "moe_ep"), [(2, 2), (8, 4)])
@pytest.mark.parametrize("kind", [*PLANS, "deepseek_v3"])
def test_ranks_compute_what_one_computes(kind: str, tp: int, moe_ep: int) -> None:
    sizes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 96}
    if kind == "deepseek_v3":
        sizes = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 96, "n_routed_experts": 8}
    elif "experts" in str(PLANS[kind]):
        sizes["num_experts" if kind == "qwen3_moe" else "num_local_experts"] = 8
    gm = canonical(kind, **sizes)
    expected, dist = logits(gm), DistConfig.of(tp=tp, moe_ep=moe_ep)
    for out in logits_on_ranks(hinted(gm, dist), dist):
        assert rmse_ratio(out, expected) < 1e-5


def test_one_rank_changes_nothing() -> None:
    gm = canonical("llama")
    before = [n.format_node() for n in gm.graph.nodes]
    for key in ("detect_sharding", "sharding_transform_executor"):
        assert run(gm, key, DistConfig.of()).skipped
    assert [n.format_node() for n in gm.graph.nodes] == before
    assert PLAN not in gm.meta


def test_latent_projections_stay_whole_and_what_reads_them_is_cut() -> None:
    plan = planned(canonical("deepseek_v3"))
    rows = {short(r): r for r in plan if r.layer in (0, None)}
    assert rows["self_attn.q_b_proj"].decision == rows["self_attn.kv_b_proj"].decision == "colwise"
    assert rows["self_attn.q_b_proj"].layer_type == "mla"
    assert rows["self_attn.q_a_proj"].decision == "whole"
    assert "latent" in rows["self_attn.q_a_proj"].why
    assert "slice" in rows["self_attn.kv_a_proj_with_mqa"].why
    shared = next(r for r in plan if r.module.endswith("shared_experts.down_proj"))
    assert (shared.decision, shared.layer_type, shared.reduce) == ("rowwise", "moe", False)
    assert sum(r.reduce for r in plan) == 1 + 2 * 2, "routed and shared experts share one sum"


def test_weights_stored_turned_around_are_cut_as_others() -> None:
    plan = planned(canonical("gpt2"))
    rows = {r.module.removeprefix("transformer.h.0."): r for r in plan if r.layer == 0}
    assert {n: r.decision for n, r in rows.items()} == {
        "attn.c_attn": "colwise", "attn.c_proj": "rowwise", "mlp.c_fc": "colwise", "mlp.c_proj": "rowwise",
    }  # fmt: skip
    assert rows["attn.c_attn"].weights == (
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_attn.bias",
    )
    assert rows["attn.c_attn"].sizes == (48, 48, 48)
    again = planned(canonical("gpt2"), manual_config=plan.to_manual())
    assert [r.decision for r in again] == [r.decision for r in plan]


@pytest.mark.parametrize("kind", ["falcon", "gpt_bigcode"])
def test_one_key_and_value_head_in_a_fused_weight_is_everywhere(kind: str) -> None:
    gm = hinted(canonical(kind), 4)
    fused = [n for n in gm.graph.nodes if n.kwargs.get("output_sizes")]
    assert len(fused) == 2
    for node in fused:
        assert node.kwargs["output_sizes"] == [48, 12, 12]
        assert node.kwargs["tp_min_local_shape"] == 12


def test_weights_of_other_products_stay_whole_and_say_so() -> None:
    gm = canonical("llama")
    for node in gm.graph.nodes:
        if any("down_proj" in str(a.target) for a in node.all_input_nodes):
            node.target = torch.ops.aten.linear.default  # as if it had not been matched
    rows = {short(r): r for r in planned(gm) if r.layer == 0}
    assert (
        rows["mlp.down_proj"].decision
        == rows["mlp.gate_proj"].decision
        == rows["mlp.up_proj"].decision
        == "whole"
    )
    assert (
        rows["mlp.down_proj"].why == "linear is no torch_linear_simple, so nothing is known about its weight"
    )
    assert rows["self_attn.o_proj"].decision == "rowwise"


def test_kv_heads_fewer_than_ranks_are_copied() -> None:
    gm = hinted(canonical("llama", num_attention_heads=8, num_key_value_heads=2, hidden_size=96), 8)
    k = next(n for n in gm.graph.nodes if "k_proj" in str(n.args[1:2]))
    assert k.kwargs["tp_min_local_shape"] == 12


def test_tied_tables_are_cut_alike() -> None:
    plan = planned(canonical("gemma2"))
    weights = {w for r in plan.find("lm_head") + plan.find("model.embed_tokens") for w in r.weights}
    assert len(weights) == 1
    assert {r.dim for r in plan if weights & set(r.weights)} == {0}
    plan = planned(canonical("gemma2"), manual_config={"lm_head": "whole"})
    assert {r.decision for r in plan if weights & set(r.weights)} == {"whole"}


def test_layer_types_choose() -> None:
    plan = planned(canonical("mixtral"), shard_layers=["moe"])
    assert {r.decision for r in plan if r.layer_type != "moe"} == {"whole"}
    assert all("shard_layers" in r.why for r in plan if r.layer_type == "mha")
    gm = canonical("mixtral")
    planned(gm)
    run(gm, "sharding_transform_executor", DistConfig.of(tp=2), shard_layers=["mha"])
    assert all(n.kwargs.get("layer_type") in (None, "mha") for n in gm.graph.nodes)


def test_dimensions_choose() -> None:
    only_experts = planned(canonical("mixtral"), sharding_dims=["ep"])
    assert {r.decision for r in only_experts if r.weights} == {"experts", "whole"}
    only_dense = planned(canonical("mixtral"), sharding_dims=["tp"])
    assert {r.decision for r in only_dense.find("*.experts")} == {"whole"}


def test_attention_data_parallelism_cuts_experts_alone() -> None:
    gm = canonical("mixtral")
    plan = planned(gm, DistConfig.of(tp=2, enable_attention_dp=True), enable_attention_dp=True)
    assert {r.decision for r in plan if r.weights} == {"experts", "whole"}
    assert {(r.decision, r.tokens) for r in plan if r.reduce} == {("experts", "gathered")}
    assert all("sequences of its own" in r.why for r in plan.find("*.q_proj"))
    assert all("shard_layers names no such layers" in r.why for r in plan.find("lm_head"))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_simple_shard_only_joins_every_output(kind: str) -> None:
    gm = canonical(kind)
    expected = logits(gm)
    plan = planned(gm, simple_shard_only=True)
    assert {r.decision for r in plan} == {"gather", "whole"}
    assert {r.decision for r in plan.find("*.mlp.*")} == {"gather"}
    if kind == "gemma2":  # whose head is its embedding
        (head,) = plan.find("lm_head")
        assert (head.decision, "is read by a lookup, too" in head.why) == ("whole", True)
    dist = DistConfig.of(tp=2)
    run(gm, "sharding_transform_executor", dist)
    assert rmse_ratio(logits_on_ranks(gm, dist)[1], expected) < 1e-5


def test_leftover_linears_are_joined_on_request() -> None:
    plan = planned(canonical("deepseek_v3"), shard_all_unprocessed=True, simple_shard_filter="q_a_proj")
    assert {r.decision for r in plan.find("*.q_a_proj")} == {"gather"}
    assert {r.decision for r in plan.find("*.kv_a_proj_with_mqa")} == {"whole"}


@pytest.mark.parametrize(
    ("kind", "sizes", "dist", "told"),
    [
        ("llama", {}, DistConfig.of(tp=8), r"4 query heads .*tp=8.*tp 2, 4 would work.*manual_config=\{'model"),
        ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 72}, DistConfig.of(tp=2),
         r"3 key/value heads .*divide their number or be a multiple"),
        ("llama", {"vocab_size": 131}, DistConfig.of(tp=2), r"131 vocabulary rows .*model.embed_tokens"),
        ("llama", {"intermediate_size": 81}, DistConfig.of(tp=2), r"81 features of .*mlp"),
        ("mixtral", {"num_local_experts": 3}, DistConfig.of(tp=2), r"3 experts .*moe_ep_size=2.*1 would work"),
        ("mixtral", {"intermediate_size": 81}, DistConfig.of(tp=2, moe_ep=1), r"81 hidden features .*moe_tp_size=2"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide(kind: str, sizes: dict[str, Any], dist: DistConfig, told: str) -> None:
    with pytest.raises(ShardingError, match=told):
        planned(canonical(kind, **sizes), dist)


def test_the_way_out_that_the_error_names_works() -> None:
    gm = canonical("llama", vocab_size=131)
    with pytest.raises(ShardingError) as error:
        planned(gm)
    config = eval(str(error.value).split("manual_config=")[1])
    plan = planned(gm, manual_config=config)
    assert {r.decision for r in plan.find("model.embed_tokens") + plan.find("lm_head")} == {"whole"}
    assert {r.decision for r in plan.find("*.q_proj")} == {"colwise"}


def test_a_world_that_contradicts_the_settings() -> None:
    with pytest.raises(ShardingError, match="tp_size=4"):
        planned(canonical("llama"), dist_mapping={"tp": 4})
    with pytest.raises(ShardingError, match=r"^pp_size=2: pipeline parallelism is not there"):
        planned(canonical("llama"), dist_mapping={"pp_size": 2})
    second = DistConfig.of(tp=2).at(1)  # settings are the same on every rank
    same = {"dist_config": DistConfig.of(tp=2), "dist_mapping": {"tp": 2, "rank": 0}}
    assert len(planned(canonical("llama"), second, **same)) == 16
    with pytest.raises(ShardingError, match="enable_attention_dp"):
        planned(canonical("llama"), enable_attention_dp=True)


def test_a_plan_is_edited_and_goes_round_as_manual_config() -> None:
    gm = canonical("llama")
    plan = planned(gm)
    with pytest.raises(ValueError, match="expected one of colwise, rowwise"):
        plan.edit("model.layers.0.mlp*", "colwize")  # type: ignore[arg-type]
    edited = plan.edit("model.layers.0.mlp*", "whole")
    stays = edited.find("model.layers.0.mlp.down_proj")[0]
    assert (stays.dim, stays.reduce, stays.placement, stays.source) == (None, False, REPLICATED, "user")
    gm.meta[PLAN] = edited
    expected = logits(gm)
    run(gm, "sharding_transform_executor", DistConfig.of(tp=2))
    modes = [n.kwargs["tp_mode"] for n in gm.graph.nodes if "tp_mode" in n.kwargs]
    assert modes.count("rowwise") == 3
    assert torch.equal(logits(gm), expected)
    again = planned(canonical("llama"), manual_config=edited.to_manual(), sharding_source=["manual"])
    assert [(r.name, r.decision, r.reduce) for r in again] == [(r.name, r.decision, r.reduce) for r in edited]


def test_a_bad_edit_is_told_when_it_is_applied() -> None:
    gm = canonical("llama")
    gm.meta[PLAN] = planned(gm).edit("*layers.0.self_attn.o_proj", "whole")
    with pytest.raises(ShardingError, match=r"plan contradicts itself at .*o_proj.*q_proj"):
        run(gm, "sharding_transform_executor", DistConfig.of(tp=2))


def test_a_plan_of_another_graph() -> None:
    gm = canonical("mixtral")
    gm.meta[PLAN] = planned(canonical("phi3")).edit("lm_head", "whole")
    with pytest.raises(ShardingError, match=r"made for another one|cannot be"):
        run(gm, "sharding_transform_executor", DistConfig.of(tp=2))


def test_the_pass_that_cuts_is_asked_first_how_ranks_talk_then_the_plan_then_the_world() -> None:
    def talk(world: str = "AUTO", detect: Any = None, cut: Any = None) -> set[str]:
        dist = DistConfig.of(tp=2, allreduce_strategy=world)
        gm = canonical("llama")
        run(gm, "detect_sharding", dist, **(detect or {}))
        run(gm, "sharding_transform_executor", dist)
        run(gm, "apply_sharding_hints", dist, **(cut or {}))
        return {n.args[-1] for n in gm.graph.nodes if "torch_dist" in str(n.target)}

    one, two = {"allreduce_strategy": "ONESHOT"}, {"allreduce_strategy": "TWOSHOT"}
    named = {"dist_config": DistConfig.of(tp=2, allreduce_strategy="LOWPRECISION")}
    assert talk() == {"AUTO"}
    assert talk("NCCL") == {"NCCL", "AUTO"}
    assert talk("NCCL", one) == {"ONESHOT", "AUTO"}
    assert talk("NCCL", one, two) == {"TWOSHOT", "AUTO"}
    assert talk("AUTO", named) == {"LOWPRECISION", "AUTO"}
    assert talk("AUTO", one, named) == {"LOWPRECISION", "AUTO"}
    assert talk("AUTO", {"allgather_strategy": "SYMM_MEM"}) == {"AUTO", "SYMM_MEM"}
