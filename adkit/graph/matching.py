"""Finding blocks in a graph: nodes in normal form, patterns as small Python functions.

A pattern is written in the words of this module and called once on placeholders::

    @pattern
    def rmsnorm(x, weight, eps):
        return weight * (x * rsqrt(mean(square(x)) + eps))

    for match in find(gm, rmsnorm):
        match["x"], match["eps"], match.root, match.nodes

The graph is read in *normal form* (:func:`term_of`), so one pattern covers every spelling: ``pow(2)``, ``x *
x`` and ``square``; chunk, split, narrow and slicing; negative and positive dimensions; commuted sums and
products. Casts, clones and dropout at inference are looked through, so a pass asks the values' dtypes when
rounding matters.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Term:
    """A node in normal form: operation, operands (nodes and literals), nodes folded into it."""

    op: str
    args: tuple[Any, ...]
    through: tuple[Node, ...] = ()


# --- normal form ----------------------------------------------------------------------------------

_SIMPLE: dict[Any, str] = {
    aten.add.Tensor: "add", aten.add.Scalar: "add", aten.mul.Tensor: "mul", aten.mul.Scalar: "mul",
    aten.sub.Tensor: "sub", aten.sub.Scalar: "sub", aten.div.Tensor: "div", aten.div.Scalar: "div",
    aten.neg.default: "neg", aten.rsqrt.default: "rsqrt", aten.sqrt.default: "sqrt",
    aten.square.default: "square",
    aten.silu.default: "silu", aten.relu.default: "relu", aten.tanh.default: "tanh",
    aten.view_as_complex.default: "view_as_complex", aten.view_as_real.default: "view_as_real",
    aten.to.dtype: "cast", aten.to.device: "cast", aten.to.dtype_layout: "cast", aten.to.other: "cast",
    aten._to_copy.default: "cast", aten.type_as.default: "cast", aten.clone.default: "cast",
    aten.contiguous.default: "cast", aten.alias.default: "cast", aten.detach.default: "cast",
}  # fmt: skip
_LAST_DIM: dict[Any, str] = {aten.mean.dim: "mean", aten.sum.dim_IntList: "sum"}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints}


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Shape of a node's value (ints and symbolic ints); None when it has no tensor value."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(val.shape) if isinstance(val, torch.Tensor) else None


def dtype_of(node: Any) -> torch.dtype | None:
    """Dtype of a node's value; None when it has no tensor value."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return val.dtype if isinstance(val, torch.Tensor) else None


def args_of(node: Node) -> tuple[Any, ...]:
    """Positional arguments of a call."""
    return node.args


