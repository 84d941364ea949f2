"""The placement algebra, op by op: what a rule says is checked by cutting values and computing on the pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from adkit.graph.edit import fake_value
from adkit.graph.placement import PARTIAL, REPLICATED, cut
from adkit.passes.sharding.rules import Unaccounted, Walk, propagate
from adkit.passes.sharding.spread import TERM, WHOLE, Share, Spread, regroup

ops: Any = torch.ops.adkit
aten: Any = torch.ops.aten
RANKS = 2


class Bench:
    """One call on values of which some are cut or terms of a sum."""

    def __init__(self, target: Any, *operands: Any, holds: dict[int, Any], **kwargs: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.graph, self.values = Graph(), {}  # type: ignore[var-annotated]
        self.walk = Walk({})
        args = []
        for i, a in enumerate(operands):
            args.append(self._value(f"x{i}", a, holds.get(i), generator) if isinstance(a, tuple) else a)
        if kwargs.pop("as_list", False):
            args = [args]
        self.node = self.graph.call_function(target, tuple(args), kwargs)
        self.node.meta["val"] = fake_value(target, tuple(args), kwargs)
        self.graph.output(self.node)
        self.target, self.args, self.kwargs = target, args, kwargs

    def _value(self, name: str, shape: tuple[int, ...], held: Any, generator: torch.Generator) -> Node:
        node = self.graph.placeholder(name)
        self.values[node] = torch.randn(shape, generator=generator, dtype=torch.float64)
        node.meta["val"] = self.values[node].to("meta")
        if held == "partial":
            self.walk.found.spreads[node] = TERM
        elif held is not None:
            self.walk.found.spreads[node] = Spread("cut", held, Share(shape[held]))
        return node

    def spread(self) -> Any:
        """What the rule says of the output."""
        self.walk.visit(self.node)
        return self.walk.found.spreads.get(self.node, WHOLE)

    def on_ranks(self) -> list[Any]:
        """The call on each rank's pieces, literals and operands as the rule asks."""
        return [self.target(*self._local(self.args, r), **self.kwargs) for r in range(RANKS)]

    def whole(self) -> Any:
        """The call on the values themselves."""
        swap = torch.fx.node.map_arg(tuple(self.args), self.values.__getitem__)
        return self.target(*swap, **self.kwargs)

    def _local(self, args: Any, rank: int) -> Any:
        found = self.walk.found

        def part(node: Node) -> Tensor:
            value, spread = self.values[node], found.of(node)
            slices = found.sliced.get((self.node, node))
            if spread.kind == "partial":
                return value * (0.25 if rank == 0 else 0.75)
            dim = spread.dim if spread.kind == "cut" else slices.dim if slices is not None else None
            return value if dim is None else value.chunk(RANKS, dim)[rank]

        local = list(torch.fx.node.map_arg(tuple(args), part))
        if self.node in found.scaled:
            shape = list(local[1])
            shape[found.scaled[self.node][0]] //= RANKS
            local[1] = shape
        if self.node in found.expanded:
            shape = list(local[1])
            shape[found.expanded[self.node]] = -1
            local[1] = shape
        return local


def agrees(bench: Bench) -> None:
    """The pieces that the rule promises are what the ranks compute."""
    spreads = bench.spread()
    expected, pieces = bench.whole(), bench.on_ranks()
    if isinstance(spreads, Spread):
        spreads, expected, pieces = (spreads,), (expected,), [(p,) for p in pieces]
    for i, spread in enumerate(spreads):
        mine = [p[i] for p in pieces]
        if spread.kind == "cut":
            torch.testing.assert_close(torch.cat(mine, spread.dim), expected[i])
        elif spread.kind == "partial":
            torch.testing.assert_close(sum(mine), expected[i])
        else:
            for piece in mine:
                torch.testing.assert_close(piece, expected[i])


