"""Attention written out: from a softmax up to queries and keys, and down to the product with the values."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from adkit.graph.shape_only import EvaluationError, ShapeOnly
from adkit.passes.pattern_matcher.masks import MaskMeaning, MaskReader, MaskStep, NotUnderstood

aten = torch.ops.aten

SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})
_VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
_CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
        aten._to_copy.default,
    }
)
_COPIES = frozenset(
    {
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        aten.detach_.default,
    }
)
_MULTIPLIES = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor})
_DIVIDES = frozenset({aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor})
_ADDS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.add_.Tensor})
_FILLS = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar})
_WHERES = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf})
_FLOORS = frozenset({aten.maximum.default, aten.max.other, aten.clamp.default, aten.clamp_min.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
# sizes that no model has, so that equal numbers mean equal dimensions
_B, _S = 1009, 10007


@dataclass
class Found:
    """An attention in the graph. query [B, N, S, H]; key [B, K, S, H] (``key_swap``: [B, K, H, S]); value [B,
    K, S, Hv].

    ``output`` is the node that the attention's result replaces; ``flat`` when it is [B*N, S, Hv].
    """

    query: Node
    key: Node
    value: Node
    output: Node
    nodes: list[Node]
    scale: float = 1.0
    softcap: float | None = None
    sinks: Node | None = None
    key_swap: bool = False
    value_flat: bool = False
    steps: tuple[MaskStep, ...] = ()
    mask: MaskMeaning = field(default_factory=MaskMeaning)


def readers(node: Node) -> list[Node]:
    """Who reads a node's value; export's metadata asserts and ``x.type_as(node)`` do not."""
    return [
        u
        for u in node.users
        if u.target is not aten._assert_tensor_metadata.default
        and not (u.target is aten.type_as.default and u.args[0] is not node)
    ]


def with_asserts(nodes: list[Node]) -> list[Node]:
    """``nodes`` and the metadata asserts on them, in order, without repeats."""
    found = list(nodes)
    for n in nodes:
        found += [u for u in n.users if u.target is aten._assert_tensor_metadata.default]
    return list(dict.fromkeys(found))


def _why_no_step(node: Node) -> str:
    """Why an operation on the scores is no step of a mask."""
    if node.target in _ADDS | _FILLS | _WHERES | _MULTIPLIES:
        return (
            f"a mask or bias on the scores ({node.target}) follows from what the tokens are, not from their "
            "positions alone"
        )
    return f"{node.target} on the scores"


def is_noop(node: Node, shapes: ShapeOnly) -> bool:
    """True for a cast between floating types, a copy, idle dropout, a slice or view that changes nothing."""
    if node.op != "call_function" or not node.args:
        return False
    t: Any = node.target
    args: tuple[Any, ...] = node.args
    if t in _CASTS:
        val, source = node.meta.get("val"), getattr(args[0], "meta", {}).get("val")
        return (
            val is not None and source is not None and val.is_floating_point() and source.is_floating_point()
        )
    if t in _COPIES:
        return True
    if t is aten.dropout.default:
        return bool(not args[2] or args[1] == 0)
    if t is aten.slice.Tensor:
        start, end, step = (list(args[2:]) + [None] * 3)[:3]
        whole = end is None or (isinstance(end, int) and end >= 2**62)
        return start in (None, 0) and whole and step in (None, 1)
    if t in _VIEWS or t is aten.expand.default:
        return _shape(shapes, node) == _shape(shapes, args[0])
    return False


def _shape(shapes: ShapeOnly, node: Any) -> tuple[int, ...] | None:
    try:
        return shapes.shape(node, _B, _S)
    except (EvaluationError, AttributeError):
        return None


def peel(node: Node, shapes: ShapeOnly, seen: list[Node] | None = None) -> Node:
    """``node`` without the no-ops on top of it (they are added to ``seen``)."""
    while is_noop(node, shapes):
        if seen is not None:
            seen.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node


def scalar(x: Any, shapes: ShapeOnly) -> float | None:
    """The number a constant argument stands for: a literal, or a one-element tensor that no size changes."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if isinstance(x, Node) and x in shapes:
        val = x.meta.get("val")
        if (isinstance(val, torch.Tensor) and val.ndim == 0) or (
            val is not None and not isinstance(val, torch.Tensor)
        ):
            try:
                a, b = (float(shapes.value(x, *size)) for size in ((2, 7), (3, 13)))
            except (EvaluationError, TypeError):
                return None
            return a if a == b else None
    return None