def arg(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def from_end(dim: int, rank: int) -> int:
    """A dimension counted from the end (-1 is the last)."""
    return dim - rank if dim >= 0 else dim


def same_size(a: Any, b: Any) -> bool:
    """Equality of two sizes without adding a guard: equal ints, or the same symbolic expression."""
    return a == b if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def same_shape(a: Node, b: Node) -> bool:
    """True when both values have provably the same shape."""
    x, y = shape_of(a), shape_of(b)
    return x is not None and y is not None and len(x) == len(y) and all(map(same_size, x, y))


def term_of(node: Any) -> Term | None:
    """Normal form of a call node; None for other nodes and for operations that have none."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    target: Any = node.target
    op = _SIMPLE.get(target)
    if op == "cast":
        return Term("cast", (args_of(node)[0],))
    if op is not None:
        if node.kwargs:  # alpha=, rounding_mode=
            return None
        if op == "mul" and args_of(node)[0] is args_of(node)[1]:
            return Term("square", (args_of(node)[0],))
        return Term(op, tuple(args_of(node)))
    if target in _LAST_DIM:
        return _reduction(node, _LAST_DIM[target])
    if target in _RESHAPES:
        return _reshape(node)
    special = _SPECIAL.get(target)
    return special(node) if special is not None else None


def _reduction(node: Node, op: str) -> Term | None:
    x, dims = args_of(node)[0], arg(node, 1, "dim")
    shape = shape_of(x)
    if (
        shape is None
        or not arg(node, 2, "keepdim", False)
        or not isinstance(dims, (list, tuple))
        or len(dims) != 1
    ):
        return None
    return Term(op, (x,)) if from_end(dims[0], len(shape)) == -1 else None


def _reshape(node: Node) -> Term | None:
    """``merge`` flattens the last two dimensions, ``pairs`` splits the last one into [..., 2]."""
    x = args_of(node)[0]
    old, new = shape_of(x), shape_of(node)
    if old is None or new is None:
        return None
    if len(old) == len(new) + 1 and all(map(same_size, old[:-2], new[:-1])):
        return Term("merge", (x,))
    if len(old) == len(new) - 1 and new[-1] == 2 and all(map(same_size, old[:-1], new[:-2])):
        return Term("pairs", (x,))
    return None


def _pow(node: Node) -> Term | None:
    op = {2: "square", 0.5: "sqrt", -0.5: "rsqrt"}.get(args_of(node)[1])
    return Term(op, (args_of(node)[0],)) if op else None


def _reciprocal(node: Node) -> Term | None:
    inner = term_of(args_of(node)[0])
    return (
        Term("rsqrt", inner.args, (args_of(node)[0], *inner.through))
        if inner is not None and inner.op == "sqrt"
        else None
    )


def _slice_term(
    x: Node, dim: int, start: Any, stop: Any, step: Any, through: tuple[Node, ...] = ()
) -> Term | None:
    shape = shape_of(x)
    if shape is None:
        return None
    size = shape[dim]
    start, stop = start or 0, size if stop is None else stop
    if isinstance(size, int) and isinstance(start, int) and isinstance(stop, int):
        start, stop, _ = slice(start, stop).indices(size)
    return Term("slice", (x, from_end(dim, len(shape)), start, stop, step), through)


def _slice(node: Node) -> Term | None:
    bounds = (arg(node, 1, "dim", 0), arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1))
    return _slice_term(args_of(node)[0], *bounds)


def _narrow(node: Node) -> Term | None:
    start, length = args_of(node)[2], args_of(node)[3]
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    return _slice_term(args_of(node)[0], args_of(node)[1], start, start + length, 1)


def _getitem(node: Node) -> Term | None:
    """One piece of a split or chunk, as a slice."""
    source, index = args_of(node)
    if not isinstance(source, Node) or source.target not in _SPLITS or not isinstance(index, int):
        return None
    x, sizes, dim = args_of(source)[0], args_of(source)[1], arg(source, 2, "dim", 0)
    shape = shape_of(x)
    if shape is None or not isinstance(shape[dim], int):
        return None
    if source.target is aten.chunk.default:
        sizes = -(-shape[dim] // sizes)
    if isinstance(sizes, int):
        start, stop = index * sizes, min((index + 1) * sizes, shape[dim])
    else:
        start, stop = sum(sizes[:index]), sum(sizes[: index + 1])
    return _slice_term(x, dim, start, stop, 1, (source,))


def _join(op: str) -> Callable[[Node], Term | None]:
    def join(node: Node) -> Term | None:
        rank = len(shape_of(node) or ())
        return Term(op, (from_end(arg(node, 1, "dim", 0), rank), *args_of(node)[0])) if rank else None

    return join


def _gelu(node: Node) -> Term:
    return Term("gelu_tanh" if arg(node, 1, "approximate", "none") == "tanh" else "gelu", (args_of(node)[0],))


def _dropout(node: Node) -> Term | None:
    return None if arg(node, 2, "train", True) else Term("cast", (args_of(node)[0],))


def _unsqueeze(node: Node) -> Term | None:
    rank = len(shape_of(node) or ())
    return Term("unsqueeze", (args_of(node)[0], from_end(args_of(node)[1], rank))) if rank else None


def _transpose(node: Node) -> Term | None:
    rank = len(shape_of(node) or ())
    return (
        Term("transpose", (args_of(node)[0], *sorted(from_end(d, rank) for d in args_of(node)[1:3])))
        if rank
        else None
    )


_SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes}
_SPECIAL: dict[Any, Callable[[Node], Term | None]] = {
    aten.pow.Tensor_Scalar: _pow,
    aten.reciprocal.default: _reciprocal,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    operator.getitem: _getitem,
    aten.cat.default: _join("cat"),
    aten.stack.default: _join("stack"),
    aten.gelu.default: _gelu,
    aten.dropout.default: _dropout,
    aten.unsqueeze.default: _unsqueeze,
    aten.transpose.int: _transpose,
}


# --- patterns -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pat:
    """An operation of a pattern. With ``label``, the node it matches can be asked for by that name."""

    op: str
    args: tuple[Any, ...]
    label: str = ""

    def __add__(self, other: Any) -> Pat:
        return Pat("add", (self, other))

    def __sub__(self, other: Any) -> Pat:
        return Pat("sub", (self, other))

    def __mul__(self, other: Any) -> Pat:
        return Pat("mul", (self, other))

    def __truediv__(self, other: Any) -> Pat:
        return Pat("div", (self, other))

    def __neg__(self) -> Pat:
        return Pat("neg", (self,))

    __radd__ = __add__
    __rmul__ = __mul__


def named(label: str, pat: Pat) -> Pat:
    """The same pattern, its node kept under ``label``."""
    return Pat(pat.op, pat.args, label)


def _word(op: str) -> Callable[..., Pat]:
    def word(*args: Any) -> Pat:
        return Pat(op, args)

    word.__name__ = op
    return word


rsqrt, sqrt, square, mean, total = (_word(op) for op in ("rsqrt", "sqrt", "square", "mean", "sum"))
silu, relu, gelu, gelu_tanh = (_word(op) for op in ("silu", "relu", "gelu", "gelu_tanh"))
cat, stack, merge, pairs = (_word(op) for op in ("cat", "stack", "merge", "pairs"))
view_as_real, view_as_complex = _word("view_as_real"), _word("view_as_complex")


def last(x: Any, start: Any, stop: Any, step: int = 1) -> Pat:
    """x[..., start:stop:step]."""
    return Pat("slice", (x, -1, start, stop, step))


@dataclass(frozen=True)
class Pattern:
    """A traced pattern: its name and its expression."""

    name: str
    root: Pat


def pattern(fn: Callable[..., Pat]) -> Pattern:
    """Trace a pattern function on one placeholder a parameter (a parameter binds a node or a literal)."""
    return Pattern(fn.__name__, fn(*(Pat("any", (), name) for name in inspect.signature(fn).parameters)))


# --- matching -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """One place where a pattern holds; ``match["x"]`` is what the pattern's parameter or label stands for."""

    pattern: Pattern
    root: Node
    bound: dict[str, Any]
    nodes: tuple[Node, ...] = field(repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]


_State = tuple[dict[str, Any], tuple[Node, ...]]
_COMMUTE = {"add", "mul"}


def cast_chain(node: Any) -> Iterator[Node]:
    """``node``, then what it casts, then what that casts..."""
    while isinstance(node, Node):
        yield node
        term = term_of(node)
        if term is None or term.op != "cast":
            return
        node = term.args[0]


def uncast(node: Any, dtype: torch.dtype | None = None) -> Any:
    """The node below ``node``'s casts; with ``dtype``, the deepest one of that dtype that only lossless casts
    hide.

    None when there is no node of that dtype.
    """
    if dtype is None:
        *_, deepest = cast_chain(node)
        return deepest
    found, above = None, None
    for n in cast_chain(node):
        here = dtype_of(n)
        if here is None or (above is not None and torch.promote_types(here, above) != above):
            break
        above = here
        if here == dtype:
            found = n
    return found


def _match(pat: Any, value: Any, state: _State) -> Iterator[_State]:
    bound, nodes = state
    if not isinstance(pat, Pat):
        if not isinstance(value, Node) and pat == value:
            yield state
        return
    if pat.op == "any":
        chain = tuple(cast_chain(value)) if isinstance(value, Node) else ()
        if pat.label not in bound:
            yield {**bound, pat.label: value}, (*nodes, *chain[:-1])
        elif _same(bound[pat.label], value):
            yield bound, (*nodes, *chain[:-1])
        return
    term = term_of(value)
    if term is None:
        return
    if term.op == "cast":
        yield from _match(pat, term.args[0], (bound, (*nodes, value)))
        return
    if term.op != pat.op or len(term.args) != len(pat.args):
        return
    if pat.label:
        bound = {**bound, pat.label: value}
    nodes = (*nodes, value, *term.through)
    yield from _match_all(pat.args, term.args, (bound, nodes))
    if pat.op in _COMMUTE:
        yield from _match_all(pat.args, term.args[::-1], (bound, nodes))


def _match_all(pats: tuple[Any, ...], values: tuple[Any, ...], state: _State) -> Iterator[_State]:
    if not pats:
        yield state
        return
    for after in _match(pats[0], values[0], state):
        yield from _match_all(pats[1:], values[1:], after)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Node) and isinstance(b, Node):
        return uncast(a) is uncast(b)
    return not isinstance(a, Node) and not isinstance(b, Node) and a == b


def match_at(node: Node, *patterns: Pattern) -> Iterator[Match]:
    """Every way in which a pattern's last operation is ``node``, patterns in the order given."""
    for pat in patterns:
        for bound, nodes in _match(pat.root, node, ({}, ())):
            yield Match(pat, node, bound, tuple(dict.fromkeys(nodes)))


def find(gm: GraphModule, *patterns: Pattern) -> Iterator[Match]:
    """Matches of the patterns, from the graph's end to its start, so that a larger block comes before its
    parts.

    The caller may rewrite a match before asking for the next one; a node that a rewrite erased is not looked
    at.
    """
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "call_function" or node._erased:
            continue
        for match in match_at(node, *patterns):
            yield match
            if node._erased:
                break
