"""Plans by hand and by Hugging Face: names, styles, contradictions."""

from __future__ import annotations

from typing import Any

import pytest

from adkit.contract import DistConfig, ShardingError
from adkit.graph.placement import PLAN
from adkit.passes import Stage
from adkit.passes.sharding.detect_sharding import DetectShardingConfig, plan_sharding
from adkit.passes.sharding.sources import huggingface_plan
from tests.passes.graphs import rmse_ratio
from tests.passes.sharding.tiny import canonical, logits, logits_on_ranks, planned, run
from tests.zoo import tiny_config

ATTENTION = {f"layers.*.self_attn.{n}_proj": "colwise" for n in "qkv"} | {
    "layers.*.self_attn.o_proj": "rowwise"
}


def test_a_plan_by_hand_comes_first_and_the_rest_is_found() -> None:
    plan = planned(canonical("llama"), manual_config={"tp_plan": ATTENTION, "head_dim": 12})
    assert {r.source for r in plan.find("*.self_attn.*")} == {"manual"}
    assert {r.layer_type for r in plan.find("*.self_attn.*")} == {"mha"}
    assert {r.source for r in plan.find("*.mlp.*")} == {"heuristic"}


def test_without_partial_configs_the_rest_stays_whole() -> None:
    plan = planned(canonical("llama"), manual_config=ATTENTION, support_partial_config=False)
    assert {r.decision for r in plan.find("*.mlp.*")} == {"whole"}
    assert all("no plan names it" in r.why for r in plan.find("*.mlp.*"))
    assert {r.decision for r in plan.find("*.q_proj")} == {"colwise"}


def test_a_path_is_meant_more_than_a_pattern() -> None:
    plan = planned(
        canonical("llama"),
        manual_config={"model.layers.1.mlp.down_proj": "whole", "layers.*.mlp.*": "whole", **ATTENTION},
    )
    assert {r.decision for r in plan.find("*.mlp.*")} == {"whole"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"layers.*.self_attn.q_porj": "colwise"}, r"names no linear.*did you mean '.*q_proj"),
        ({"layers.*.self_attn.q_proj": "colwize"}, r"style 'colwize'; did you mean 'colwise'"),
        ({"model.embed_tokens": "rowwise"}, r"does not fit an embedding"),
        ({"*.q_proj": "colwise", "*layers.0.*": "rowwise"}, r"contradicts itself: '\*.q_proj'"),
        ({**ATTENTION, "layers.*.self_attn.o_proj": "whole"}, r"manual plan contradicts itself at .*o_proj.*q_proj"),
        ({"layers.*.self_attn.q_proj": "colwise"}, r"o_proj"),
        ({"layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "whole"}, r"contradicts itself"),
        ({"tp_plan": ATTENTION, "head_dim": 16}, r"head_dim=16, but a head of .* has 12"),
        ({"tp_plan": ATTENTION, "heads": 16}, r"'heads' beside 'tp_plan'"),
        ({"layers": {"q": "colwise"}}, r"must map module paths to styles"),
    ],
)  # fmt: skip
def test_a_bad_plan(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ShardingError, match=told):
        planned(canonical("llama"), manual_config=config, sharding_source=["manual"])


@pytest.mark.parametrize("kind", ["llama", "olmo2", "phi3", "mixtral"])
def test_hugging_faces_own_plan_is_followed(kind: str) -> None:
    gm = canonical(kind)
    expected, dist = logits(gm), DistConfig.of(tp=2)
    fields = {"stage": Stage.SHARDING, "factory_source": "huggingface"}
    plan = plan_sharding(gm, dist, DetectShardingConfig.model_validate(fields), tiny_config(kind))
    assert "factory" in {r.source for r in plan.find("*.self_attn.*")}
    assert [(r.decision, r.source) for r in plan.find("lm_head")] == [("gather", "factory")]
    decided = {r.decision for r in plan.find("*.self_attn.*") if r.weights}
    assert ("gather" in decided) == (kind in ("olmo2", "phi3")), "as its config says"
    gm.meta[PLAN] = plan
    run(gm, "sharding_transform_executor", dist)
    for out in logits_on_ranks(gm, dist):
        assert rmse_ratio(out, expected) < 1e-5


def test_a_factory_plan_is_only_asked_for() -> None:
    theirs = huggingface_plan(tiny_config("llama"))
    assert theirs["layers.*.mlp.down_proj"] == "rowwise"
    assert theirs["lm_head"] == "colwise_gather_output"
    plan = planned(
        canonical("llama"), factory_config={"layers.*.mlp.*": "whole", "layers.*.not_there": "colwise"}
    )
    assert {r.decision for r in plan.find("*.mlp.*")} == {"whole"}
    assert {r.source for r in plan.find("*.mlp.*")} == {"factory"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sharding_source": ["factory"]}, "factory_source is unknown ('huggingface': the model's own plan)"),
        ({"sharding_source": ["factory"], "factory_source": "huggingface"}, "the model's config has no plan"),
        ({"sharding_source": ["manual"]}, "manual_config is empty"),
    ],
)
def test_sources_that_say_nothing_are_told(settings: dict[str, Any], told: str) -> None:
    plan = planned(canonical("llama"), **settings)
    assert {r.decision for r in plan} == {"whole"}
    assert {r.source for r in plan} == {""}
    assert all(told in r.why for r in plan)