X = (2, 3, 8)
HEADS = (2, 3, 4, 6)
CASES: dict[str, Callable[[], Bench]] = {
    "silu": lambda: Bench(aten.silu.default, X, holds={0: 2}),
    "product of two cuts": lambda: Bench(aten.mul.Tensor, X, X, holds={0: 2, 1: 2}),
    "a whole factor is sliced": lambda: Bench(aten.mul.Tensor, X, (8,), holds={0: 2}),
    "a broadcast factor is not": lambda: Bench(aten.mul.Tensor, HEADS, (4, 1), holds={0: 2}),
    "a cut weight against a whole value": lambda: Bench(aten.add.Tensor, (8,), X, holds={0: 0}),
    "terms add up": lambda: Bench(aten.add.Tensor, X, X, holds={0: "partial", 1: "partial"}),
    "a term times a number": lambda: Bench(aten.mul.Tensor, X, 3.0, holds={0: "partial"}),
    "a term times a whole value": lambda: Bench(aten.mul.Tensor, X, (8,), holds={0: "partial"}),
    "a term over a number": lambda: Bench(aten.div.Tensor, X, 3.0, holds={0: "partial"}),
    "a term in another shape": lambda: Bench(aten.view.default, X, [6, 8], holds={0: "partial"}),
    "heads out of features": lambda: Bench(aten.view.default, X, [2, 3, -1, 2], holds={0: 2}),
    "a literal head count": lambda: Bench(aten.view.default, X, [2, 3, 4, 2], holds={0: 2}),
    "features out of heads": lambda: Bench(aten.reshape.default, HEADS, [2, 3, 24], holds={0: 2}),
    "tokens flattened": lambda: Bench(aten.view.default, X, [-1, 8], holds={0: 2}),
    "flatten": lambda: Bench(aten.flatten.using_ints, HEADS, 2, holds={0: 2}),
    "transpose": lambda: Bench(aten.transpose.int, HEADS, 1, 2, holds={0: 2}),
    "permute": lambda: Bench(aten.permute.default, HEADS, [0, 2, 3, 1], holds={0: 2}),
    "unsqueeze before": lambda: Bench(aten.unsqueeze.default, HEADS, 1, holds={0: 2}),
    "unsqueeze behind": lambda: Bench(aten.unsqueeze.default, HEADS, -1, holds={0: 2}),
    "squeeze": lambda: Bench(aten.squeeze.dim, (2, 1, 4), 1, holds={0: 2}),
    "expand": lambda: Bench(aten.expand.default, (2, 1, 4), [2, 3, 4], holds={0: 2}),
    "cat of features of heads": lambda: Bench(aten.cat.default, HEADS, HEADS, holds={0: 2}, as_list=True),
    "slice beside the cut": lambda: Bench(aten.slice.Tensor, HEADS, 3, 0, 2, holds={0: 2}),
    "split beside the cut": lambda: Bench(aten.split_with_sizes.default, HEADS, [2, 4], -1, holds={0: 2}),
    "select beside the cut": lambda: Bench(aten.select.int, HEADS, 1, 0, holds={0: 2}),
    "softmax beside the cut": lambda: Bench(aten.softmax.int, HEADS, -1, holds={0: 2}),
    "mean beside the cut": lambda: Bench(aten.mean.dim, HEADS, [-1], True, holds={0: 2}),
    "norm of heads": lambda: Bench(ops.torch_rmsnorm.default, HEADS, (6,), 1e-6, holds={0: 2}),
    "norm of heads, a weight a head": lambda: Bench(ops.torch_rmsnorm.default, HEADS, (4, 6), 1e-6, holds={0: 2}),
    "linear of heads": lambda: Bench(ops.torch_linear_simple.default, HEADS, (5, 6), holds={0: 2}),
    "rope": lambda: Bench(
        ops.torch_rope_with_explicit_cos_sin.default, HEADS, HEADS, (2, 3, 6), (2, 3, 6), 2, holds={0: 2, 1: 2}
    ),
    "attention": lambda: Bench(ops.torch_attention.default, HEADS, HEADS, HEADS, holds={0: 2, 1: 2, 2: 2}),
    "attention with whole kv heads": lambda: Bench(
        ops.torch_attention.default, HEADS, (2, 3, 2, 6), (2, 3, 2, 6), holds={0: 2}
    ),
    "attention with one kv head": lambda: Bench(
        ops.torch_attention.default, HEADS, (2, 3, 1, 6), (2, 3, 1, 6), holds={0: 2}
    ),
    "attention with sinks": lambda: Bench(
        ops.torch_attention.default, HEADS, HEADS, HEADS, None, (4,), holds={0: 2, 1: 2, 2: 2}
    ),
    "attention with a bias a head": lambda: Bench(
        ops.torch_attention.default, HEADS, HEADS, HEADS, (2, 4, 3, 3), holds={0: 2, 1: 2, 2: 2}
    ),
    "product over what is cut": lambda: Bench(aten.matmul.default, (2, 3, 8), (2, 8, 5), holds={0: 2, 1: 1}),
    "product of heads": lambda: Bench(aten.matmul.default, (2, 4, 3, 6), (2, 4, 6, 5), holds={0: 1, 1: 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pieces_are_what_the_rule_says(case: str) -> None:
    agrees(CASES[case]())


@pytest.mark.parametrize(
    ("bench", "why"),
    [
        (lambda: Bench(aten.view.default, (2, 3, 8), [2, 24], holds={0: 2}), "apart"),
        (lambda: Bench(aten.slice.Tensor, X, 2, 0, 4, holds={0: 2}), "slice of the dimension that is cut"),
        (lambda: Bench(aten.cat.default, X, X, -1, holds={0: 2}, as_list=True), "."),
        (lambda: Bench(aten.softmax.int, X, -1, holds={0: 2}), "goes over the dimension that is cut"),
        (lambda: Bench(aten.mul.Tensor, HEADS, HEADS, holds={0: 2, 1: 3}), "dimensions 2 and 3"),
        (lambda: Bench(ops.torch_linear_simple.default, X, (5, 8), holds={0: 2}), "whole itself"),
        (lambda: Bench(aten.sort.default, X, holds={0: 0}), "goes over|no rule"),
        (lambda: Bench(aten.roll.default, X, [1], [1], holds={0: 2}), "no rule for roll"),
    ],
)
def test_what_has_no_rule_is_named(bench: Callable[[], Bench], why: str) -> None:
    if why == ".":
        made = Bench(aten.cat.default, X, X, holds={0: 2}, as_list=True)
        made.node.args = (made.node.args[0], -1)
        why = "joins pieces"
    else:
        made = bench()
    with pytest.raises(Unaccounted, match=why) as error:
        made.spread()
    assert error.value.node is made.node


def test_a_view_maps_the_leading_part_of_a_group() -> None:
    assert regroup((2, 3, 8), (2, 3, 4, 2), 2) == 2
    assert regroup((2, 3, 4, 2), (2, 3, 8), 2) == 2
    assert regroup((2, 3, 4, 2), (2, 3, 8), 3) is None
    assert regroup((2, 1, 3, 8), (2, 3, 4, 2), 3) == 2
    assert regroup((2, 4, 3, 8), (2, 4, 3, 2, 4), 1) == 1
    assert regroup((2, 4, 3), (8, 3), 1) is None


def test_granules_meet_in_the_coarser_one() -> None:
    share = Share(24)
    share.whole_pieces(8)
    other = Share(24)
    other.whole_pieces(12)
    share.join(other)
    assert share.pieces == other.pieces == 4
    assert share.exact


def _linear_graph() -> tuple[GraphModule, Node, Node]:
    """y = x + (a(x) + b(x)) read twice, where a and b are linears."""
    root, graph = torch.nn.Module(), Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, 4, device="meta")
    made = []
    for name in "ab":
        root.register_parameter(name, torch.nn.Parameter(torch.empty(4, 4, device="meta")))
        weight = graph.get_attr(name)
        weight.meta["val"] = root.get_parameter(name)
        made.append(graph.call_function(ops.torch_linear_simple.default, (x, weight)))
    first = graph.call_function(aten.add.Tensor, (x, made[0]))
    second = graph.call_function(aten.add.Tensor, (first, made[1]))
    last = graph.call_function(aten.mul.Tensor, (second, second))
    for node in (*made, first, second, last):
        node.meta["val"] = torch.empty(2, 3, 4, device="meta")
    graph.output((last,))
    return GraphModule(root, graph), made[0], made[1]


def test_two_branches_take_one_sum() -> None:
    gm, a, b = _linear_graph()
    found = propagate(gm, {a: "rowwise", b: "rowwise"})
    (((terms, rest)),) = found.merged.values()
    assert terms == (a, b)
    assert [n.name for n in rest] == ["x"]
    assert not found.sums
    assert found.placements[a] == PARTIAL


def test_one_branch_takes_its_own_sum() -> None:
    gm, a, b = _linear_graph()
    found = propagate(gm, {a: "rowwise"})
    assert list(found.sums) == [a]
    assert found.placements.get(b, REPLICATED) == REPLICATED


def test_a_cut_at_the_output_is_an_error() -> None:
    gm, a, b = _linear_graph()
    with pytest.raises(Unaccounted, match="output"):
        propagate(gm, {a: "colwise", b: "colwise"})
    assert str(cut(2)) == "cut(2)"
