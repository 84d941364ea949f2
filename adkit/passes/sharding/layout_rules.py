"""Rules for ops that move values about: views, splits, joins, and what is made in a shape.

Each says where a cut is afterwards, and notes in the walk what a rank has to do otherwise than the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from adkit.graph.matching import arg, same_size
from adkit.graph.snapshot import attribute
from adkit.passes.sharding.op_kinds import SPLITS, VIEWS, adkit_ops, aten, elementwise, name_of
from adkit.passes.sharding.spread import WHOLE, Slices, Spread, rank_of, regroup, shape_of

if TYPE_CHECKING:
    from adkit.passes.sharding.rules import Walk


#: Ops that may take a part of one dimension.
PICKS = {aten.slice.Tensor, aten.index.Tensor}


def _view(w: Walk, node: Node) -> Spread:
    x = node.args[0]
    s = w.found.of(x)
    before, after = shape_of(x), shape_of(node)
    to = regroup(before, after, s.dim)
    if to is not None and s.blocks and (inner := _inner(before[s.dim], after[to])) > 1:
        return _blocks_into_pieces(w, node, s, to, inner)
    if to is None or (s.blocks and not same_size(after[to], before[s.dim])):
        raise w.unaccounted(node, "a view takes the dimension that is cut apart")
    literal = _literals(node, len(after))
    if literal is not None and literal[to] != -1:
        if not isinstance(literal[to], int):
            raise w.unaccounted(node, "a size along the cut is computed")
        if node.target not in VIEWS:
            raise w.unaccounted(node, f"{name_of(node.target)} names a size along the cut")
        w.found.scaled[node] = (to, int(after[to]), s.shares)
    if isinstance(after[to], int) and s.share is not None:
        s.share.whole_pieces(after[to])
    return s.at(to)


def _inner(before: Any, after: Any) -> int:
    """Elements of a piece where a view makes pieces of a dimension; 1 where it does not."""
    known = isinstance(before, int) and isinstance(after, int)
    return before // after if known and before % after == 0 else 1


def _blocks_into_pieces(w: Walk, node: Node, s: Spread, to: int, inner: int) -> Spread:
    """A fused weight's blocks as heads (Falcon's queries, one key and one value): each a whole number of them."""
    literal = _literals(node, rank_of(node))
    if any(size % inner for size, _ in s.blocks):
        raise w.unaccounted(node, "a view takes the dimension that is cut apart")
    if literal is not None and literal[to] != -1:
        if node.target not in VIEWS or -1 in literal:
            raise w.unaccounted(node, "a view counts the pieces of several blocks that are cut")
        w.found.expanded[node] = to  # blocks are not cut alike, so the count is left to the view
    for size, share in s.blocks:
        share.whole_pieces(size // inner)
    return Spread("cut", to, None, tuple((size // inner, share) for size, share in s.blocks))


def _literals(node: Node, rank: int) -> tuple[Any, ...] | None:
    """The sizes that a view names, one a dimension; None where it names none."""
    if node.target in VIEWS:
        return tuple(node.args[1])  # type: ignore[arg-type]
    if node.target is aten.unflatten.int:
        sizes, at = tuple(node.args[2]), int(node.args[1])  # type: ignore[arg-type]
        at %= rank_of(node.args[0])
        return (-1,) * at + sizes + (-1,) * (rank - at - len(sizes))
    return None


def order_of(node: Node) -> list[int]:
    """Which dimension of its input each dimension of a transpose, permutation or ``t`` is."""
    rank = rank_of(node.args[0])
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in cast(Any, node.args[1])]
    else:
        a, b = (0, 1) if node.target is aten.t.default else (-2, -1)
        if len(node.args) == 3:
            a, b = int(node.args[1]), int(node.args[2])  # type: ignore[arg-type]
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return order


def _transpose(w: Walk, node: Node) -> Spread:
    s = w.found.of(node.args[0])
    return s.at(order_of(node).index(s.dim))


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
                w.join(node, lead, s)
        elif same_size(shape_of(a)[lead.dim], size):
            w.slice(node, a, lead.dim, lead)
        else:
            raise w.unaccounted(node, f"{a.name} does not have the size of what is cut")
    return lead.at(lead.dim + (stacked and lead.dim >= dim))


def _slice(w: Walk, node: Node) -> Spread:
    s = w.found.of(node.args[0])
    if slice_dim(node) != s.dim:
        return s
    size = shape_of(node.args[0])[s.dim]
    bounds = slice_bounds(node, size) if isinstance(size, int) else None
    if bounds == (0, size):
        return s
    part = None if bounds is None else within(s, *bounds)
    if part is None:
        raise w.unaccounted(node, "takes a slice of the dimension that is cut")
    w.found.blocks[node] = s.blocks
    return part


def _index(w: Walk, node: Node) -> Spread:
    """Picking one place of a dimension by a constant is a slice."""
    if slice_dim(node) is None or any(w.found.of(a).kind == "cut" for a in node.all_input_nodes[1:]):
        raise w.unaccounted(node, "picks places of what is cut")
    return _slice(w, node)


def within(s: Spread, start: int, stop: int) -> Spread | None:
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
        part = within(s, at, at + size)
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


def blocks_wanted(node: Node, out: int) -> tuple[int, ...]:
    """Sizes of the blocks that readers take from a linear's output: Q|K|V, gate|up; one block if they do not.

    Readers are found behind what works element by element, and behind views, also into heads.
    """
    bounds, seen = {0, out}, {node}
    pending = [
        (node, rank_of(node) - 1, 1)
    ]  # a value, the dimension that is the output's, elements of one place
    while pending:
        value, dim, each = pending.pop()
        for reader in value.users:
            found = _bounds(reader, dim, out // each)
            if found is not None:
                bounds |= {place * each for place in found}
            elif reader not in seen and (kept := _kept(reader, value, dim, out // each)) is not None:
                seen.add(reader)
                pending.append((reader, kept[0], each * kept[1]))
    ends = sorted(bounds)
    return tuple(b - a for a, b in pairwise(ends))


def _kept(reader: Node, value: Node, dim: int, size: int) -> tuple[int, int] | None:
    """Where a reader's result has dimension ``dim`` of ``value``, and how many of its places are one there."""
    after = shape_of(reader)
    if elementwise(reader.target):
        at = dim - rank_of(value) + len(after)
        return (at, 1) if 0 <= at < len(after) and after[at] == size else None
    if reader.target is aten.unsqueeze.default:
        at = int(reader.args[1]) % len(after)  # type: ignore[arg-type]
        return dim + (dim >= at), 1
    if reader.target not in VIEWS:
        return None
    to = regroup(shape_of(value), after, dim)
    if to is None or not isinstance(after[to], int) or size % after[to] or prod_after(after, to) != size:
        return None
    return to, size // after[to]


