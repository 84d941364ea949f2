"""Which nodes depend on sizes only, and what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from adkit.graph.shape_only import EvaluationError, ShapeOnly


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.register_buffer("table", torch.arange(12).reshape(3, 4) * 2)

    def forward(self, input_ids: Tensor) -> Any:
        b, s = input_ids.shape
        counted = torch.ones_like(input_ids).cumsum(-1) - 1
        masked = torch.zeros(s, s, dtype=torch.bfloat16).masked_fill_(
            torch.arange(s)[:, None] < torch.arange(s), -7.0
        )
        written = torch.zeros(b, s)
        written.add_(input_ids)
        return counted, masked, written, self.table[1] + s, self.weight * 2, input_ids + 1


@pytest.fixture(scope="module")
def outputs() -> tuple[GraphModule, list[Node]]:
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        Mixed(),
        (),
        {"input_ids": torch.zeros(2, 6, dtype=torch.long)},
        dynamic_shapes={"input_ids": dims},
        strict=False,
    )
    gm = program.module(check_guards=False)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    return gm, list(output.args[0])


def test_sizes_constants_and_what_is_made_of_them_count(outputs: Any) -> None:
    gm, (counted, masked, written, table, weight, ids) = outputs
    shapes = ShapeOnly(gm)
    assert counted in shapes
    assert masked in shapes
    assert table in shapes
    assert weight not in shapes
    assert ids not in shapes
    assert written not in shapes, "token ids are added to it in place"
    assert table not in ShapeOnly(gm, buffers=False)


def test_values_at_chosen_sizes(outputs: Any) -> None:
    gm, (counted, masked, _, table, _, _) = outputs
    shapes = ShapeOnly(gm)
    assert torch.equal(shapes.value(counted, 3, 5), torch.arange(5).expand(3, 5))
    expected = torch.full((4, 4), -7.0).triu(1)
    assert torch.equal(shapes.value(masked, 1, 4), expected), "in-place change seen, half precision widened"
    assert shapes.value(table, 1, 9).tolist() == [17, 19, 21, 23]
    assert shapes.shape(counted, 3, 5) == (3, 5)


def test_a_node_made_of_tokens_needs_them_given(outputs: Any) -> None:
    gm, (_, _, _, _, _, ids) = outputs
    shapes = ShapeOnly(gm)
    with pytest.raises(EvaluationError, match="input_ids"):
        shapes.value(ids, 1, 3)
    given = next(n for n in gm.graph.nodes if n.target == "input_ids")
    assert shapes.value(ids, 1, 3, {given: torch.tensor([[4, 5, 6]])}).tolist() == [[5, 6, 7]]


def test_equal_computations_have_equal_fingerprints(outputs: Any) -> None:
    gm, (counted, masked, *_) = outputs
    shapes = ShapeOnly(gm)
    aranges = [n for n in gm.graph.nodes if n.target is torch.ops.aten.arange.default]
    assert len(aranges) == 2
    assert shapes.fingerprint(aranges[0]) == shapes.fingerprint(aranges[1])
    assert shapes.fingerprint(counted) != shapes.fingerprint(masked)
