"""Experts that are all computed on all tokens, most of them times zero: the form of Llama 4.

``match_bmm_moe_pattern`` asks here about a sum over the experts' dimension. What is found is not taken on
trust: the router must give zero to every expert that its ``topk`` did not choose, and the whole block must
compute what ``torch_moe`` computes, both on random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.edit import Site
from adkit.graph.matching import args_of, shape_of
from adkit.graph.shape_only import ShapeOnly
from adkit.models.hf.experts import Gate, gate_by_value
from adkit.passes.pattern_matcher.masks import NotUnderstood
from adkit.passes.pattern_matcher.proving import PROOF_SIZE, compute, is_size
from adkit.passes.pattern_matcher.scores import readers

aten = torch.ops.aten
MOE = torch.ops.adkit.torch_moe.default
_SMALL = {"d": 10, "f": 6}  # widths that a proof computes with


@dataclass(frozen=True)
class DenseExperts:
    """Hidden [T, D] and scores [T, E] through up [E, D, W] and down [E, F, D] to ``output`` [T, D].

    ``ids`` [T, k] are the experts whose score is not zero. ``up_product`` and ``down_product`` are the two
    batched products.
    """

    hidden: Node
    scores: Node
    ids: Node
    up_product: Node
    down_product: Node
    output: Node

    @property
    def up(self) -> Node:
        """Weight of the first product."""
        return self.up_product.args[1]  # type: ignore[return-value]

    @property
    def down(self) -> Node:
        """Weight of the second product."""
        return self.down_product.args[1]  # type: ignore[return-value]

    @property
    def given(self) -> list[Node]:
        """What the block computes from."""
        return [self.hidden, self.scores, self.up, self.down]

    @property
    def gated(self) -> bool:
        """Whether the first product makes gates and ups."""
        return bool((shape_of(self.up) or ())[2] != (shape_of(self.down) or ())[1])

    @property
    def k(self) -> int:
        """Experts a token."""
        return int((shape_of(self.ids) or ())[-1])


def read(root: Node, shapes: ShapeOnly) -> DenseExperts | None:
    """The experts that a sum over dimension 0 of [E, T, D] ends; None when it is no such sum.

    Raises NotUnderstood, saying what is not as it should be.
    """
    dims = args_of(root)[1] or ()
    shape = shape_of(args_of(root)[0]) or ()
    if len(shape) != 3 or list(dims) not in ([0], [-3]) or len(shape_of(root) or ()) != 2:
        return None
    down = _product_above(root, shape[0])
    up = _product_above(down, shape[0]) if down is not None else None
    if down is None or up is None:
        return None
    above = shapes.closure(root, [a for p in (down, up) for a in p.args[1:] if isinstance(a, Node)])
    repeats = [n for n in above if n.target is aten.repeat.default and list(args_of(n)[1]) == [shape[0], 1]]
    turned = [
        n
        for n in above
        if n.target is aten.transpose.int and (shape_of(args_of(n)[0]) or ())[1:] == shape[:1]
    ]
    if len(repeats) != 1 or len(turned) != 1:
        raise NotUnderstood("it is not every token through every expert, times the router's scores")
    scores = args_of(turned[0])[0]
    return DenseExperts(args_of(repeats[0])[0], scores, _chosen(scores, shapes), up, down, root)


def _product_above(node: Node, experts: Any) -> Node | None:
    """The nearest batched product with a parameter of ``experts`` matrices, on the way up."""
    seen, level = {node}, node.all_input_nodes[:1]
    while level:
        for n in level:
            if n.target is aten.bmm.default:
                weight = args_of(n)[1]
                return n if weight.op == "get_attr" and (shape_of(weight) or ())[:1] == (experts,) else None
        level = [a for n in level for a in n.all_input_nodes if a not in seen and not is_size(a)]
        seen.update(level)
    return None


def _chosen(scores: Node, shapes: ShapeOnly) -> Node:
    """The [T, k] ids of the experts whose score is not zero, proved on random logits."""
    above = shapes.closure(scores)
    picks = [n for n in above if n.target is aten.topk.default]
    last: Node = max(picks, default=scores)
    logits = args_of(last)[0]
    ids = [u for u in last.users if last is not scores and args_of(u)[1] == 1]
    if len(ids) != 1 or shape_of(logits) != shape_of(scores):
        raise NotUnderstood("the scores do not come from a choice of experts")
    generator = torch.Generator().manual_seed(0)
    given = {logits: torch.randn(shapes.shape(logits, *PROOF_SIZE), generator=generator)}
    values, at = (shapes.value(n, *PROOF_SIZE, given) for n in (scores, ids[0]))
    if not torch.equal(values, torch.zeros_like(values).scatter(1, at, values.gather(1, at))):
        raise NotUnderstood("experts that were not chosen have a score as well")
    return ids[0]


@dataclass(frozen=True)
class DenseForm:
    """How a block is written with ``torch_moe``: its options, and whether scores weigh the experts' input."""

    options: dict[str, Any]
    weighs_input: bool


