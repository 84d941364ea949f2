"""Experts computed on all tokens become the op on those that chose them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from adkit.models.export import export_model
from tests.zoo import inputs_for, rmse_ratio, tiny

KEY = "match_bmm_moe_pattern"
MOE = torch.ops.adkit.torch_moe.default
D, FFN, E = 12, 10, 4


class Dense(nn.Module):
    """Every expert on every token; most scores are zero."""

    def __init__(
        self, k: int = 1, weighs_input: bool = True, gate: Any = F.silu, unchosen: float = 0.0
    ) -> None:
        super().__init__()
        self.k, self.weighs_input, self.gate, self.unchosen = k, weighs_input, gate, unchosen
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)

        self.embedding, self.router = parameter(20, D), parameter(E, D)
        self.up, self.down = parameter(E, D, 2 * FFN), parameter(E, FFN, D)

    def scores(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.router)
        values, ids = logits.topk(self.k, dim=1)
        return torch.full_like(logits, self.unchosen).scatter(1, ids, values.sigmoid())

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x = F.embedding(input_ids, self.embedding).reshape(-1, D)
        column = self.scores(x).transpose(0, 1).reshape(-1, 1)
        each = x.repeat(E, 1)
        if self.weighs_input:
            each = each * column
        gate, up = torch.bmm(each.view(E, -1, D), self.up).chunk(2, dim=-1)
        out = torch.bmm(self.gate(gate) * up, self.down).view(-1, D)
        if not self.weighs_input:
            out = out * column
        return (out.reshape(E, -1, D).sum(dim=0),)


def exported(block: nn.Module) -> GraphModule:
    dims = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    ids = torch.zeros(2, 6, dtype=torch.long)
    program = torch.export.export(block, (), {"input_ids": ids}, dynamic_shapes=dims, strict=False)
    module = program.module(check_guards=False)
    module.graph.set_codegen(CodeGen())
    return GraphModule(module, module.graph)


@pytest.mark.parametrize("weighs_input", [True, False])
@pytest.mark.parametrize(("k", "gate"), [(1, F.silu), (2, F.gelu)])
def test_only_chosen_experts_are_computed(
    k: int, gate: Any, weighs_input: bool, run_attention_passes: Any
) -> None:
    block = Dense(k, weighs_input, gate)
    gm, steps = run_attention_passes(exported(block), (KEY,))
    assert steps[KEY].info.num_matches == 1
    assert sum(n.target is MOE for n in gm.graph.nodes) == (k if weighs_input else 1)
    assert not [n for n in gm.graph.nodes if n.target is torch.ops.aten.bmm.default]
    ids = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gm(input_ids=ids)[0], block(ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (Dense(gate=torch.sin), "not known"),
        (Dense(unchosen=0.1), "were not chosen have a score"),
    ],
    ids=["gate", "scores"],
)
def test_what_is_not_a_choice_of_experts_stays_and_the_step_says_why(
    block: Dense, why: str, run_attention_passes: Any
) -> None:
    gm, steps = run_attention_passes(exported(block), (KEY,))
    assert steps[KEY].info.num_matches == 0
    assert any(why in reason for reason in steps[KEY].info.details["not matched"])
    ids = torch.randint(20, (3, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(gm(input_ids=ids)[0], block(ids)[0])


def test_llama_4_computes_the_experts_that_its_tokens_chose(run_attention_passes: Any) -> None:
    config, model = tiny("llama4_text", num_experts_per_tok=1)
    gm, steps = run_attention_passes(export_model(model), (KEY,))
    assert steps[KEY].info.num_matches == config.num_hidden_layers
    inputs = inputs_for(gm, 2, 19)
    with torch.no_grad():
        assert rmse_ratio(gm(**inputs)[0], model(**inputs, use_cache=False).logits) < 1e-6