def factor_of(node: Node, shapes: ShapeOnly) -> tuple[Node, float] | None:
    """``(x, c)`` when ``node`` is x * c or x / c' for a constant."""
    if node.target in _MULTIPLIES or node.target in _DIVIDES:
        a, b = node.args[:2]
        divides = node.target in _DIVIDES
        c = scalar(b, shapes)
        if c is not None and c != 0 and isinstance(a, Node):
            return a, 1 / c if divides else c
        c = scalar(a, shapes)
        if c is not None and isinstance(b, Node) and not divides:
            return b, c
    return None


class ScoreReader:
    """Finds the attentions around the softmaxes of one graph."""

    def __init__(self, gm: GraphModule, shapes: ShapeOnly) -> None:
        self.gm = gm
        self.shapes = shapes
        self.masks = MaskReader(shapes)

    def read(self, softmax: Node) -> Found | None:
        """The attention whose probabilities ``softmax`` gives; None when it is no attention (a router's,
        say).

        Raises NotUnderstood when it is one that torch_attention cannot be proved to express.
        """
        val = softmax.meta.get("val")
        if (
            not isinstance(val, torch.Tensor)
            or val.ndim not in (3, 4)
            or softmax.args[1] not in (-1, val.ndim - 1)
        ):
            return None
        below = self._down(softmax)
        if below is None:
            return None
        output, value, value_nodes, cuts_last = below
        nodes = [softmax, *value_nodes]
        at, sinks, cap, steps, inner = self._up(softmax.args[0], nodes)  # type: ignore[arg-type]
        if (sinks is not None) != cuts_last:
            raise NotUnderstood("a column is added to the scores or cut off the probabilities, but not both")
        scale, cap = _cap(inner, cap)
        found = self._product(at, nodes, value, output)
        found.scale *= scale
        found.softcap, found.sinks = cap, sinks
        found.steps = (*found.steps, *steps)
        if cap is None:
            found.scale *= math.prod(s.factor for s in found.steps if s.kind == "scale")
        elif any(s.kind == "scale" for s in found.steps):
            raise NotUnderstood("scores are scaled again after the softcap and mask")
        heads = int(found.query.meta["val"].shape[1])
        found.mask = self.masks.read(found.steps, heads)
        if sinks is not None and found.mask.slopes is not None:
            raise NotUnderstood("sinks together with ALiBi")
        return found

    # --- from the softmax down to the output

    def _down(self, softmax: Node) -> tuple[Node, Node, list[Node], bool] | None:
        node, nodes, cuts = softmax, [], False
        while True:
            users = readers(node)
            if len(users) != 1:
                return None
            user = users[0]
            if user.target in _PRODUCTS and user.args[0] is node and user.args[1] is not node:
                value = user.args[1]
                assert isinstance(value, Node)
                nodes.append(user)
                return user, value, nodes, cuts
            if is_noop(user, self.shapes) or self._regroups(user):
                pass
            elif user.target is aten.slice.Tensor and user.args[1:] in ((3, 0, -1), (-1, 0, -1)):
                cuts = True
            else:
                return None
            nodes.append(user)
            node = user

    def _regroups(self, node: Node) -> bool:
        """A view between [B, N, X, Y] and [B*N, X, Y]."""
        if node.target not in _VIEWS or not isinstance(node.args[0], Node):
            return False
        a, b = _shape(self.shapes, node.args[0]), _shape(self.shapes, node)
        if a is None or b is None or {len(a), len(b)} != {3, 4}:
            return False
        three, four = (a, b) if len(a) == 3 else (b, a)
        return four[0] == _B and three == (four[0] * four[1], *four[2:])

    # --- from the softmax up to the product

    def _up(
        self, node: Node, nodes: list[Node]
    ) -> tuple[Node, Node | None, float | None, tuple[MaskStep, ...], list[Node]]:
        """Walk up to the product: it, sinks, the factor above a tanh, mask steps, nodes from the tanh on."""
        steps: list[MaskStep] = []
        sinks: Node | None = None
        cap: float | None = None
        inner: list[Node] = []
        expected = 1
        while True:
            if len(readers(node)) != expected:
                raise NotUnderstood(f"{node.name} is read outside the attention too")
            expected = 1
            if node.target in _PRODUCTS or node.target is aten.baddbmm.default:
                return node, sinks, cap, tuple(reversed(steps)), inner
            nodes.append(node)
            rank = node.meta["val"].ndim if isinstance(node.meta.get("val"), torch.Tensor) else 0
            if is_noop(node, self.shapes) or self._regroups(node):
                node = node.args[0]  # type: ignore[assignment]
                continue
            shifted = self._shift(node)
            if shifted is not None:
                node, extra = shifted
                nodes += extra
                expected = 2
                continue
            if node.target is aten.cat.default and sinks is None and not steps and node.args[1] in (-1, 3):
                parts: Any = node.args[0]
                if isinstance(parts, (list, tuple)) and len(parts) == 2:
                    sinks = self._sinks(parts[1], nodes)
                    node = parts[0]
                    continue
            if node.target is aten.tanh.default:
                if any(s.kind != "scale" for s in steps[-1:]) or not steps:
                    raise NotUnderstood("a tanh on the scores is not scaled back, so it is no softcap")
                cap = steps.pop().factor
                inner.append(node)
                node = node.args[0]  # type: ignore[assignment]
                continue
            scaled = factor_of(node, self.shapes)
            if scaled is not None:
                (
                    inner.append(node)
                    if cap is not None
                    else steps.append(MaskStep("scale", None, scaled[1], rank=rank))
                )
                node = scaled[0]
                continue
            if cap is not None:
                raise NotUnderstood(f"{node.target} between the product and the softcap")
            step = self._step(node, rank)
            if step is None:
                raise NotUnderstood(_why_no_step(node))
            steps.append(step[0])
            node = step[1]

    def _shift(self, node: Node) -> tuple[Node, list[Node]] | None:
        """x - max(x): softmax does not see it."""
        if node.target is not aten.sub.Tensor or not isinstance(node.args[1], Node):
            return None
        top = node.args[1]
        extra = [top]
        if top.target is operator.getitem and top.args[1] == 0:
            top = top.args[0]  # type: ignore[assignment]
            extra += [top, *(u for u in top.users if u is not extra[0])]
        if top.target not in (aten.max.dim, aten.amax.default) or top.args[0] is not node.args[0]:
            return None
        dims = top.args[1] if isinstance(top.args[1], (list, tuple)) else [top.args[1]]
        if list(dims) not in ([-1], [node.meta["val"].ndim - 1]) or any(readers(e) for e in extra[2:]):
            return None
        return node.args[0], extra  # type: ignore[return-value]

    def _sinks(self, node: Any, nodes: list[Node]) -> Node:
        """The [N] tensor that a last column of scores is made of."""
        while isinstance(node, Node):
            val = node.meta.get("val")
            if isinstance(val, torch.Tensor) and val.ndim == 1:
                return node
            if not (
                is_noop(node, self.shapes)
                or node.target in _VIEWS
                or node.target in (aten.expand.default, aten.unsqueeze.default)
            ):
                break
            nodes.append(node)
            node = node.args[0]
        raise NotUnderstood("the column added to the scores is not one number a head")

    def _step(self, node: Node, rank: int) -> tuple[MaskStep, Node] | None:
        """The mask step that ``node`` is, and the scores it works on."""
        t: Any = node.target
        args: tuple[Any, ...] = node.args
        if len(args) < 2:
            return None

        def known(x: Any) -> bool:
            return not isinstance(x, Node) or x in self.shapes

        first, second = known(args[0]), known(args[1])
        if t in _ADDS and first != second:
            alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
            if second and isinstance(args[1], Node):
                return MaskStep("add", args[1], -alpha if t is aten.sub.Tensor else alpha, rank=rank), args[0]
            if isinstance(args[0], Node) and alpha == 1 and t is not aten.sub.Tensor:
                return MaskStep("add", args[0], rank=rank), args[1]
        elif t is aten.mul.Tensor and first != second:
            scores, operand = (args[1], args[0]) if first else (args[0], args[1])
            if isinstance(operand, Node):
                return MaskStep("multiply", operand, rank=rank), scores
        elif t in _FILLS and second:
            return MaskStep("fill", args[1], fill=args[2], rank=rank), args[0]
        elif t in _WHERES and first and known(args[2]) and not second:
            return MaskStep("keep", args[0], fill=args[2], rank=rank), args[1]
        elif t in _WHERES and first and second and not known(args[2]):
            return MaskStep("fill", args[0], fill=args[1], rank=rank), args[2]
        elif t in _FLOORS and len(args) == 2:
            low = scalar(args[1], self.shapes)
            if low is not None:
                return MaskStep("at_least", factor=low, rank=rank), args[0]
        return None

    # --- the product

    def _product(self, node: Node, nodes: list[Node], value: Node, output: Node) -> Found:
        scale, steps = 1.0, ()
        if node.target is aten.baddbmm.default:
            bias, left, right = node.args[:3]
            scale = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
            beta = float(node.kwargs.get("beta", 1))  # type: ignore[arg-type]
            if beta != 0:
                if bias not in self.shapes:
                    raise NotUnderstood("baddbmm adds something that depends on the tokens")
                steps = (MaskStep("add", bias, beta, rank=3),)  # type: ignore[arg-type,assignment]
        else:
            left, right = node.args[:2]
        nodes.append(node)
        query, swapped, q_scale = self._operand(left, nodes)  # type: ignore[arg-type]
        if swapped:
            raise NotUnderstood("the queries are transposed")
        key, swapped, k_scale = self._operand(right, nodes)  # type: ignore[arg-type]
        v_nodes: list[Node] = []
        v, v_swapped, v_scale = self._operand(value, v_nodes)
        if v_swapped or v_scale != 1.0:
            raise NotUnderstood("the values are transposed or scaled")
        nodes += v_nodes
        for name, n in (("queries", query), ("keys", key), ("values", v)):
            if n.meta["val"].ndim != 4:
                raise NotUnderstood(
                    f"the {name} have {n.meta['val'].ndim} dimensions, not batch, heads, sequence, width"
                )
        users = readers(output)
        if len(users) == 1 and self._regroups(users[0]):
            nodes.append(users[0])
            output = users[0]
        if output.meta["val"].ndim != 4:
            raise NotUnderstood("its result is not split into heads again")
        return Found(
            query, key, v, output, nodes, scale * q_scale * k_scale, key_swap=not swapped, steps=steps
        )

    def _operand(self, node: Node, nodes: list[Node]) -> tuple[Node, bool, float]:
        """An operand without no-ops, swap of its last two dimensions, regrouping and constant factors."""
        swapped, scale = False, 1.0
        while True:
            last = node.meta["val"].ndim if isinstance(node.meta.get("val"), torch.Tensor) else 0
            scaled = factor_of(node, self.shapes)
            if scaled is not None:
                scale *= scaled[1]
                step = scaled[0]
            elif is_noop(node, self.shapes) or (self._regroups(node) and last == 3):
                step = node.args[0]  # type: ignore[assignment]
            elif node.target is aten.transpose.int and _dims(node, last) == {last - 1, last - 2}:
                swapped = not swapped
                step = node.args[0]  # type: ignore[assignment]
            else:
                return node, swapped, scale
            nodes.append(node)
            node = step


def _dims(node: Node, rank: int) -> set[int]:
    args: tuple[Any, ...] = node.args
    return {d % rank for d in args[1:3]}


def _cap(inner: list[Node], outer: float | None) -> tuple[float, float | None]:
    """Scale and softcap from the factors below a tanh and the one above it."""
    if outer is None:
        return 1.0, None
    scale, capped = 1.0, False
    for n in inner:
        if n.target is aten.tanh.default:
            continue
        literal = (
            next(a for a in n.args if not isinstance(a, Node))
            if any(not isinstance(a, Node) for a in n.args)
            else None
        )
        if literal is None:
            raise NotUnderstood("the softcap is not a literal")
        divides = n.target in _DIVIDES
        if divides and float(literal) == outer and not capped:  # type: ignore[arg-type]
            capped = True
            continue
        scale *= 1 / float(literal) if divides else float(literal)  # type: ignore[arg-type]
    return (scale if capped else scale * outer), outer
