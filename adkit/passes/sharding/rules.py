"""The placement algebra: what a cut or a partial sum becomes at each op.

:func:`propagate` walks the graph once, in order. Where every input is replicated nothing has to be known about an op.
Where one is cut or a term of a sum, the op's rule says what its output is and what has to be done for it (a literal
head count scaled, an operand sliced, a sum made), or raises :class:`Unaccounted`. Nothing is changed here.

spread -> shares and the record of what was found; regions -> which linears to try; sharding_transform_executor ->
writes it down.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import arg, same_size
from adkit.graph.placement import Decision
from adkit.ops.registry import info_of
from adkit.passes.sharding.spread import (
    TERM,
    WHOLE,
    Propagation,
    Share,
    Slices,
    Spread,
    rank_of,
    regroup,
    shape_of,
)

aten, adkit_ops = torch.ops.aten, torch.ops.adkit
LINEAR = adkit_ops.torch_linear_simple.default
MOE = adkit_ops.torch_moe.default
EMBEDDING = aten.embedding.default
RMSNORM = adkit_ops.torch_rmsnorm.default
TOPK = adkit_ops.torch_moe_topk.default
ATTENTION = adkit_ops.torch_attention.default


class Unaccounted(Exception):
    """No rule says how ``node`` works on pieces.

    ``owners``: the nodes whose cut got there; ``rowwise``: the linear that would have to take the cut, where that is
    all.
    """

    def __init__(self, node: Node, why: str, owners: Iterable[Node] = (), rowwise: bool = False) -> None:
        super().__init__(f"{node.name}: {why}")
        self.node, self.why, self.owners, self.rowwise = node, why, frozenset(owners), rowwise


def propagate(
    gm: GraphModule, decisions: Mapping[Node, Decision], *, attention_dp: bool = False
) -> Propagation:
    """Follow ``decisions`` (colwise, rowwise, gather, vocab, experts; others are whole) through the graph.

    ``attention_dp``: every rank has tokens of its own, and what experts give back is whole. Raises Unaccounted at the
    first node without a rule.
    """
    walk = Walk(decisions, attention_dp)
    for node in gm.graph.nodes:
        walk.visit(node)
    return walk.found


class Walk:
    """One propagation under way."""

    def __init__(self, decisions: Mapping[Node, Decision], attention_dp: bool = False) -> None:
        self.decisions, self.attention_dp = decisions, attention_dp
        self.found = Propagation()

    def visit(self, node: Node) -> None:
        """Find the spread of ``node``, whose inputs were visited."""
        if node.op == "output":
            self._need_whole(node, "the model's output must be whole on every rank")
            return
        if node.op != "call_function":
            return
        decision = self.decisions.get(node, "whole")
        spreads = self.found.spreads
        if decision in ("whole", "follow") and not any(a in spreads for a in node.all_input_nodes):
            return
        result = self._apply(node, decision)
        if (
            result == TERM and len(node.users) > 1
        ):  # one sum serves all readers, and the residual stream is whole
            self.found.sums[node] = list(node.users)
        elif result != WHOLE:
            spreads[node] = result

    def _apply(self, node: Node, decision: str) -> Spread | tuple[Spread, ...]:
        special = _DECIDED.get(node.target)
        if special is not None:
            return special(self, node, decision)
        if node.target is operator.getitem:
            return self._item(node)
        kinds = {self.found.of(a).kind for a in node.all_input_nodes}
        if "partial" in kinds:
            carried = self._carry(node)
            if carried is not None:
                return carried
            self.sum_inputs(node)
        if not any(self.found.of(a).kind == "cut" for a in node.all_input_nodes):
            return WHOLE
        rule = _RULES.get(node.target) or _rule_by_name(node.target)
        if rule is None:
            raise self.unaccounted(node, f"no rule for {_name(node.target)} on pieces")
        return rule(self, node)

    def _item(self, node: Node) -> Spread:
        source, index = node.args
        found = self.found.spreads.get(source, WHOLE)  # type: ignore[arg-type]
        return found if isinstance(found, Spread) else found[index]  # type: ignore[index]

    # --- partial sums -------------------------------------------------------------------------------

    def _carry(self, node: Node) -> Spread | None:
        """A term stays one through what is linear; None where the sum must be made first."""
        target = node.target
        if target in _SUMS and len(node.args) == 2 and not node.kwargs:
            return self._add(node)
        if target in _PRODUCTS:
            a, b = node.args[0], node.args[1]
            kinds = (self.found.of(a), self.found.of(b))
            if sum(s.kind == "partial" for s in kinds) == 1 and "cut" not in (kinds[0].kind, kinds[1].kind):
                if target in _DIVISIONS and kinds[1].kind == "partial":
                    return None
                return None if any(s.terms for s in kinds) else TERM
            return None
        if target in _LINEAR_OPS and not self.found.of(node.args[0]).terms:
            return TERM if node.meta["val"].is_floating_point() else None
        return None

    def _add(self, node: Node) -> Spread | None:
        terms: list[tuple[Node, Node]] = []
        rest: list[Node] = []
        for operand in node.args:
            if not isinstance(operand, Node):
                return None
            spread = self.found.of(operand)
            if spread.kind == "cut":
                return None
            if spread.kind == "replicated":
                rest.append(operand)
            elif spread.terms:
                terms += spread.terms
                rest += spread.rest
            else:
                terms.append((operand, node))
        if not rest:
            return TERM
        if node.target is not aten.add.Tensor:
            return None
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is not None and reader.target is aten.add.Tensor:
            return Spread("partial", terms=tuple(terms), rest=tuple(rest))  # more terms may come
        self._settle(node, tuple(terms), tuple(rest))
        return WHOLE

    def _settle(self, node: Node, terms: tuple[tuple[Node, Node], ...], rest: tuple[Node, ...]) -> None:
        """``node`` is a sum of terms and whole values, and complete: one exchange makes it."""
        if len(terms) > 1:
            self.found.merged[node] = (tuple(t for t, _ in terms), rest)
        else:
            term, reader = terms[0]
            self.found.sums.setdefault(term, []).append(reader)

    def sum_inputs(self, node: Node) -> None:
        """Readers that are not linear get the sum."""
        for operand in node.all_input_nodes:
            spread = self.found.of(operand)
            if spread.kind != "partial":
                continue
            if spread.terms:
                self._settle(operand, spread.terms, spread.rest)
                self.found.spreads.pop(operand)
            else:
                self.found.sums.setdefault(operand, []).append(node)

    # --- what rules ask -----------------------------------------------------------------------------

    def _need_whole(self, node: Node, why: str) -> None:
        self.sum_inputs(node)
        if any(self.found.of(a).kind == "cut" for a in node.all_input_nodes):
            raise self.unaccounted(node, why)

    def unaccounted(self, node: Node, why: str, rowwise: bool = False) -> Unaccounted:
        """The exception, with the owners of all cuts that ``node`` reads."""
        owners: set[Node] = set()
        for a in node.all_input_nodes:
            for share in self.found.of(a).shares:
                owners |= share.owners
        return Unaccounted(node, why, owners, rowwise)

    def slice(self, node: Node, operand: Node, dim: int, share: Spread) -> None:
        """``node`` works on a rank's part of an operand that is there as a whole."""
        size = shape_of(operand)[dim]
        self.found.sliced[node, operand] = Slices(dim, share.shares[0], size, share.blocks)


