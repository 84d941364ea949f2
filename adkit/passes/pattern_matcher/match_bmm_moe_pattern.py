"""``match_bmm_moe_pattern``: experts computed as two batched products, over picked weights or over all.

Experts that are all computed on all tokens are read and proved in ``dense_experts``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import args_of, dtype_of, from_end, shape_of, term_of
from adkit.graph.provenance import source_of
from adkit.graph.shape_only import EvaluationError, ShapeOnly
from adkit.graph.step import PassInfo
from adkit.models.hf.experts import Gate, gate_by_value
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.pattern_matcher import dense_experts
from adkit.passes.pattern_matcher.masks import NotUnderstood
from adkit.passes.pattern_matcher.proving import PROOF_SIZE, compute, is_size
from adkit.passes.pattern_matcher.scores import readers, with_asserts
from adkit.passes.registry import register

aten = torch.ops.aten
MOE = torch.ops.adkit.torch_moe.default
_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
_ADDS = frozenset({aten.add.Tensor, aten.add_.Tensor})
_SMALL = 6  # width F of the experts that a proof computes


@dataclass(frozen=True)
class _Product:
    """``output`` = one projection of each (token, expert) pair; weight [E, out, in], or [E, in, out]."""

    output: Node
    x: Node
    ids: Node
    weight: Node
    bias: Node | None
    transposed: bool


@dataclass(frozen=True)
class _Experts:
    """Hidden [T, D], ids and weights [T, k], both projections, and the node that the op replaces."""

    hidden: Node
    topk_ids: Node
    topk_weights: Node
    up: _Product
    down: _Product
    output: Node

    @property
    def given(self) -> list[Node]:
        """The op's tensor arguments that are there, in order."""
        return [n for n in self.args if n is not None]

    @property
    def args(self) -> tuple[Node | None, ...]:
        """Positional arguments of ``torch_moe``."""
        biases = (self.up.bias, self.down.bias) if self.up.bias is not None else ()
        return (
            self.hidden,
            self.topk_ids,
            self.topk_weights,
            self.up.weight,
            self.down.weight,
            *biases,
        )

    @property
    def widths(self) -> tuple[int, int, int]:
        """D, F, and the width of the first projection (2F where it is gated)."""
        up, down = shape_of(self.up.weight) or (), shape_of(self.down.weight) or ()
        return (
            (int(up[1]), int(down[1]), int(up[2]))
            if self.up.transposed
            else (int(up[2]), int(down[2]), int(up[1]))
        )

    @property
    def gated(self) -> bool:
        """Whether the first projection makes gates and ups."""
        return self.widths[2] != self.widths[1]


@register
class MatchBmmMoE(Pass):
    """Replace a mixture of experts written as batched products by ``torch_moe``.

    One form copies an expert's weights once for every token that chose it, the other (Llama 4) sends every
    token through every expert, most of them times zero: right, but slow and large. The canonical op leaves
    the way of computing to a kernel. Layout, biases and routing are read off the nodes; the gate between the
    products is recognised by the values it computes; each distinct way of writing is then proved on random
    numbers. What is not understood stays, and the step says why.

        before: bmm(gate_up[ids], x) -> + bias -> gate -> bmm(down[ids], ...) -> * weights -> sum over k
        or:     bmm(repeat(x, E) * scores^T, gate_up) -> gate -> bmm(..., down) -> sum over E
        after:  torch_moe(x, topk_ids, topk_weights, gate_up, down, act="silu")
    """

    key = "match_bmm_moe_pattern"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Match every sum over a token's experts."""
        sums = [n for n in gm.graph.nodes if n.target is aten.sum.dim_IntList]
        if not sums:
            return PassInfo()
        shapes = ShapeOnly(gm)
        prover, dense = _Prover(shapes), dense_experts.DenseProver(shapes)
        refused: Counter[str] = Counter()
        count = 0
        for root in sums:
            try:
                if _weighted(root) is not None:
                    self._replace_picked(gm, prover, _read(root))
                elif (all_of_them := dense_experts.read(root, shapes)) is not None:
                    self._replace_dense(gm, dense, all_of_them)
                else:
                    continue
            except (NotUnderstood, EvaluationError) as error:
                refused[f"{source_of(root.meta.get('stack_trace')) or root.name}: {error}"] += 1
                continue
            count += 1
        return PassInfo(
            num_matches=count,
            is_clean=False,
            details={"not matched": dict(refused)} if refused else {},
        )

    def _replace_picked(self, gm: GraphModule, prover: _Prover, found: _Experts) -> None:
        options = prover.options(found)
        with self.site(gm, with_asserts(prover.region(found)), label="bmm experts", before=found.output) as s:
            s.replace(found.output, s.call(MOE, found.args, options, like=found.output))

    def _replace_dense(
        self, gm: GraphModule, prover: dense_experts.DenseProver, found: dense_experts.DenseExperts
    ) -> None:
        form = prover.form(found)
        with self.site(
            gm, with_asserts(prover.region(found)), label="dense experts", before=found.output
        ) as s:
            s.replace(found.output, dense_experts.write(s, found, form))


