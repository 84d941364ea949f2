"""The placement algebra: what a cut or a partial sum becomes at each op.

:func:`propagate` walks the graph once, in order. Where every input is replicated nothing has to be known about an op.
Where one is cut or a term of a sum, the op's rule says what its output is and what has to be done for it (a literal
head count scaled, an operand sliced, a sum made), or raises :class:`Unaccounted`. Nothing is changed here.

spread -> shares and the record of what was found; layout_rules, compute_rules -> the rules op by op; regions -> which
linears to try; sharding_transform_executor -> writes it down.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from adkit.graph.placement import Decision
from adkit.passes.sharding.compute_rules import COMPUTE_RULES, rule_by_name
from adkit.passes.sharding.layout_rules import LAYOUT_RULES, blocks_wanted
from adkit.passes.sharding.op_kinds import (
    BATCHED,
    DIVISIONS,
    EMBEDDING,
    LINEAR,
    LINEAR_OPS,
    MOE,
    PRODUCTS,
    SUMS,
    aten,
    elementwise,
    name_of,
    stored,
)
from adkit.passes.sharding.spread import (
    STACKED,
    TERM,
    WHOLE,
    Propagation,
    Share,
    Slices,
    Spread,
    rank_of,
    shape_of,
)
from adkit.passes.sharding.stacks import Stack, stack_of


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
    """Follow ``decisions`` (colwise, rowwise, gather, vocab, experts, batch; others are whole) through the graph.

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
        self._own: set[Node] = set()  # with attention_dp: computed from a rank's own tokens
        self._stacks: dict[Node, list[tuple[Node, Stack]]] = {}  # weights of which ranks have some matrices
        for node, decision in decisions.items():
            if decision in ("batch", "gather") and (stack := stack_of(node)) is not None:
                self._stacks.setdefault(stack.weight, []).append((node, stack))

    def visit(self, node: Node) -> None:
        """Find the spread of ``node``, whose inputs were visited."""
        if self.attention_dp and (
            node.op == "placeholder" or any(a in self._own for a in node.all_input_nodes)
        ):
            self._own.add(node)
        if node.op == "output":
            self._need_whole(node, "the model's output must be whole on every rank")
            return
        if node.op != "call_function":
            return
        decision = self.decisions.get(node, "whole")
        spreads = self.found.spreads
        for weight in node.all_input_nodes:
            if weight in self._stacks and weight not in spreads:
                self._cut_stack(weight)
        if decision in ("whole", "follow") and not any(a in spreads for a in node.all_input_nodes):
            return
        result = self._apply(node, decision)
        if decision in ("batch", "gather") and node.target in BATCHED:
            result = self._product(node, decision, result)
        if result == TERM and (len(node.users) > 1 or self.attention_dp):
            # one sum serves all readers, and the residual stream is whole; a rank's own tokens meet no one else's
            self.found.sums[node] = list(node.users)
        elif result != WHOLE:
            spreads[node] = result

    def _cut_stack(self, weight: Node) -> None:
        """A stack is cut where it is read, so that views of it are of a rank's own matrices."""
        products = [product for product, _ in self._stacks[weight]]
        stack = self._stacks[weight][0][1]
        size = int(shape_of(weight)[stack.dim])
        share = Share(size, tuple(products))
        share.whole_pieces(stack.count)
        share.need(exact=True, heads=STACKED)
        self.found.spreads[weight] = Spread("cut", stack.dim, share)
        self.found.made[weight] = Slices(stack.dim, share, size)
        self.found.cuts.update(dict.fromkeys(products, ((size, share),)))

    def _apply(self, node: Node, decision: str) -> Spread | tuple[Spread, ...]:
        if self.attention_dp:
            self._same_tokens(node)
            if self.found.of(node.args[0]).kind == "gathered":
                return self.found.of(node.args[0])
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
        rule = _RULES.get(node.target) or rule_by_name(node.target)
        if rule is None:
            raise self.unaccounted(node, f"no rule for {name_of(node.target)} on pieces")
        return rule(self, node)

    def _product(self, node: Node, decision: str, result: Spread | tuple[Spread, ...]) -> Spread:
        """A product of a rank's own matrices: in pieces along the batch, or joined."""
        stack = stack_of(node)
        if stack is None:
            raise self.unaccounted(node, "it reads no weight of stacked matrices")
        if not isinstance(result, Spread) or result.kind != "cut" or result.dim != stack.product_dim:
            raise self.unaccounted(node, "its other side is cut on another dimension than the batch")
        if decision == "batch":
            return result
        self.found.joined[node] = result.dim
        return WHOLE

    def _same_tokens(self, node: Node) -> None:
        """What works on the tokens of all ranks reads nothing that is of a rank's own, numbers of tokens included."""
        apart = [a for a in node.all_input_nodes if self.found.of(a).kind in ("cut", "gathered")]
        own = [a for a in node.all_input_nodes if a in self._own and a not in apart]
        if apart and own:
            raise self.unaccounted(node, f"reads tokens of all ranks, and {own[0].name}, which is of its own")
        whole = any(self.found.of(a).kind == "gathered" for a in apart)
        if whole and not (elementwise(node.target) and len(node.all_input_nodes) == 1):
            raise self.unaccounted(
                node, "reads tokens of all ranks, which are put together for sampling alone"
            )

    def gather(self, node: Node, value: Any) -> None:
        """``node`` works on the tokens of all ranks."""
        if self.attention_dp:
            self.found.gathered.setdefault(value, []).append(node)

    def _item(self, node: Node) -> Spread:
        source, index = node.args
        found = self.found.spreads.get(source, WHOLE)  # type: ignore[arg-type]
        return found if isinstance(found, Spread) else found[index]  # type: ignore[index]

    # --- partial sums -------------------------------------------------------------------------------

    def _carry(self, node: Node) -> Spread | None:
        """A term stays one through what is linear; None where the sum must be made first."""
        target = node.target
        if target in SUMS and len(node.args) == 2 and not node.kwargs:
            return self._add(node)
        if target in PRODUCTS:
            a, b = node.args[0], node.args[1]
            kinds = (self.found.of(a), self.found.of(b))
            if sum(s.kind == "partial" for s in kinds) == 1 and "cut" not in (kinds[0].kind, kinds[1].kind):
                if target in DIVISIONS and kinds[1].kind == "partial":
                    return None
                return None if any(s.terms for s in kinds) else TERM
            return None
        if target in LINEAR_OPS and not self.found.of(node.args[0]).terms:
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

    def unaccounted(self, node: Node, why: str, *blamed: Any, rowwise: bool = False) -> Unaccounted:
        """The exception, with the owners of the cuts of ``blamed`` (default: of all that ``node`` reads)."""
        owners: set[Node] = set()
        for a in blamed or node.all_input_nodes:
            for share in self.found.of(a).shares:
                owners |= share.owners
        return Unaccounted(node, why, owners, rowwise)

    def slice(self, node: Node, operand: Node, dim: int, share: Spread) -> None:
        """``node`` works on a rank's part of an operand that is there as a whole."""
        size = shape_of(operand)[dim]
        self.found.sliced[node, operand] = Slices(dim, share.shares[0], size, share.blocks)

    def join(self, node: Node, a: Spread, b: Spread) -> None:
        """Two values that ``node`` reads are cut alike from now on."""
        if [s for s, _ in a.blocks] != [s for s, _ in b.blocks]:
            raise self.unaccounted(node, "operands are cut in different blocks")
        for x, y in zip(a.shares, b.shares, strict=True):
            x.join(y)


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
    if stored(weight) is None:
        raise w.unaccounted(node, "its weight is computed, so it cannot be loaded in parts")
    if decision == "rowwise":
        if spread.kind != "cut":
            w.gather(node, x)
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
    w.gather(node, x)
    out = int(shape_of(weight)[0])
    sizes = blocks_wanted(node, out) if decision == "colwise" else (out,)
    shares = tuple((size, Share(size, (node,))) for size in sizes)
    w.found.cuts[node] = shares
    if decision == "gather":
        shares[0][1].need(exact=True)
        return Spread("gathered", share=shares[0][1]) if w.attention_dp else WHOLE
    dim = rank_of(node) - 1
    return Spread("cut", dim, shares[0][1]) if len(shares) == 1 else Spread("cut", dim, None, shares)


def _embedding(w: Walk, node: Node, decision: str) -> Spread:
    weight = node.args[0]
    w.sum_inputs(node)
    if any(w.found.of(a).kind == "cut" for a in node.all_input_nodes):
        raise w.unaccounted(node, "looks rows up by, or in, pieces")
    if decision != "vocab":
        return WHOLE
    if not isinstance(weight, Node) or weight.op != "get_attr":
        raise w.unaccounted(node, "its table is computed, so it cannot be loaded in parts")
    w.gather(node, node.args[1])
    share = Share(int(shape_of(weight)[0]), (node,))
    share.need(exact=True)
    w.found.cuts[node] = ((share.pieces, share),)
    return TERM


def _moe(w: Walk, node: Node, decision: str) -> Spread:
    w.sum_inputs(node)
    if any(w.found.of(a).kind == "cut" for a in node.all_input_nodes):
        raise w.unaccounted(node, "experts read whole tokens, but these are cut")
    return TERM if decision == "experts" and not w.attention_dp else WHOLE


_DECIDED: dict[Any, Callable[[Walk, Node, str], Spread]] = {
    LINEAR: _linear,
    EMBEDDING: _embedding,
    MOE: _moe,
}
_RULES = LAYOUT_RULES | COMPUTE_RULES
