"""``match_rope_pattern``: rotary position embeddings of a query and a key as one op."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.edit import Site
from adkit.graph.matching import (
    Match,
    Pat,
    Pattern,
    aten,
    cat,
    dtype_of,
    find,
    last,
    merge,
    named,
    pairs,
    pattern,
    same_shape,
    shape_of,
    stack,
    term_of,
    uncast,
    view_as_complex,
    view_as_real,
)
from adkit.graph.provenance import module_path_of
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register


def _half(x: Pat, cos: Pat, sin: Pat, mid: Pat, end: Pat) -> Pat:
    return named("rotated", x * cos + cat(-1, -last(x, mid, end), last(x, 0, mid)) * sin)


def _halves(x: Pat, cos: Pat, sin: Pat, mid: Pat, end: Pat) -> Pat:
    first, second = last(x, 0, mid), last(x, mid, end)
    return named("rotated", cat(-1, first * cos - second * sin, second * cos + first * sin))


def _interleaved(x: Pat, cos: Pat, sin: Pat, end: Pat) -> Pat:
    return named("rotated", x * cos + merge(stack(-1, -last(x, 1, end, 2), last(x, 0, end, 2))) * sin)


def _complex(x: Pat, freqs: Pat) -> Pat:
    return named("rotated", merge(view_as_real(view_as_complex(pairs(x)) * freqs)))


@pattern
def half(x: Pat, cos: Pat, sin: Pat, mid: Pat, end: Pat) -> Pat:
    """GPT-NeoX, Llama: pairs (i, i + R/2)."""
    return _half(x, cos, sin, mid, end)


@pattern
def half_partial(x: Pat, cos: Pat, sin: Pat, mid: Pat, end: Pat, rest: Pat) -> Pat:
    """The same on the first R of H dimensions (GPT-NeoX, Phi)."""
    return cat(-1, _half(x, cos, sin, mid, end), rest)


@pattern
def halves(x: Pat, cos: Pat, sin: Pat, mid: Pat, end: Pat) -> Pat:
    """The two halves turned one by one; cos and sin of half the width (gpt-oss)."""
    return _halves(x, cos, sin, mid, end)


@pattern
def halves_partial(x: Pat, cos: Pat, sin: Pat, mid: Pat, end: Pat, rest: Pat) -> Pat:
    """The same on the first R of H dimensions."""
    return cat(-1, _halves(x, cos, sin, mid, end), rest)


@pattern
def half_reversed(x: Pat, cos: Pat, sin: Pat, mid: Pat, end: Pat) -> Pat:
    """Turned the other way round (nanochat)."""
    return named("rotated", x * cos + cat(-1, last(x, mid, end), -last(x, 0, mid)) * sin)


@pattern
def deinterleaved(x: Pat, cos: Pat, sin: Pat, end: Pat) -> Pat:
    """Pairs (2i, 2i + 1) in, pairs (i, i + R/2) out (DeepSeek V3)."""
    even, odd = last(x, 0, end, 2), last(x, 1, end, 2)
    return named("rotated", cat(-1, even * cos - odd * sin, odd * cos + even * sin))


@pattern
def interleaved(x: Pat, cos: Pat, sin: Pat, end: Pat) -> Pat:
    """GPT-J, Cohere: pairs (2i, 2i + 1)."""
    return _interleaved(x, cos, sin, end)


@pattern
def interleaved_partial(x: Pat, cos: Pat, sin: Pat, end: Pat, rest: Pat) -> Pat:
    """The same on the first R of H dimensions (GLM)."""
    return cat(-1, _interleaved(x, cos, sin, end), rest)


@pattern
def complex_freqs(x: Pat, freqs: Pat) -> Pat:
    """Pairs (2i, 2i + 1) as complex numbers (Llama 4, DeepSeek V2)."""
    return _complex(x, freqs)


_HALF = (half, half_partial, half_reversed, halves, halves_partial, deinterleaved)
_NARROW = (halves, halves_partial, deinterleaved)  # cos and sin of half the width
_OPS = {
    **dict.fromkeys(_HALF, torch.ops.adkit.torch_rope_with_explicit_cos_sin.default),
    **dict.fromkeys(
        (interleaved, interleaved_partial), torch.ops.adkit.torch_rope_with_qk_interleaving.default
    ),
    complex_freqs: torch.ops.adkit.torch_rope_with_complex_freqs.default,
}
_PATTERNS: tuple[Pattern, ...] = tuple(_OPS)

# What the op reads, as a recipe: a node of the graph, or (target, args) over recipes. Equal recipes are
# one node.
_Recipe = Any


@dataclass(frozen=True)
class _Turn:
    """One rotated tensor: what is rotated, by which tables, where the head dimension goes in them."""

    match: Match
    x: _Recipe
    tables: tuple[_Recipe, ...]
    unsqueeze_dim: int

    @property
    def partner_key(self) -> tuple[Any, ...]:
        """Equal for the query and the key of one attention."""
        return module_path_of(self.match.root)[0], _OPS[self.match.pattern], self.tables, self.unsqueeze_dim


@register
class MatchRope(Pass):
    """Replace the rotation of a query and its key by one ``torch_rope_with_*`` op.

    Ten or more nodes a tensor (slices, negation, concatenation, products) become one op that a kernel does in
    one sweep. Half-rotated, interleaved and complex forms; partial rotation, also where cos and sin are
    narrower than the head or expanded in every layer: the expansion is then done once. Arithmetic in float32
    stays so.

        before: q * cos + cat((-q[..., h:], q[..., :h]), -1) * sin; the same for k
        after:  q, k = torch_rope_with_explicit_cos_sin(q, k, cos, sin, unsqueeze_dim)
    """

    key = "match_rope_pattern"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Find rotated tensors, pair those of one attention that share their tables, rewrite the pairs."""
        groups: dict[tuple[Any, ...], list[_Turn]] = defaultdict(list)
        inside: set[Node] = set()
        for match in find(gm, *_PATTERNS):
            if match["rotated"] in inside:
                continue
            turn = _turn(match)
            if turn is not None:
                inside.add(match["rotated"])
                groups[turn.partner_key].insert(0, turn)
        order = {n: i for i, n in enumerate(gm.graph.nodes)}
        made: dict[_Recipe, Node] = {}
        count = 0
        for turns in groups.values():
            for q, k in zip(turns[::2], turns[1::2], strict=False):
                if _free_of(gm, q, k, order):
                    self._rewrite(gm, q, k, made)
                    count += 1
        single = sum(len(turns) for turns in groups.values()) - 2 * count
        return PassInfo(num_matches=count, details={"unpaired": single} if single else {})

    def _rewrite(self, gm: GraphModule, q: _Turn, k: _Turn, made: dict[_Recipe, Node]) -> None:
        root_q, root_k = q.match.root, k.match.root
        with self.site(gm, (*q.match.nodes, *k.match.nodes), label="rope", before=root_k) as s:
            inputs = [_build(s, recipe, made) for recipe in (q.x, k.x, *q.tables)]
            pair = s.call(_OPS[q.match.pattern], (*inputs, q.unsqueeze_dim), like=root_q)
            pair.meta["val"] = (root_q.meta["val"], root_k.meta["val"])
            s.replace(root_q, s.call(operator.getitem, (pair, 0), like=root_q))
            s.replace(root_k, s.call(operator.getitem, (pair, 1), like=root_k))