Rule = Callable[[Walk, Node], "Spread | tuple[Spread, ...]"]


# --- what decisions say -----------------------------------------------------------------------------


def _linear(w: Walk, node: Node, decision: str) -> Spread:
    x, weight = node.args[0], node.args[1]
    w.sum_inputs(node)
    spread, last = w.found.of(x), rank_of(x) - 1
    if any(w.found.of(a).kind == "cut" for a in node.all_input_nodes if a is not x):
        raise w.unaccounted(node, "its weight is computed from pieces")
    if decision in ("whole", "follow"):
        if spread.kind != "cut":
            return WHOLE
        if spread.dim == last:
            raise w.unaccounted(node, "reads input features that are cut, but is whole itself", rowwise=True)
        return spread
    if not isinstance(weight, Node) or weight.op != "get_attr":
        raise w.unaccounted(node, "its weight is computed, so it cannot be loaded in parts")
    if decision == "rowwise":
        if spread.kind != "cut":
            share = Share(int(shape_of(weight)[1]), (node,))
            share.need(exact=True)
            w.slice(node, x, last, Spread("cut", last, share))  # type: ignore[arg-type]
            w.found.rows[node] = share
            return TERM
        if spread.dim != last or spread.share is None:
            raise w.unaccounted(node, f"rowwise, but its input is cut on dimension {spread.dim} or in blocks")
        spread.share.need(exact=True)
        w.found.rows[node] = spread.share
        return TERM
    if spread.kind == "cut":
        raise w.unaccounted(node, f"{decision}, but its input is cut already")
    out = int(shape_of(weight)[0])
    sizes = _blocks_wanted(node, out) if decision == "colwise" else (out,)
    shares = tuple((size, Share(size, (node,))) for size in sizes)
    w.found.cuts[node] = shares
    if decision == "gather":
        shares[0][1].need(exact=True)
        return WHOLE
    dim = rank_of(node) - 1
    return Spread("cut", dim, shares[0][1]) if len(shares) == 1 else Spread("cut", dim, None, shares)