# --- reading the nodes ----------------------------------------------------------------------------


def _weighted(root: Node) -> tuple[_Product, Node] | None:
    """The second projection and the weights it is multiplied with, above a sum over dimension 1 of three."""
    pairs, dims = args_of(root)[0], args_of(root)[1] or ()
    if len(shape_of(pairs) or ()) != 3 or [from_end(d, 3) for d in dims] != [-2]:
        return None
    if len(shape_of(root) or ()) != 2:  # keepdim
        return None
    product = pairs.args[0] if pairs.target in _RESHAPES else None
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor:
        return None
    for y, weights in (product.args, product.args[::-1]):
        down = _product(y)
        if down is not None and isinstance(weights, Node):
            return down, weights
    return None


def _product(node: Any) -> _Product | None:
    """A batched product with picked weights, and the picked bias added to it."""
    output, bias, bias_ids = node, None, None
    if isinstance(node, Node) and node.target in _ADDS and not node.kwargs:
        bias, bias_ids = _picked(node.args[1])
        node = node.args[0] if bias is not None else node
    if not isinstance(node, Node) or node.target is not aten.squeeze.dim:
        return None
    product, dim = args_of(node)
    if not isinstance(product, Node) or product.target is not aten.bmm.default:
        return None
    for transposed, at, picked, x in (
        (False, -1, product.args[0], product.args[1]),
        (True, -2, product.args[1], product.args[0]),
    ):
        weight, ids = _picked(picked)
        column = _unsqueezed(x, at)
        if weight is None or ids is None or column is None or from_end(dim, 3) != at:
            continue
        if bias is None or bias_ids is ids:
            return _Product(output, column, ids, weight, bias, transposed)
    return None


def _picked(node: Any) -> tuple[Node | None, Node | None]:
    """``(table, ids)`` of ``table[ids]`` with a parameter as the table."""
    if isinstance(node, Node) and node.target is aten.index.Tensor:
        table, ids = args_of(node)[0], args_of(node)[1]
        if table.op == "get_attr" and len(ids) == 1:
            return table, ids[0]
    return None, None


def _unsqueezed(node: Any, at: int) -> Node | None:
    """What has a dimension put in at ``at`` (from the end of the result)."""
    term = term_of(node)
    if term is None or term.op != "unsqueeze":
        return None
    return term.args[0] if from_end(args_of(node)[1], len(shape_of(node) or ())) == at else None


def _read(root: Node) -> _Experts:
    """The experts that end in ``root``; NotUnderstood says what is not as it should be."""
    weighted = _weighted(root)
    assert weighted is not None
    down, column = weighted
    up = _first_product(down)
    if up.ids is not down.ids or up.transposed != down.transposed or (up.bias is None) != (down.bias is None):
        raise NotUnderstood("the two projections do not pick the same experts in the same layout")
    weights = _unsqueezed(column, -1)
    repeat = up.x
    if repeat.target is not aten.repeat_interleave.self_int or list(repeat.args[2:]) != [0]:
        raise NotUnderstood("the tokens are not repeated once for each of their experts")
    hidden = args_of(repeat)[0]
    found = _Experts(
        hidden, _flat(_unclamped(down)), _flat(weights), up, down, _output(root, dtype_of(hidden))
    )
    dtypes = {dtype_of(n) for n in (hidden, up.weight, down.weight, up.output, down.output)}
    if len(dtypes) != 1:
        raise NotUnderstood("tokens, weights and products have several dtypes")
    return found


def _first_product(down: _Product) -> _Product:
    """The projection above the gate: the nearest one on the way up."""
    level, seen = [down.x], {down.x}
    while level:
        found = [p for n in level if (p := _product(n)) is not None]
        if found:
            return found[0]
        level = [a for n in level for a in n.all_input_nodes if a not in seen]
        seen.update(level)
    raise NotUnderstood("there is no first projection")


def _unclamped(product: _Product) -> Node:
    """Flat ids, without the bounds that some versions put on ids of absent experts (their weight is zero)."""
    node, experts = product.ids, int((shape_of(product.weight) or (0,))[0])
    if node.target is aten.clamp.default and tuple(node.args[1:]) == (0, experts - 1):
        node = args_of(node)[0]
    return node