def _turn(match: Match) -> _Turn | None:
    """The rotation a match stands for, with everything the op takes for granted checked; None if it does not
    hold."""
    out = dtype_of(match.root)
    rotated, whole = match["x"], match["x"]
    if "rest" in match.bound:
        whole = _whole(whole, match["rest"])
        if whole is None:
            return None
    x = uncast(whole, out) if out is not None else None
    shape = shape_of(rotated)
    if x is None or shape is None or len(shape) != 4 or not same_shape(x, match.root):
        return None
    if "end" in match.bound and match["end"] != shape[-1]:
        return None
    if "mid" in match.bound and match["mid"] * 2 != shape[-1]:
        return None
    if "freqs" in match.bound:
        return _with_tables(match, x, (match["freqs"],), shape[-1] // 2, None)
    compute = dtype_of(match["rotated"])
    width = shape[-1] // 2 if match.pattern in _NARROW else shape[-1]
    if match.pattern is deinterleaved:
        even, odd = ((aten.slice.Tensor, (x, -1, start, shape[-1], 2)) for start in (0, 1))
        x = (aten.cat.default, ((even, odd), -1))
    return _with_tables(match, x, (match["cos"], match["sin"]), width, compute)


def _whole(head: Node, rest: Node) -> Node | None:
    """The tensor whose start is ``head`` and whose end is ``rest`` (which may be empty); None if there is
    none."""
    end, start = term_of(uncast(rest)), term_of(uncast(head))
    if end is None or end.op != "slice":
        return None
    whole, width, split = end.args[0], (shape_of(end.args[0]) or (None,))[-1], (shape_of(head) or (None,))[-1]
    if end.args[1:] != (-1, split, width, 1):
        return None
    if split == width:
        return whole if uncast(head) is uncast(whole) else None
    return (
        whole
        if start is not None and start.op == "slice" and start.args == (whole, -1, 0, split, 1)
        else None
    )


def _with_tables(
    match: Match, x: _Recipe, tables: tuple[Any, ...], width: int, compute: torch.dtype | None
) -> _Turn | None:
    """Check the tables' shape [B, 1, S, width] or [B, S, 1, width] and write them as recipes without the
    1."""
    recipes: list[_Recipe] = []
    dims: set[int] = set()
    for table in tables:
        shape = shape_of(table) if isinstance(table, Node) else None
        if shape is None or len(shape) != 4 or shape[-1] != width:
            return None
        dims.update(d for d in (1, 2) if isinstance(shape[d], int) and shape[d] == 1)
    if len(dims) != 1:
        return None
    dim = dims.pop()
    for table in tables:
        recipe = _without(table, dim - 4)
        if compute is not None and dtype_of(table) != compute:
            recipe = (aten.to.dtype, (recipe, compute))
        if match.pattern in _NARROW:
            recipe = (aten.cat.default, ((recipe, recipe), -1))
        if match.pattern is half_reversed and table is tables[-1]:
            recipe = (aten.neg.default, (recipe,))
        recipes.append(recipe)
    return _Turn(match, x, tuple(recipes), dim)


def _without(node: Any, dim: int) -> _Recipe:
    """``node`` as a recipe, without its dimension ``dim`` of size 1 (counted from the end).

    Walks up through what works on the last dimension alone until the ``unsqueeze`` that made the dimension.
    """
    term = term_of(node)
    if term is not None and term.op == "unsqueeze" and term.args[1] == dim:
        return term.args[0]
    if term is not None and term.op == "slice" and term.args[1] == -1:
        return aten.slice.Tensor, (_without(term.args[0], dim), -1, *term.args[2:])
    rank = len(shape_of(node) or ())
    if node.target is aten.repeat_interleave.self_int and not node.kwargs and node.args[2] in (-1, rank - 1):
        return node.target, (_without(node.args[0], dim), node.args[1], -1)
    if node.target is aten.to.dtype:
        return node.target, (_without(node.args[0], dim), *node.args[1:])
    return aten.squeeze.dim, (node, dim)


def _build(s: Site, recipe: _Recipe, made: dict[_Recipe, Node]) -> Node:
    """The node of a recipe; nodes are shared between layers, so they go right after what they read."""
    if isinstance(recipe, Node):
        return recipe
    if recipe not in made:
        target, args = recipe
        built = [
            [_build(s, a, made) for a in arg] if isinstance(arg, tuple) else arg
            for arg in (_build(s, a, made) if _is_recipe(a) else a for a in args)
        ]
        read = max(n for a in built for n in (a if isinstance(a, list) else [a]) if isinstance(n, Node))
        made[recipe] = s.call(target, tuple(built), before=read.next)
    return made[recipe]


def _is_recipe(value: Any) -> bool:
    return isinstance(value, Node) or (isinstance(value, tuple) and len(value) == 2 and callable(value[0]))


def _free_of(gm: GraphModule, q: _Turn, k: _Turn, order: dict[Node, int]) -> bool:
    """Make room for one op at ``k``'s place: readers of the rotated query that come earlier move behind it.

    False when the key depends on the rotated query.
    """
    here = order[k.match.root]
    early: set[Node] = set()
    todo = [q.match.root]
    while todo:
        for user in todo.pop().users:
            if user is k.match.root or user in k.match.nodes:
                return False
            if order[user] < here and user not in early:
                early.add(user)
                todo.append(user)
    anchor = k.match.root
    for node in sorted(early, key=order.__getitem__):
        anchor.append(node)
        anchor = node
    return True