def _blocks_wanted(node: Node, out: int) -> tuple[int, ...]:
    """Sizes of the blocks that readers take from a linear's output: Q|K|V, gate|up; one block if they do not."""
    bounds, seen, pending = {0, out}, {node}, [node]
    while pending:
        value = pending.pop()
        rank = rank_of(value)
        for reader in value.users:
            found = _bounds(reader, rank - 1, out)
            if found is not None:
                bounds |= found
            elif _elementwise(reader.target) and shape_of(reader)[-1:] == (out,) and reader not in seen:
                seen.add(reader)
                pending.append(reader)
    ends = sorted(bounds)
    return tuple(b - a for a, b in pairwise(ends))


def _bounds(node: Node, last: int, size: int) -> set[int] | None:
    """Where a split or slice of the last dimension cuts it; None for other nodes."""
    if node.target is adkit_ops.torch_swiglu_packed.default:
        return {0, size // 2, size}
    if node.target in _SPLITS and arg(node, 2, "dim", 0) % (last + 1) == last:
        sizes = _split_sizes(node, size)
        return None if sizes is None else {sum(sizes[:i]) for i in range(len(sizes) + 1)}
    if node.target is aten.slice.Tensor and arg(node, 1, "dim", 0) % (last + 1) == last:
        bounds = _slice_bounds(node, size)
        return None if bounds is None else set(bounds)
    return None


def _slice_bounds(node: Node, size: int) -> tuple[int, int] | None:
    start, stop, step = arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1)
    if step != 1 or isinstance(start, Node) or isinstance(stop, Node):
        return None
    begin, end, _ = slice(start, stop).indices(size)
    return begin, end


