"""Positions counted in the graph come from ``position_ids`` afterwards, row by row where shapes allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

KEYS = ("match_positions",)


class Learned(nn.Module):
    """Token embedding plus a learned position table; ``count`` says how positions are counted."""

    def __init__(self, count: Any) -> None:
        super().__init__()
        self.tokens, self.table = nn.Embedding(20, 8), nn.Embedding(40, 8)
        self.count = count

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.tokens(input_ids) + self.table(self.count(input_ids)),)


def exported(model: nn.Module) -> Any:
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids = torch.zeros(2, 6, dtype=torch.long)
    program = torch.export.export(
        model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": dims}, strict=False
    )
    module = program.module(check_guards=False)
    module.graph.set_codegen(CodeGen())
    return GraphModule(module, module.graph)


@pytest.mark.parametrize(
    ("count", "offset"),
    [
        (lambda ids: torch.arange(ids.shape[1]), 0),
        (lambda ids: torch.arange(ids.shape[1]).unsqueeze(0) + 2, 2),
        (lambda ids: torch.arange(ids.shape[1]).expand(ids.shape), 0),
        (lambda ids: torch.ones_like(ids).cumsum(1) - 1 + 3, 3),
        (lambda ids: torch.ones(ids.shape).cumsum(1).long(), 1),
    ],
)
def test_each_row_takes_its_own_positions(count: Any, offset: int, run_attention_passes: Any) -> None:
    model = Learned(count)
    gm, steps = run_attention_passes(exported(model), KEYS)
    assert steps["match_positions"].info.num_matches == 1
    ids, positions = torch.randint(20, (2, 7)), torch.stack((torch.arange(7), torch.arange(9, 16)))
    expected = model.tokens(ids) + model.table(positions + offset)
    assert torch.equal(gm(input_ids=ids, position_ids=positions)[0], expected)
    assert all(n.meta["val"] is not None for n in gm.graph.nodes if n.op == "call_function" and n.users)


def test_where_the_batch_has_no_place_the_first_row_serves(run_attention_passes: Any) -> None:
    class Flat(Learned):
        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            b, s = input_ids.shape
            where = self.table(torch.arange(s)).view(1, s, 2, 4).transpose(1, 2)
            return (self.tokens(input_ids).view(b, s, 2, 4).transpose(1, 2) * where,)

    gm, steps = run_attention_passes(exported(model := Flat(None)), KEYS)
    assert steps["match_positions"].info.details == {"from the first row only": 1}
    ids, same = torch.randint(20, (2, 7)), torch.arange(7).expand(2, 7)
    assert torch.equal(gm(input_ids=ids, position_ids=same)[0], model(ids)[0])
    assert not torch.equal(gm(input_ids=ids, position_ids=same + 3)[0], model(ids)[0])


@pytest.mark.parametrize(
    "count",
    [
        lambda s: torch.ones(s).cumsum(0).cumsum(0),  # depends on the positions before
        lambda s: s - torch.arange(s),  # depends on the length
    ],
)
def test_counting_that_is_no_position_is_named_and_left(count: Any, run_attention_passes: Any) -> None:
    class Weighted(nn.Module):
        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            return (input_ids * count(input_ids.shape[1]),)

    gm, steps = run_attention_passes(exported(Weighted()), KEYS)
    info = steps["match_positions"].info
    assert "position_ids" not in [n.target for n in gm.graph.nodes]
    assert info.num_matches == 0
    assert "no positions" in info.details["not matched"]


def test_a_graph_that_counts_nothing_is_left_alone(run_attention_passes: Any) -> None:
    gm = exported(Learned(torch.zeros_like))
    _, steps = run_attention_passes(gm, KEYS)
    assert steps["match_positions"].info.num_matches == 0
    assert not steps["match_positions"].changed


def test_what_only_long_sequences_tell_apart_is_computed_from_positions(run_attention_passes: Any) -> None:
    class Tempered(Learned):
        """Scales by a step function of the position whose first step is far away, as Llama 4 does."""

        def forward(self, input_ids: Tensor) -> tuple[Tensor]:
            positions = torch.arange(input_ids.shape[1])
            scale = torch.log1p(torch.floor((positions.float() + 1.0) / 1000.0)) + 1.0
            return (self.tokens(input_ids) * scale.view(1, -1, 1),)

    model = Tempered(None)
    gm, steps = run_attention_passes(exported(model), KEYS)
    assert steps["match_positions"].info.num_matches == 1
    ids, positions = torch.randint(20, (1, 4)), torch.tensor([[998, 999, 1998, 1999]])
    scale = torch.log1p(torch.tensor([0.0, 1.0, 1.0, 2.0])) + 1.0
    torch.testing.assert_close(
        gm(input_ids=ids, position_ids=positions)[0], model.tokens(ids) * scale[:, None]
    )