class DenseProver:
    """Proves blocks, once for each distinct way of writing."""

    def __init__(self, shapes: ShapeOnly) -> None:
        self.shapes = shapes
        self._known: dict[Any, DenseForm | None] = {}

    def region(self, found: DenseExperts) -> list[Node]:
        """The nodes that the op stands for."""
        given = set(found.given)
        return [n for n in self.shapes.closure(found.output, given) if n not in given and not is_size(n)]

    def form(self, found: DenseExperts) -> DenseForm:
        """NotUnderstood when ``torch_moe`` cannot be proved to compute the block."""
        inside = set(self.region(found))
        if any(u not in inside for n in inside if n is not found.output for u in readers(n)):
            raise NotUnderstood("something else reads a value inside the block")
        shapes = tuple(shape_of(n) for n in (found.up, found.down))
        key = (self.shapes.fingerprint(found.output, found.given), shapes)
        if key not in self._known:
            self._known[key] = self._by_value(found)
        form = self._known[key]
        if form is None:
            raise NotUnderstood("its gate, or where the scores weigh, is not known")
        return form

    def _by_value(self, found: DenseExperts) -> DenseForm | None:
        gate = self._gate(found)
        if gate is None:
            return None
        options = {**gate.options, "transposed": True}
        if not found.gated:
            options["gated"] = False
        generator = torch.Generator().manual_seed(0)
        small = _widths(found)
        tokens, experts = self.shapes.shape(found.scores, *PROOF_SIZE)
        if self.shapes.shape(found.hidden, *PROOF_SIZE)[0] != tokens:
            return None

        def filled(node: Node, *rows: int) -> Tensor:
            sizes = (shape_of(node) or ())[len(rows) :]
            return torch.randn((*rows, *(small[int(s)] for s in sizes)), generator=generator)

        ids = torch.arange(experts).expand(tokens, experts)
        hidden, up, down = (
            filled(found.hidden, tokens),
            filled(found.up, experts),
            filled(found.down, experts),
        )
        scores = torch.rand(tokens, experts, generator=generator)
        values = dict(zip(found.given, (hidden, scores, up, down), strict=True))
        want = compute(self.shapes, self.shapes.closure(found.output, found.given), values, small)
        each = hidden.repeat_interleave(experts, 0) * scores.reshape(-1, 1)
        one = torch.ones(tokens * experts, 1)
        for weighs_input, got in (
            (True, MOE(each, ids.reshape(-1, 1), one, up, down, **options).view(tokens, experts, -1).sum(1)),
            (False, MOE(hidden, ids, scores, up, down, **options)),
        ):
            if got.shape == want.shape and torch.allclose(got, want.to(got.dtype), rtol=1e-3, atol=1e-4):
                return DenseForm(options, weighs_input)
        return None

    def _gate(self, found: DenseExperts) -> Gate | None:
        source, end = found.up_product, args_of(found.down_product)[0]
        inner = [n for n in self.shapes.closure(end, [source]) if n is not source]
        numbers = [abs(a) for n in inner for a in args_of(n) if isinstance(a, int | float)]
        small = _widths(found)

        def run(x: Tensor) -> Tensor:
            nodes = self.shapes.closure(end, [source])
            return compute(self.shapes, nodes, {source: x[None]}, small)[0]

        return gate_by_value(run, (2 if found.gated else 1) * _SMALL["f"], gated=found.gated, numbers=numbers)


def _widths(found: DenseExperts) -> dict[int, int]:
    """Small numbers for the block's widths."""
    (_, d, w), (_, f, _) = shape_of(found.up) or (), shape_of(found.down) or ()
    small = {int(w): _SMALL["f"] * int(w) // int(f), int(f): _SMALL["f"]}
    small.setdefault(int(d), _SMALL["d"])
    return small


def write(s: Site, found: DenseExperts, form: DenseForm) -> Node:
    """The chosen experts alone; where scores weigh their input, each choice is a mixture of its own.

    (Llama 4 makes one choice a token, so that this is one op.)
    """
    parts = (found.up, found.down)
    weights = s.call(aten.gather.default, (found.scores, 1, found.ids))
    if not form.weighs_input:
        return s.call(MOE, (found.hidden, found.ids, weights, *parts), form.options)
    total: Node | None = None
    for i in range(found.k):
        ids, weight = found.ids, weights
        if found.k > 1:
            ids, weight = (s.call(aten.slice.Tensor, (n, 1, i, i + 1)) for n in (ids, weights))
        hidden = s.call(aten.mul.Tensor, (found.hidden, weight))
        out = s.call(MOE, (hidden, ids, s.call(aten.ones_like.default, (weight,)), *parts), form.options)
        total = out if total is None else s.call(aten.add.Tensor, (total, out))
    assert total is not None
    return total