def _split_sizes(node: Node, size: int) -> tuple[int, ...] | None:
    if node.target is aten.split_with_sizes.default:
        sizes = tuple(cast(Any, node.args[1]))
        return sizes if all(isinstance(s, int) for s in sizes) else None
    given = node.args[1]
    if not isinstance(given, int):
        return None
    step = -(-size // given) if node.target is aten.chunk.default else given
    return tuple(min(step, size - at) for at in range(0, size, step))


def _embedding(w: Walk, node: Node, decision: str) -> Spread:
    weight = node.args[0]
    w.sum_inputs(node)
    if any(w.found.of(a).kind == "cut" for a in node.all_input_nodes):
        raise w.unaccounted(node, "looks rows up by, or in, pieces")
    if decision != "vocab":
        return WHOLE
    if not isinstance(weight, Node) or weight.op != "get_attr":
        raise w.unaccounted(node, "its table is computed, so it cannot be loaded in parts")
    share = Share(int(shape_of(weight)[0]), (node,))
    share.need(exact=True)
    w.found.cuts[node] = ((share.pieces, share),)
    return TERM


def _moe(w: Walk, node: Node, decision: str) -> Spread:
    w.sum_inputs(node)
    if any(w.found.of(a).kind == "cut" for a in node.all_input_nodes):
        raise w.unaccounted(node, "experts read whole tokens, but these are cut")
    return TERM if decision == "experts" and not w.attention_dp else WHOLE


# --- elementwise ------------------------------------------------------------------------------------


def _broadcast(w: Walk, node: Node, operands: Iterable[Any], out_rank: int) -> Spread:
    """Operands laid over each other from the right; all pieces on one dimension, whole ones sliced where they have
    it."""
    tensors = [a for a in operands if isinstance(a, Node) and shape_of(a)]
    lead: Spread | None = None
    size: Any = None
    for a in tensors:
        s = w.found.of(a)
        if s.kind != "cut":
            continue
        here = s.at(s.dim + out_rank - rank_of(a))
        if lead is None:
            lead, size = here, shape_of(a)[s.dim]
        elif here.dim != lead.dim or not same_size(size, shape_of(a)[s.dim]):
            raise w.unaccounted(node, f"operands are cut on dimensions {lead.dim} and {here.dim}")
        else:
            _join(w, node, lead, here)
    assert lead is not None
    for a in tensors:
        if w.found.of(a).kind == "cut":
            continue
        dim = lead.dim - out_rank + rank_of(a)
        if dim < 0 or shape_of(a)[dim] == 1:
            continue
        if not same_size(shape_of(a)[dim], size):
            raise w.unaccounted(node, f"{a.name} does not have the size of what is cut")
        w.slice(node, a, dim, lead)
    return lead


def _join(w: Walk, node: Node, a: Spread, b: Spread) -> None:
    if [s for s, _ in a.blocks] != [s for s, _ in b.blocks]:
        raise w.unaccounted(node, "operands are cut in different blocks")
    for x, y in zip(a.shares, b.shares, strict=True):
        x.join(y)


def _elementwise_rule(w: Walk, node: Node) -> Spread:
    if node.target in _IN_PLACE:
        kept = w.found.of(node.args[0])
        others = [a for a in node.args[1:] if isinstance(a, Node) and w.found.of(a).kind == "cut"]
        if kept.kind != "cut" and others:
            raise w.unaccounted(node, "writes pieces into a value that is whole")
    return _broadcast(w, node, node.all_input_nodes, rank_of(node))


_ELEMENTWISE_NAMES = {
    "where", "masked_fill", "dropout", "copy", "copy_", "multiply", "divide", "true_divide", "subtract",
    "negative", "absolute", "square", "clip", "greater", "greater_equal", "less", "less_equal", "not_equal",
    "to", "_to_copy", "clone", "contiguous", "alias", "detach", "type_as", "lift_fresh_copy", "zeros_like",
    "ones_like", "empty_like", "full_like", "gelu", "silu", "softplus",
}  # fmt: skip


def _name(target: Any) -> str:
    return target.name().split("::", 1)[-1].split(".", 1)[0] if hasattr(target, "name") else str(target)


def carries(target: Any) -> bool:
    """True for ops whose output element comes from one input element at most: elementwise, views, casts."""
    return _elementwise(target) or target in _LINEAR_OPS or target in (aten.slice.Tensor, aten.index.Tensor)


def _elementwise(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace == "adkit":
        return target is adkit_ops.torch_swiglu.default
    return torch.Tag.pointwise in target.tags or _name(target) in _ELEMENTWISE_NAMES


# --- shapes -----------------------------------------------------------------------------------------


def _view(w: Walk, node: Node) -> Spread:
    x = node.args[0]
    s = w.found.of(x)
    before, after = shape_of(x), shape_of(node)
    to = regroup(before, after, s.dim)
    if to is None or (s.blocks and not same_size(after[to], before[s.dim])):
        raise w.unaccounted(node, "a view takes the dimension that is cut apart")
    literal = _literals(node, len(after))
    if literal is not None and literal[to] != -1:
        if not isinstance(literal[to], int):
            raise w.unaccounted(node, "a size along the cut is computed")
        if node.target not in _VIEWS:
            raise w.unaccounted(node, f"{_name(node.target)} names a size along the cut")
        w.found.scaled[node] = (to, int(after[to]), s.shares)
    if isinstance(after[to], int) and s.share is not None:
        s.share.whole_pieces(after[to])
    return s.at(to)


def _literals(node: Node, rank: int) -> tuple[Any, ...] | None:
    """The sizes that a view names, one a dimension; None where it names none."""
    if node.target in _VIEWS:
        return tuple(node.args[1])  # type: ignore[arg-type]
    if node.target is aten.unflatten.int:
        sizes, at = tuple(node.args[2]), int(node.args[1])  # type: ignore[arg-type]
        at %= rank_of(node.args[0])
        return (-1,) * at + sizes + (-1,) * (rank - at - len(sizes))
    return None


def _transpose(w: Walk, node: Node) -> Spread:
    s, rank = w.found.of(node.args[0]), rank_of(node.args[0])
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in cast(Any, node.args[1])]
    else:
        a, b = (0, 1) if node.target is aten.t.default else (-2, -1)
        if len(node.args) == 3:
            a, b = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return s.at(order.index(s.dim))


def _unsqueeze(w: Walk, node: Node) -> Spread:
    s = w.found.of(node.args[0])
    at = int(node.args[1]) % rank_of(node)  # type: ignore[arg-type]
    return s.at(s.dim + (s.dim >= at))


def _squeeze(w: Walk, node: Node) -> Spread:
    s, rank = w.found.of(node.args[0]), rank_of(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else None
    if dims is None:
        raise w.unaccounted(node, "squeezes whatever has size one")
    gone = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}  # type: ignore[arg-type]
    if s.dim in gone:
        raise w.unaccounted(node, "squeezes the dimension that is cut")
    return s.at(s.dim - sum(d < s.dim for d in gone))


def _expand(w: Walk, node: Node) -> Spread:
    x = node.args[0]
    s = w.found.of(x)
    to = s.dim + rank_of(node) - rank_of(x)
    if shape_of(x)[s.dim] == 1:
        raise w.unaccounted(node, "broadcasts what is cut")
    if node.args[1][to] != -1:  # type: ignore[index]
        w.found.expanded[node] = to
    return s.at(to)


def _repeat_kv(w: Walk, node: Node) -> Spread:
    s = w.found.of(node.args[0])
    if s.dim == arg(node, 2, "dim", 1) % rank_of(node) and s.share is not None:
        s.share.whole_pieces(int(shape_of(node.args[0])[s.dim]))
        s.share.need(exact=True)
    return s


def _repeat(w: Walk, node: Node) -> Spread:
    s = w.found.of(node.args[0])
    to = s.dim + rank_of(node) - rank_of(node.args[0])
    if node.args[1][to] != 1:  # type: ignore[index]
        raise w.unaccounted(node, "repeats what is cut")
    return s.at(to)


def _cat(w: Walk, node: Node) -> Spread:
    parts = [a for a in node.args[0] if isinstance(a, Node)]  # type: ignore[union-attr]
    stacked = node.target is aten.stack.default
    dim = int(arg(node, 1, "dim", 0)) % rank_of(node)
    cut_parts = [a for a in parts if w.found.of(a).kind == "cut"]
    lead = w.found.of(cut_parts[0])
    if not stacked and lead.dim == dim:
        raise w.unaccounted(node, "joins pieces along the dimension that is cut")
    size = shape_of(cut_parts[0])[lead.dim]
    for a in parts:
        s = w.found.of(a)
        if s.kind == "cut":
            if s.dim != lead.dim:
                raise w.unaccounted(node, f"parts are cut on dimensions {lead.dim} and {s.dim}")
            if s is not lead:
                _join(w, node, lead, s)
        elif same_size(shape_of(a)[lead.dim], size):
            w.slice(node, a, lead.dim, lead)
        else:
            raise w.unaccounted(node, f"{a.name} does not have the size of what is cut")
    return lead.at(lead.dim + (stacked and lead.dim >= dim))


def _slice(w: Walk, node: Node) -> Spread:
    s = w.found.of(node.args[0])
    if int(arg(node, 1, "dim", 0)) % rank_of(node) != s.dim:
        return s
    size = shape_of(node.args[0])[s.dim]
    bounds = _slice_bounds(node, size) if isinstance(size, int) else None
    if bounds == (0, size):
        return s
    part = None if bounds is None else _within(s, *bounds)
    if part is None:
        raise w.unaccounted(node, "takes a slice of the dimension that is cut")
    w.found.blocks[node] = s.blocks
    return part


def _within(s: Spread, start: int, stop: int) -> Spread | None:
    """The blocks from ``start`` to ``stop``; None where a bound is none of theirs."""
    at, taken = 0, []
    for size, share in s.blocks:
        if start <= at and at + size <= stop:
            taken.append((size, share))
        elif at < stop and start < at + size:
            return None
        at += size
    if sum(b for b, _ in taken) != stop - start or not taken:
        return None
    return Spread("cut", s.dim, taken[0][1]) if len(taken) == 1 else Spread("cut", s.dim, None, tuple(taken))


def _split(w: Walk, node: Node) -> tuple[Spread, ...]:
    s, count = w.found.of(node.args[0]), len(node.meta["val"])
    if int(arg(node, 2, "dim", 0)) % rank_of(node.args[0]) != s.dim:
        return (s,) * count
    sizes = _split_sizes(node, int(shape_of(node.args[0])[s.dim]))
    parts: list[Spread] = []
    at = 0
    for size in sizes or ():
        part = _within(s, at, at + size)
        if part is None:
            break
        parts.append(part)
        at += size
    if len(parts) != count or sizes is None:
        raise w.unaccounted(node, "splits the dimension that is cut")
    if any(p.blocks for p in parts):
        raise w.unaccounted(node, "splits off several blocks at once")
    w.found.blocks[node] = s.blocks
    return tuple(parts)


def _select(w: Walk, node: Node) -> Spread | tuple[Spread, ...]:
    s, rank = w.found.of(node.args[0]), rank_of(node.args[0])
    position = 1
    dim = int(arg(node, position, "dim", 0)) % rank
    if dim == s.dim:
        raise w.unaccounted(node, "picks along the dimension that is cut")
    one = s.at(s.dim - (dim < s.dim))
    return (one,) * len(node.meta["val"]) if node.target is aten.unbind.int else one


def _size_of(w: Walk, node: Node) -> Spread:
    s = w.found.of(node.args[0])
    if int(node.args[1]) % rank_of(node.args[0]) == s.dim:  # type: ignore[arg-type]
        raise w.unaccounted(node, "asks for the size of what is cut")
    return WHOLE


def _made(w: Walk, node: Node) -> Spread:
    """``new_empty`` and its kin: constant along every dimension, so a rank makes its part of it."""
    like = node.args[0]
    s = w.found.of(like)
    before, after = shape_of(like), shape_of(node)
    if len(before) != len(after) or not same_size(before[s.dim], after[s.dim]) or s.share is None:
        return WHOLE
    w.found.made[node] = Slices(s.dim, s.share, after[s.dim])
    return s


# --- along a dimension ------------------------------------------------------------------------------


def _along(w: Walk, node: Node) -> Spread:
    """Reductions, softmax, sorting: fine along dimensions that are not cut."""
    x = node.args[0]
    if any(w.found.of(a).kind == "cut" for a in node.all_input_nodes if a is not x):
        raise w.unaccounted(node, "more than its input is cut")
    s, rank = w.found.of(x), rank_of(x)
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    name = "dim" if "dim" in schema else "dims"
    dims = arg(node, schema.index(name), name) if name in schema else None
    if dims is None or dims == []:
        raise w.unaccounted(node, f"{_name(node.target)} goes over every dimension")
    along = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if s.dim in along:
        raise w.unaccounted(node, f"{_name(node.target)} goes over the dimension that is cut")
    val = node.meta["val"]
    out = val[0].dim() if isinstance(val, (tuple, list)) else val.dim()
    s = s if out == rank else s.at(s.dim - sum(d < s.dim for d in along))
    return (s,) * len(val) if isinstance(val, (tuple, list)) else s  # type: ignore[return-value]


def _rmsnorm(w: Walk, node: Node) -> Spread:
    x, weight = node.args[0], arg(node, 1, "weight")
    s, rank = w.found.of(x), rank_of(x)
    if s.kind != "cut":
        raise w.unaccounted(node, "its weight is cut, but not what it normalises")
    if s.dim == rank - 1:
        if s.share is None:
            raise w.unaccounted(node, "normalises over several blocks that are cut")
        w.found.norms.add(node)
    if isinstance(weight, Node) and rank_of(weight) >= rank - s.dim:
        return _broadcast(w, node, (x, weight), rank)
    return s


def _last_dim_rule(w: Walk, node: Node) -> Spread:
    s, rank = w.found.of(node.args[0]), rank_of(node.args[0])
    width = len(node.args[1]) if node.target is aten.layer_norm.default else 1  # type: ignore[arg-type]
    if s.kind != "cut" or s.dim >= rank - width:
        raise w.unaccounted(node, "normalises over the dimension that is cut")
    return s


def _rope(w: Walk, node: Node) -> tuple[Spread, Spread]:
    q, k = node.args[0], node.args[1]
    if any(w.found.of(a).kind == "cut" for a in node.args[2:]):
        raise w.unaccounted(node, "its angles are cut")
    for x in (q, k):
        s = w.found.of(x)
        if s.kind == "cut" and s.dim == rank_of(x) - 1:
            raise w.unaccounted(node, "rotates along the dimension that is cut")
    return w.found.of(q), w.found.of(k)


def _packed(w: Walk, node: Node) -> Spread:
    s = w.found.of(node.args[0])
    if s.dim != rank_of(node) - 1:
        return s
    part = [_within(s, 0, s.blocks[0][0]), _within(s, s.blocks[0][0], 2 * s.blocks[0][0])] if s.blocks else []
    if len(s.blocks) != 2 or part[0] is None or part[1] is None:
        raise w.unaccounted(node, "its two halves are not cut alike")
    _join(w, node, part[0], part[1])
    return part[0]


# --- attention, products ----------------------------------------------------------------------------


def _attention(w: Walk, node: Node) -> Spread:
    q, k, v = node.args[:3]
    layout = node.kwargs.get("layout", "bsnd")
    at = 2 if layout == "bsnd" else 1
    spread = w.found.of(q)
    if spread.kind != "cut" or spread.dim != at or spread.share is None:
        raise w.unaccounted(node, "its queries are not cut by heads, but something else is cut")
    heads, kv_heads = int(shape_of(q)[at]), int(shape_of(k)[at])
    spread.share.whole_pieces(heads)
    spread.share.need(exact=True, heads="query heads")
    for name, x in (("keys", k), ("values", v)):
        s = w.found.of(x)
        if s.kind == "cut":
            if s.dim != at or s.share is None:
                raise w.unaccounted(node, f"its {name} are not cut by heads")
            s.share.whole_pieces(kv_heads)
            s.share.need(exact=s.share.pieces != kv_heads, heads="key/value heads")
        elif kv_heads > 1:
            share = Share(kv_heads)
            share.need(heads="key/value heads")
            w.slice(node, x, at, Spread("cut", at, share))  # type: ignore[arg-type]
    by_head = Spread("cut", 0, spread.share)
    for position, name, dim in ((3, "attn_bias", -3), (4, "sinks", 0), (5, "alibi_slopes", 0)):
        extra = arg(node, position, name)
        if not isinstance(extra, Node):
            continue
        s, size = w.found.of(extra), shape_of(extra)
        dim = dim % len(size) if len(size) >= -dim else None  # type: ignore[assignment]
        if s.kind == "cut" and s.dim != dim:
            raise w.unaccounted(node, f"its {name} are not cut by heads")
        if s.kind != "cut" and dim is not None and size[dim] == heads and heads > 1:
            w.slice(node, extra, dim, by_head)
    return spread


def _matmul(w: Walk, node: Node) -> Spread:
    a, b = node.args[0], node.args[1]
    ra, rb, out = rank_of(a), rank_of(b), rank_of(node)
    sa, sb = w.found.of(a), w.found.of(b)
    inner_a, inner_b = sa.kind == "cut" and sa.dim == ra - 1, sb.kind == "cut" and sb.dim == max(rb - 2, 0)
    if inner_a and inner_b and sa.share is not None and sb.share is not None:
        sa.share.join(sb.share)
        return TERM
    if inner_a or inner_b or min(ra, rb) < 2:
        raise w.unaccounted(node, "sums over a dimension of which only one side is cut")
    if sa.kind == "cut" and sa.dim == ra - 2 and sb.kind != "cut":
        return sa.at(out - 2)
    if sb.kind == "cut" and sb.dim == rb - 1 and sa.kind != "cut":
        return sb.at(out - 1)
    if any(s.kind == "cut" and s.dim >= r - 2 for s, r in ((sa, ra), (sb, rb))):
        raise w.unaccounted(node, "its sides are cut on different dimensions")
    return _broadcast(w, node, (a, b), out)


# --- tables -----------------------------------------------------------------------------------------

_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default}
_SUMS = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor}
_DIVISIONS = {aten.div.Tensor, aten.div.Scalar}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor} | _DIVISIONS
_IN_PLACE = {aten.copy_.default, aten.add_.Tensor, aten.mul_.Tensor}
_LINEAR_OPS = {
    *_VIEWS, aten.transpose.int, aten.permute.default, aten.t.default, aten.unsqueeze.default, aten.neg.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int, aten.expand.default,
    aten.clone.default, aten.contiguous.default, aten.to.dtype, aten._to_copy.default, aten.alias.default,
    aten.detach.default, aten.dropout.default,
}  # fmt: skip

