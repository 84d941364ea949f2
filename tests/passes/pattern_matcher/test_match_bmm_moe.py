"""Hugging Face's batched experts become the op, with the attributes, that interface mode gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import AutoConfig
from transformers.integrations.moe import batched_mm_experts_forward

from adkit.models.export import export_model
from tests.zoo import inputs_for, meta_twin, rmse_ratio, tiny, tiny_config, with_weights_of

MOE = torch.ops.adkit.torch_moe.default
BMM = torch.ops.aten.bmm.default
KEYS = (
    "cleanup_input_constraints",
    "cleanup_identity_dtype_cast",
    "cleanup_noop_call",
    "match_bmm_moe_pattern",
)
T, D, FFN, E, K = 7, 6, 5, 4, 2


def experts(gm: GraphModule) -> list[tuple[Any, Any]]:
    """What each op computes: its options, and the parameters it reads."""
    return [
        (n.kwargs, [a and a.target for a in n.args[3:]])  # type: ignore[union-attr]
        for n in gm.graph.nodes
        if n.target is MOE
    ]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((k, torch.float32) for k in ("mixtral", "qwen3_moe", "olmoe", "phimoe", "gpt_oss", "deepseek_v3")),
        ("qwen3_moe", torch.bfloat16),
        ("gpt_oss", torch.bfloat16),
    ],
)
def test_batched_products_become_the_op_that_interface_mode_gives(
    kind: str, dtype: torch.dtype, run_attention_passes: Any
) -> None:
    twin = meta_twin(tiny_config(kind), dtype)
    wanted, _ = run_attention_passes(export_model(twin), KEYS)
    gm, steps = run_attention_passes(export_model(twin, experts="batched_mm"), KEYS)
    assert experts(gm) == experts(wanted) != []
    assert steps["match_bmm_moe_pattern"].info.num_matches == len(experts(wanted))
    assert not steps["match_bmm_moe_pattern"].info.details
    assert sorted(str(n.target) for n in gm.graph.nodes) == sorted(str(n.target) for n in wanted.graph.nodes)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe", "phimoe", "gpt_oss"])
def test_logits_are_those_of_interface_mode_and_of_hugging_face(kind: str, run_attention_passes: Any) -> None:
    config, model = tiny(kind)
    got, want = (
        run_attention_passes(with_weights_of(export_model(meta_twin(config), experts=mode), model), KEYS)[0]
        for mode in ("batched_mm", "interface")
    )
    inputs = inputs_for(got, 2, 19)
    given = {k: v for k, v in inputs.items() if k != "rope_lengths"}
    with torch.no_grad():
        logits = got(**inputs)[0]
        assert torch.equal(logits, want(**inputs)[0])
        assert rmse_ratio(logits, model(**given, use_cache=False).logits) < 1e-6


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_of_full_width_are_proved_on_narrow_ones(kind: str, run_attention_passes: Any) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=1)
    gm, _ = run_attention_passes(export_model(meta_twin(config), experts="batched_mm"), KEYS)
    assert len(experts(gm)) == 1
    assert not [n for n in gm.graph.nodes if n.target is BMM and "experts" in str(n.meta["nn_module_stack"])]


class Block(nn.Module):
    """Experts by Hugging Face's batched function, with what it asks of its module."""

    has_post_expert_norm = False
    _is_expert_parallel = False
    num_experts = E

    def __init__(self, gate: Any, transposed: bool, bias: bool, gated: bool) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = gated, bias, transposed
        self._apply_gate = self.act_fn = gate
        name, width = ("gate_up_proj", 2 * FFN) if gated else ("up_proj", FFN)
        generator = torch.Generator().manual_seed(1)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)

        setattr(self, name, parameter(E, D, width) if transposed else parameter(E, width, D))
        self.down_proj = parameter(E, FFN, D) if transposed else parameter(E, D, FFN)
        if bias:
            setattr(self, f"{name}_bias", parameter(E, width))
            self.down_proj_bias = parameter(E, D)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return batched_mm_experts_forward(self, hidden, ids, weights)  # type: ignore[no-any-return]


def routed() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(T, D, generator=generator)
    ids = torch.randint(E, (T, K), generator=generator)
    return hidden, ids, torch.rand(T, K, generator=generator)


def swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def clamped_geglu(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=2.0), x[..., 1::2].clamp(-2.0, 2.0)
    return F.gelu(gate) * (up + 1)


def odd(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.sin(gate) * up


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("gate", "options"),
    [
        (swiglu, {}),
        (clamped_geglu, {"act": "gelu", "interleaved": True, "limit": 2.0, "up_offset": 1.0}),
        (F.relu, {"act": "relu", "gated": False}),
    ],
)
def test_every_layout_and_gate(
    gate: Any, options: dict[str, Any], transposed: bool, bias: bool, run_attention_passes: Any
) -> None:
    block, inputs = Block(gate, transposed, bias, gated=options.get("gated", True)), routed()
    gm = torch.export.export(block, inputs, strict=False).module()
    gm, _ = run_attention_passes(gm, KEYS)
    [(found, parameters)] = experts(gm)
    assert found == {**options, **({"transposed": True} if transposed else {})}
    assert len(parameters) == (4 if bias else 2)
    torch.testing.assert_close(gm(*inputs), block(*inputs), rtol=1e-5, atol=1e-5)


class SharedValue(Block):
    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
        seen: list[Tensor] = []
        plain, self._apply_gate = self._apply_gate, lambda x: seen.append(swiglu(x)) or seen[0]  # type: ignore[func-returns-value]
        out = super().forward(hidden, ids, weights)
        self._apply_gate = plain
        return out + seen[0].sum()


class TwoRoutings(Block):
    """The second projection picks other experts."""

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        up = torch.bmm(self.gate_up_proj[flat], hidden.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        down = torch.bmm(self.down_proj[flat.flip(0)], swiglu(up).unsqueeze(-1)).squeeze(-1)
        return (down * weights.reshape(-1).unsqueeze(-1)).view(T, K, D).sum(dim=1)


class MixedRows(Block):
    """Between the products rows are exchanged: no expert's gate."""

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        up = torch.bmm(self.gate_up_proj[flat], hidden.repeat_interleave(K, dim=0).unsqueeze(-1)).squeeze(-1)
        down = torch.bmm(self.down_proj[flat], swiglu(up.flip(0)).unsqueeze(-1)).squeeze(-1)
        return (down * weights.reshape(-1).unsqueeze(-1)).view(T, K, D).sum(dim=1)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (Block(odd, False, False, True), "gate is not a known one"),
        (SharedValue(swiglu, False, False, True), "something else reads"),
        (TwoRoutings(swiglu, False, False, True), "same experts"),
        (MixedRows(swiglu, False, False, True), "gate is not a known one"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
def test_what_is_not_a_mixture_of_experts_stays_and_the_step_says_why(
    block: Block, why: str, run_attention_passes: Any
) -> None:
    inputs = routed()
    gm, steps = run_attention_passes(torch.export.export(block, inputs, strict=False).module(), KEYS)
    info = steps["match_bmm_moe_pattern"].info
    assert len(experts(gm)) == info.num_matches == 0
    assert any(why in reason for reason in info.details["not matched"])
    torch.testing.assert_close(gm(*inputs), block(*inputs), rtol=1e-5, atol=1e-5)