def _flat(node: Node | None) -> Node:
    """The [T, k] tensor that ``node`` is the flat form of."""
    if node is None or node.target not in _RESHAPES or len(shape_of(node) or ()) != 1:
        raise NotUnderstood("routing ids or weights are not flattened")
    source: Node = args_of(node)[0]
    if len(shape_of(source) or ()) != 2:
        raise NotUnderstood("routing ids or weights are not [tokens, experts a token]")
    return source


def _output(root: Node, dtype: torch.dtype | None) -> Node:
    """The sum in the tokens' dtype: itself or its only reader, a cast."""
    if dtype_of(root) == dtype:
        return root
    readers = list(root.users)
    term = term_of(readers[0]) if len(readers) == 1 else None
    if term is None or term.op != "cast" or dtype_of(readers[0]) != dtype:
        raise NotUnderstood("the result is not in the tokens' dtype")
    return readers[0]


# --- proving --------------------------------------------------------------------------------------


class _Prover:
    """Finds the gate and proves a whole mixture of experts, once for each distinct way of writing."""

    def __init__(self, shapes: ShapeOnly) -> None:
        self.shapes = shapes
        self._gates: dict[Any, Gate | None] = {}
        self._proved: dict[Any, str] = {}

    def region(self, found: _Experts) -> list[Node]:
        """The nodes that the op stands for."""
        given = set(found.given)
        return [n for n in self.shapes.closure(found.output, given) if n not in given and not is_size(n)]

    def options(self, found: _Experts) -> dict[str, Any]:
        """Keyword arguments of ``torch_moe``, defaults left out; NotUnderstood where it would be wrong."""
        region = self.region(found)
        inside = set(region)
        if any(u not in inside for n in region if n is not found.output for u in readers(n)):
            raise NotUnderstood("something else reads a value inside the block")
        gate = self._gate(found)
        if gate is None:
            raise NotUnderstood("its gate is not a known one")
        options = gate.options
        if found.up.transposed:
            options["transposed"] = True
        if not found.gated:
            options["gated"] = False
        key = (self.shapes.fingerprint(found.output, found.given), found.widths, str(options))
        if key not in self._proved:
            self._proved[key] = self._disagreement(found, options)
        if self._proved[key]:
            raise NotUnderstood(self._proved[key])
        return options

    def _gate(self, found: _Experts) -> Gate | None:
        source, end, width = found.up.output, found.down.x, found.widths[2]
        key = (self.shapes.fingerprint(end, [source]), width, found.gated)
        if key not in self._gates:
            nodes = [n for n in self.shapes.closure(end, [source]) if n is not source]
            numbers = [abs(a) for n in nodes for a in args_of(n) if isinstance(a, int | float)]
            self._gates[key] = gate_by_value(
                lambda x: compute(self.shapes, [source, *nodes], {source: x}, {}),
                width,
                gated=found.gated,
                numbers=numbers,
            )
        return self._gates[key]

    def _disagreement(self, found: _Experts, options: dict[str, Any]) -> str:
        """Why op and nodes differ on random numbers, empty where they agree; experts are made narrow."""
        generator = torch.Generator().manual_seed(0)
        d, f, up = found.widths
        small = {up: _SMALL * up // f, f: _SMALL}
        small.setdefault(d, _SMALL + 4)
        tokens = self.shapes.shape(found.hidden, *PROOF_SIZE)[0]
        routing = self.shapes.shape(found.topk_ids, *PROOF_SIZE)
        if routing != self.shapes.shape(found.topk_weights, *PROOF_SIZE) or routing[0] != tokens:
            return "routing ids and weights are not one row a token"
        k = routing[1]
        experts = min(int((shape_of(found.up.weight) or (0,))[0]), 5)

        def filled(node: Node) -> Tensor:
            if node is found.topk_ids:
                return torch.randint(experts, (tokens, k), generator=generator)
            if node in (found.hidden, found.topk_weights):
                shape = [tokens, k if node is found.topk_weights else small[d]]
            else:
                shape = [experts, *(small[int(s)] for s in (shape_of(node) or ())[1:])]
            return torch.randn(shape, generator=generator)

        values = {n: filled(n) for n in found.given}
        expected = compute(self.shapes, self.shapes.closure(found.output, found.given), values, small)
        got = MOE(*(None if n is None else values[n] for n in found.args), **options)
        if got.shape != expected.shape or not torch.allclose(
            got, expected.to(got.dtype), rtol=1e-3, atol=1e-4
        ):
            return "what was recognised does not compute the same numbers"
        return ""