def prod_after(shape: tuple[Any, ...], dim: int) -> int:
    """Elements from dimension ``dim`` on; 0 where a size is not known."""
    sizes = shape[dim:]
    return prod(sizes) if all(isinstance(n, int) for n in sizes) else 0


def _bounds(node: Node, at: int, size: int) -> set[int] | None:
    """Where a split or slice of dimension ``at`` cuts it; None for other nodes."""
    if node.target is adkit_ops.torch_swiglu_packed.default:
        return {0, size // 2, size}
    if node.target in SPLITS and arg(node, 2, "dim", 0) % rank_of(node.args[0]) == at:
        sizes = _split_sizes(node, size)
        return None if sizes is None else {sum(sizes[:i]) for i in range(len(sizes) + 1)}
    if node.target in PICKS and slice_dim(node) == at:
        bounds = slice_bounds(node, size)
        return None if bounds is None else set(bounds)
    return None


def slice_dim(node: Node) -> int | None:
    """The dimension that a slice, or picking by a constant, takes a part of; None where it is not one alone."""
    if node.target is aten.slice.Tensor:
        return int(arg(node, 1, "dim", 0)) % rank_of(node.args[0])
    places = [i for i, a in enumerate(cast(Any, node.args[1])) if a is not None]
    return places[0] if len(places) == 1 and _constant_place(node) is not None else None


def slice_bounds(node: Node, size: int) -> tuple[int, int] | None:
    """First place and the one behind the last that a slice of a dimension of ``size`` takes; None if it has steps."""
    if node.target is aten.index.Tensor:
        place = _constant_place(node)
        return None if place is None else (place % size, place % size + 1)
    start, stop, step = arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1)
    if step != 1 or isinstance(start, Node) or isinstance(stop, Node):
        return None
    begin, end, _ = slice(start, stop).indices(size)
    return begin, end


def _constant_place(node: Node) -> int | None:
    """The one place that an index picks, where it is a constant of the graph."""
    index = next((a for a in cast(Any, node.args[1]) if a is not None), None)
    if not isinstance(index, Node) or index.op != "get_attr":
        return None
    known = attribute(node.graph.owning_module, str(index.target))
    if not isinstance(known, Tensor) or known.is_meta or known.shape != (1,) or known.dtype == torch.bool:
        return None
    return int(known[0])


def _split_sizes(node: Node, size: int) -> tuple[int, ...] | None:
    if node.target is aten.split_with_sizes.default:
        sizes = tuple(cast(Any, node.args[1]))
        return sizes if all(isinstance(s, int) for s in sizes) else None
    given = node.args[1]
    if not isinstance(given, int):
        return None
    step = -(-size // given) if node.target is aten.chunk.default else given
    return tuple(min(step, size - at) for at in range(0, size, step))


#: The rule of each op.
LAYOUT_RULES: dict[Any, Callable[[Walk, Node], Any]] = {
    **dict.fromkeys((*VIEWS, aten.flatten.using_ints, aten.unflatten.int), _view),
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
    aten.index.Tensor: _index,
    **dict.fromkeys(SPLITS, _split),
    **dict.fromkeys((aten.select.int, aten.unbind.int), _select),
    **dict.fromkeys(
        (aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default), _made
    ),
    aten.sym_size.int: _size_of,
}