_DECIDED: dict[Any, Callable[[Walk, Node, str], Spread]] = {
    LINEAR: _linear,
    EMBEDDING: _embedding,
    MOE: _moe,
}
_RULES: dict[Any, Rule] = {
    **dict.fromkeys((*_VIEWS, aten.flatten.using_ints, aten.unflatten.int), _view),
    **dict.fromkeys(
        (aten.transpose.int, aten.permute.default, aten.t.default, aten.numpy_T.default), _transpose
    ),
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims), _squeeze),
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    adkit_ops.torch_attention_repeat_kv.default: _repeat_kv,
    **dict.fromkeys((aten.cat.default, aten.stack.default), _cat),
    aten.slice.Tensor: _slice,
    **dict.fromkeys(_SPLITS, _split),
    **dict.fromkeys((aten.select.int, aten.unbind.int), _select),
    **dict.fromkeys(
        (aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), _made
    ),
    aten.sym_size.int: _size_of,
    RMSNORM: _rmsnorm,
    **dict.fromkeys((adkit_ops.torch_l2norm.default, aten.layer_norm.default), _last_dim_rule),
    adkit_ops.torch_rope_with_explicit_cos_sin.default: _rope,
    adkit_ops.torch_rope_with_qk_interleaving.default: _rope,
    adkit_ops.torch_rope_with_complex_freqs.default: _rope,
    adkit_ops.torch_swiglu_packed.default: _packed,
    ATTENTION: _attention,
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _matmul),
}
_ALONG_NAMES = {
    "sum", "mean", "amax", "amin", "argmax", "argmin", "softmax", "_softmax", "log_softmax", "cumsum", "cumprod",
    "sort", "topk", "var", "std", "linalg_vector_norm", "logsumexp", "flip", "any", "all",
}  # fmt: skip


def _rule_by_name(target: Any) -> Rule | None:
    if _elementwise(target):
        return _elementwise_rule
    if info_of(target) is not None or not isinstance(target, torch._ops.OpOverload):
        return None
    return _along if _name(target) in _ALONG_NAMES else None
