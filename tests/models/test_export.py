"""Exported graphs equal Hugging Face's own eager code, for every type the engine must serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from adkit.contract import ExportError
from adkit.graph.edit import clean
from adkit.models.export import ExportFacts, export_model, is_constant, retarget_device
from adkit.passes.base import Context
from adkit.passes.registry import get_pass
from tests.zoo import INTERFACE_TYPES, inputs_for, meta_twin, rmse_ratio, tiny, tiny_config, with_weights_of

ATTENTION = torch.ops.adkit.torch_attention.default
MOE = torch.ops.adkit.torch_moe.default
CLEANUPS = (
    "cleanup_noop_slice",
    "cleanup_noop_add",
    "cleanup_input_constraints",
    "cleanup_identity_dtype_cast",
    "cleanup_noop_call",
)
SHAPES = ((2, 37), (1, 1))


def cleaned(gm: GraphModule) -> GraphModule:
    context = Context(factory=None, engine=None, device=torch.device("cpu"))  # type: ignore[arg-type]
    for key in CLEANUPS:
        get_pass(key)().apply(gm, context)
    clean(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


def nodes(gm: GraphModule, target: Any) -> list[torch.fx.Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def reference(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    given = {k: v for k, v in inputs.items() if k != "rope_lengths"}
    with torch.no_grad():
        logits: Tensor = model(**given, use_cache=False).logits
    return logits


def worst(gm: GraphModule, model: Any, shapes: tuple[tuple[int, int], ...] = SHAPES) -> float:
    ratios = []
    for batch, length in shapes:
        inputs = inputs_for(gm, batch, length)
        with torch.no_grad():
            ratios.append(rmse_ratio(gm(**inputs)[0], reference(model, inputs)))
    return max(ratios)


@pytest.mark.parametrize("kind", [*INTERFACE_TYPES, "deepseek_v3", "llama4_text"])
def test_interface_export_from_meta_equals_hugging_face(kind: str) -> None:
    config, model = tiny(kind)
    gm = cleaned(with_weights_of(export_model(meta_twin(config)), model))
    facts: ExportFacts = gm.meta["adkit_export"]
    assert facts.attention == "interface"
    assert len(nodes(gm, ATTENTION)) == config.num_hidden_layers
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == list(facts.inputs)
    assert worst(gm, model) < 1e-6
    for node in gm.graph.nodes:
        if node.op != "output":
            assert node.meta.get("val") is not None, node
        if node.op == "call_function":
            assert {"stack_trace", "nn_module_stack"} <= set(node.meta), node
            assert node.users or node.is_impure(), node
            assert "assert" not in str(node.target), node


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen3_moe", "olmoe", "phimoe"])
def test_experts_become_one_op_a_layer(kind: str) -> None:
    gm = export_model(meta_twin(tiny_config(kind)))
    assert len(nodes(gm, MOE)) == 2


@pytest.mark.parametrize(
    ("kind", "masks"),
    [
        ("phimoe", [(8, None), (8, None)]),  # only the mask knows the window
        ("llama4_text", [(None, 8), (None, None)]),  # only the mask knows the chunk
        ("gemma2", [(8, None), (None, None)]),
        ("olmo3", [(8, None), (None, None)]),
    ],
)
def test_window_and_chunk_come_from_the_mask(kind: str, masks: list[tuple[int | None, int | None]]) -> None:
    found = nodes(export_model(meta_twin(tiny_config(kind))), ATTENTION)
    assert [(n.kwargs.get("window"), n.kwargs.get("chunk")) for n in found] == masks


@pytest.mark.parametrize("kind", ["bloom", "mpt", "falcon"])
def test_a_model_without_the_interface_keeps_its_own_attention(kind: str) -> None:
    config, model = tiny(kind)
    gm = cleaned(with_weights_of(export_model(meta_twin(config)), model))
    facts: ExportFacts = gm.meta["adkit_export"]
    assert facts.attention == "eager"
    assert "its own attention code" in facts.notes[0]
    assert not nodes(gm, ATTENTION)
    assert worst(gm, model) < 1e-6


def test_a_model_without_position_ids_has_one_input() -> None:
    gm = export_model(meta_twin(tiny_config("bloom")))
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["input_ids"]
    assert any("no position_ids" in note for note in gm.meta["adkit_export"].notes)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hugging_faces_own_attention_on_request(attention: str) -> None:
    config, model = tiny("mistral")
    gm = cleaned(with_weights_of(export_model(meta_twin(config), attention=attention), model))
    assert not nodes(gm, ATTENTION)
    assert bool(nodes(gm, torch.ops.aten.scaled_dot_product_attention.default)) is (attention == "sdpa")
    assert worst(gm, model) < 1e-6


@pytest.mark.parametrize("kind", ["bloom", "mpt", "gptj", "codegen", "rembert", "roformer", "gpt_oss"])
def test_sdpa_falls_back_to_eager_where_the_class_does_not_support_it(kind: str) -> None:
    config, model = tiny(kind, **({"is_decoder": True} if kind in ("rembert", "roformer") else {}))
    assert not model._supports_sdpa
    gm = cleaned(with_weights_of(export_model(meta_twin(config), attention="sdpa"), model))
    facts: ExportFacts = gm.meta["adkit_export"]
    assert facts.attention == "eager"
    assert facts.notes[0].startswith(f"{type(model).__name__} does not support sdpa")
    assert not nodes(gm, torch.ops.aten.scaled_dot_product_attention.default)
    assert worst(gm, model) < 1e-6


@pytest.mark.parametrize(("kind", "what"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_sdpa_falls_back_to_eager_rather_than_drop_an_argument(
    kind: str, what: str, monkeypatch: Any
) -> None:
    config, model = tiny(kind)
    for module in model.modules():  # some versions declare support that their code lacks
        if hasattr(module, "_supports_sdpa"):
            monkeypatch.setattr(type(module), "_supports_sdpa", True)
    gm = cleaned(with_weights_of(export_model(meta_twin(config), attention="sdpa"), model))
    facts: ExportFacts = gm.meta["adkit_export"]
    assert facts.attention == "eager"
    assert f"ignores {what}" in facts.notes[0]
    assert worst(gm, model) < 1e-6


@pytest.mark.parametrize("built", ["sdpa", "eager"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_class_that_picks_its_attention_when_built_exports_either_way(built: str, attention: str) -> None:
    config, model = tiny("falcon")
    other = type(model)._from_config(config, attn_implementation=built).eval()
    other.load_state_dict(model.state_dict())
    assert worst(cleaned(export_model(other, attention)), model) < 1e-6


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_as_batched_products_on_request(kind: str) -> None:
    config, model = tiny(kind)
    gm = cleaned(with_weights_of(export_model(meta_twin(config), experts="batched_mm"), model))
    assert gm.meta["adkit_export"].experts == "batched_mm"
    assert not nodes(gm, MOE)
    assert len(nodes(gm, torch.ops.aten.bmm.default)) >= 4
    assert worst(gm, model) < 1e-6


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_experts_that_follow_the_router_are_refused(experts: str) -> None:
    with pytest.raises(ExportError, match="on what the router chose"):
        export_model(meta_twin(tiny_config("mixtral")), experts=experts)
    with pytest.raises(ValueError, match="use interface or batched_mm"):
        get_pass("export_to_gm")({"experts": experts})


LENGTH_DEPENDENT = [
    ("phi3", {}),
    ("phimoe", {}),
    (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
    (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0},
            },
            "max_position_embeddings": 16,
        },
    ),
    (
        "gpt_oss",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            "max_position_embeddings": 16,
        },
    ),
]


@pytest.mark.parametrize(("kind", "more"), LENGTH_DEPENDENT)
def test_length_dependent_rope_is_right_for_each_row(kind: str, more: dict[str, Any]) -> None:
    config, model = tiny(kind, **more)
    gm = with_weights_of(export_model(meta_twin(config)), model)
    assert "rope_lengths" in gm.meta["adkit_export"].inputs
    short, boundary, long = (inputs_for(gm, 1, n, seed=n) for n in (9, 16, 40))
    alone = [reference(tiny(kind, **more)[1], inputs) for inputs in (short, boundary, long)]
    # one batch of rows of different lengths, padded on the right, each row with its own length
    batch = {
        name: torch.cat(
            [nn.functional.pad(i[name], (0, 40 - i[name].shape[1]), value=1) for i in (short, boundary, long)]
        )
        for name in short
    }
    for row, length in enumerate((9, 16, 40)):
        batch["rope_lengths"][row] = length
    with torch.no_grad():
        logits = gm(**batch)[0]
    for row, want in enumerate(alone):
        assert rmse_ratio(logits[row : row + 1, : want.shape[1]], want) < 1e-5


def test_nothing_outlives_the_export() -> None:
    import transformers.masking_utils as masking
    from transformers import AttentionInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    model = meta_twin(tiny_config("phi3"))
    before = {
        "config": str(model.config.__dict__),
        "attention": set(AttentionInterface._global_mapping),
        "masks": set(masking.AttentionMaskInterface._global_mapping),
        "experts": set(ALL_EXPERTS_FUNCTIONS),
        "packed": masking.find_packed_sequence_indices,
        "overlay": masking.chunked_overlay,
        "forwards": [m.__dict__.get("forward") for m in model.modules()],
        "tensors": [id(t) for t in (*model.parameters(), *model.buffers())],
    }
    export_model(model)
    after = {
        "config": str(model.config.__dict__),
        "attention": set(AttentionInterface._global_mapping),
        "masks": set(masking.AttentionMaskInterface._global_mapping),
        "experts": set(ALL_EXPERTS_FUNCTIONS),
        "packed": masking.find_packed_sequence_indices,
        "overlay": masking.chunked_overlay,
        "forwards": [m.__dict__.get("forward") for m in model.modules()],
        "tensors": [id(t) for t in (*model.parameters(), *model.buffers())],
    }
    assert after == before


def test_graph_holds_the_models_own_tensors_and_keeps_constants_data() -> None:
    model = meta_twin(tiny_config("phi3"))
    gm = export_model(model)
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    constants = 0
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            path, _, name = node.target.rpartition(".")
            tensor = getattr(gm.get_submodule(path), name)
            assert is_constant(node) is (id(tensor) not in own)
            constants += is_constant(node)
            assert not is_constant(node) or tensor.device.type == "cpu"
    assert constants >= 2  # short and long frequencies


def test_devices_can_be_retargeted() -> None:
    gm = export_model(meta_twin(tiny_config("phi3")))
    assert retarget_device(gm, "cpu") == 0
    assert retarget_device(gm, "meta") > 0
    text = str([(n.args, n.kwargs) for n in gm.graph.nodes])
    assert "device(type='cpu')" not in text
    assert retarget_device(gm, "meta") == 0


def test_a_mask_that_is_not_understood_is_an_error_naming_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.llama.modeling_llama as modeling
    from transformers.masking_utils import create_causal_mask

    def every_third(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (q - k) % 3 == 0

    monkeypatch.setattr(
        modeling,
        "create_causal_mask",
        lambda **kwargs: create_causal_mask(**kwargs, and_mask_function=every_third),
    )
    with pytest.raises(ExportError, match=r"model\.layers\.0\.self_attn \(LlamaAttention\).*no combination"):
        export_model(meta_twin(tiny_config("llama")))


def test_a_tensor_mask_is_an_error_naming_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.llama.modeling_llama as modeling

    monkeypatch.setattr(
        modeling, "create_causal_mask", lambda inputs_embeds, **kwargs: torch.zeros(1, 1, 11, 11)
    )
    with pytest.raises(ExportError, match=r"model\.layers\.0\.self_attn.*mask tensor"):
        export_model(meta_twin(tiny_config("llama")))


def test_an_unknown_argument_of_eager_attention_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.models.llama.modeling_llama as modeling

    def eager_attention_forward(module, query, key, value, attention_mask, scaling, twist=None):  # type: ignore[no-untyped-def]
        return query, None

    original = modeling.LlamaAttention.forward
    monkeypatch.setattr(modeling, "eager_attention_forward", eager_attention_forward)
    monkeypatch.setattr(
        modeling.LlamaAttention, "forward", lambda self, *a, **k: original(self, *a, **k, twist=2.0)
    )
    with pytest.raises(ExportError, match=r"twist=2\.0"):
        export_model(meta_twin(tiny_config("llama")))


def test_an_export_failure_names_the_module_and_prints_no_graph(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import transformers.models.llama.modeling_llama as modeling

    def forward(self: Any, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x

    monkeypatch.setattr(modeling.LlamaMLP, "forward", forward)
    with pytest.raises(ExportError, match=r"model\.layers\.0\.mlp \(LlamaMLP\)"):
        export_model(meta_twin(tiny_config("llama")))
    assert "torch.ops.aten" not in capfd.readouterr().err


def test_a_forward_that_goes_another_way_for_long_sequences_is_noted() -> None:
    notes = export_model(meta_twin(tiny_config("doge", keep_window_size=64))).meta["adkit_export"].notes
    assert any("from 2 to 64 only" in note for note in notes)
