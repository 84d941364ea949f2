"""What the propagation knows of one value: how ranks hold it, and which linears' cut that goes back to.

:class:`Share` is one cut, made by a weight's owner (a linear, a table of embeddings) and followed through views,
norms and attention, which say what may not be taken apart (a head). :class:`Spread` is a value's placement with its
shares.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from math import gcd
from typing import Any

import torch
from torch.fx import Node

from adkit.graph.placement import PARTIAL, REPLICATED, Placement, cut

#: What a piece is where stacked matrices are shared out.
STACKED = "stacked matrices"


class Share:
    """One cut of features into ``pieces`` parts that may not be taken apart (features, heads, kv heads).

    Two values computed together are cut alike, so their shares are one (:meth:`join`). ``exact``: every rank needs
    pieces of its own; else ranks may hold copies (key and value heads fewer than ranks). ``heads`` names the pieces.
    """

    def __init__(self, pieces: int, owners: tuple[Node, ...] = ()) -> None:
        self._parent: Share | None = None
        self._pieces, self._owners = pieces, set(owners)
        self._exact, self._heads = False, ""

    def top(self) -> Share:
        """The share that stands for all that were joined."""
        share = self
        while share._parent is not None:
            share = share._parent
        if share is not self:
            self._parent = share
        return share

    @property
    def pieces(self) -> int:
        """How many parts there are."""
        return self.top()._pieces

    @property
    def owners(self) -> set[Node]:
        """The nodes whose weights are cut so."""
        return self.top()._owners

    @property
    def exact(self) -> bool:
        """True when no two ranks may hold the same piece."""
        return self.top()._exact

    @property
    def heads(self) -> str:
        """What a piece is: ``query heads``, ``key/value heads``, :data:`STACKED`, or empty for features."""
        return self.top()._heads

    def whole_pieces(self, count: int) -> None:
        """``count`` equal parts along the cut may be told apart, no more (a view into heads)."""
        self.top()._pieces = gcd(self.top()._pieces, count)

    def need(self, *, exact: bool = False, heads: str = "") -> None:
        """Note how the cut is used."""
        top = self.top()
        top._exact |= exact
        top._heads = top._heads or heads

    def join(self, other: Share) -> None:
        """The two are one cut from now on."""
        a, b = self.top(), other.top()
        if a is b:
            return
        b._parent = a
        a._pieces = gcd(a._pieces, b._pieces)
        a._owners |= b._owners
        a._exact = True
        a._heads = a._heads or b._heads


@dataclass(frozen=True)
class Spread:
    """How ranks hold a value.

    ``blocks``: along ``dim`` lie several cuts side by side, as (size, share) (a fused Q|K|V). ``terms`` and ``rest``:
    a sum not yet made, of terms (each with the node that adds it) and of values that every rank has. Where ranks have
    tokens of their own, pieces and terms are of the tokens of all, and ``gathered`` is what is whole for these.
    """

    kind: str = "replicated"
    dim: int = -1
    share: Share | None = None
    blocks: tuple[tuple[int, Share], ...] = ()
    terms: tuple[tuple[Node, Node], ...] = ()
    rest: tuple[Node, ...] = ()

    @property
    def placement(self) -> Placement:
        """The public half of it."""
        if self.kind == "cut":
            return cut(self.dim)
        return PARTIAL if self.kind == "partial" else REPLICATED

    @property
    def shares(self) -> tuple[Share, ...]:
        """All shares along the cut dimension."""
        return tuple(s for _, s in self.blocks) or ((self.share,) if self.share is not None else ())

    @property
    def stacked(self) -> bool:
        """True for pieces of a batch of matrices, each of which a rank has as a whole."""
        return self.share is not None and self.share.heads == STACKED

    def at(self, dim: int) -> Spread:
        """The same cut, on another dimension."""
        return Spread("cut", dim, self.share, self.blocks)


WHOLE, TERM = Spread(), Spread("partial")


@dataclass(frozen=True)
class Slices:
    """Which part of an operand a rank takes: its share along ``dim``, of each of the blocks ``sizes``."""

    dim: int
    share: Share
    size: int
    blocks: tuple[tuple[int, Share], ...] = ()


@dataclass
class Propagation:
    """What following the decisions through the graph found; all that the executor writes.

    ``spreads``: of every node reached by a cut or a partial sum (others are replicated; several outputs: a tuple).
    ``cuts``: blocks of each cut linear. ``scaled``: views, and the dimension whose literal counts what is cut, its
    size and shares. ``blocks``: splits and slices along a cut, as block sizes. ``sliced``: (reader, operand) -> what
    a rank takes of it. ``made``: values that are cut as they are made, for all their readers: such as have no
    content, and stacks of matrices. ``joined``: batched products whose pieces are joined at once, and along which
    dimension. ``norms`` over a cut dimension. ``sums``: partial value -> its readers that need the sum. ``merged``:
    node -> (terms, rest), a sum put in another order so that it takes one exchange. ``gathered``: value -> its
    readers that need the tokens of all ranks, where each has its own.
    """

    spreads: dict[Node, Spread | tuple[Spread, ...]] = field(default_factory=dict)
    cuts: dict[Node, tuple[tuple[int, Share], ...]] = field(default_factory=dict)
    rows: dict[Node, Share] = field(default_factory=dict)
    scaled: dict[Node, tuple[int, int, tuple[Share, ...]]] = field(default_factory=dict)
    expanded: dict[Node, int] = field(default_factory=dict)
    blocks: dict[Node, tuple[tuple[int, Share], ...]] = field(default_factory=dict)
    sliced: dict[tuple[Node, Node], Slices] = field(default_factory=dict)
    made: dict[Node, Slices] = field(default_factory=dict)
    joined: dict[Node, int] = field(default_factory=dict)
    norms: set[Node] = field(default_factory=set)
    sums: dict[Node, list[Node]] = field(default_factory=dict)
    merged: dict[Node, tuple[tuple[Node, ...], tuple[Node, ...]]] = field(default_factory=dict)
    gathered: dict[Node, list[Node]] = field(default_factory=dict)

    def of(self, node: Any) -> Spread:
        """Spread of a value; replicated for whatever was not reached."""
        found = self.spreads.get(node, WHOLE) if isinstance(node, Node) else WHOLE
        return found if isinstance(found, Spread) else WHOLE

    def outputs(self, node: Node) -> tuple[Spread, ...]:
        """Spreads of all outputs of a node."""
        found = self.spreads.get(node, WHOLE)
        return (found,) if isinstance(found, Spread) else found

    @staticmethod
    def least(blocks: Iterable[tuple[int, Share]]) -> int:
        """Smallest piece of a cut, in elements: of what may be there in copies, else of all."""
        pieces = [(max(size // share.pieces, 1), share.exact) for size, share in blocks]
        return max([n for n, exact in pieces if not exact] or [n for n, _ in pieces] or [1])

    @property
    def placements(self) -> dict[Node, Placement]:
        """Placement of every node that is not replicated (of several outputs the first one's)."""
        first = {n: s if isinstance(s, Spread) else s[0] for n, s in self.spreads.items()}
        return {n: s.placement for n, s in first.items()}


# --- sizes ------------------------------------------------------------------------------------------


def shape_of(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's value (ints and symbolic ints); empty when it is no tensor."""
    val = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(val.shape) if isinstance(val, torch.Tensor) else ()


def rank_of(node: Any) -> int:
    """Number of dimensions of a node's value."""
    return len(shape_of(node))


def regroup(before: tuple[Any, ...], after: tuple[Any, ...], dim: int) -> int | None:
    """Where the leading part of dimension ``dim`` of a value is after a view; None when it is torn apart.

    A share is a run along ``dim``. It stays one along the first dimension of the group that ``dim`` becomes, if
    ``dim`` leads its own group.
    """
    return _regroup(tuple(map(_size, before)), tuple(map(_size, after)), dim)


_Size = tuple[int, tuple[str, ...]]


def _size(d: Any) -> _Size:
    return (d, ()) if isinstance(d, int) else _symbols(d.node.expr)


@lru_cache(maxsize=4096)
def _symbols(expr: Any) -> _Size:
    number, rest = expr.as_coeff_Mul()
    factors: list[str] = []
    for base, power in rest.as_powers_dict().items():
        if base != 1:
            factors += [str(base)] * int(power) if power.is_Integer and power > 0 else [f"{base}^{power}"]
    return int(number), tuple(sorted(factors))


def _times(a: _Size, b: _Size) -> _Size:
    return a[0] * b[0], tuple(sorted(a[1] + b[1]))


def _divides(a: _Size, b: _Size) -> bool:
    return b[0] % a[0] == 0 and all(a[1].count(s) <= b[1].count(s) for s in a[1])


@lru_cache(maxsize=4096)
def _regroup(before: tuple[_Size, ...], after: tuple[_Size, ...], dim: int) -> int | None:
    i, j, one = len(before), len(after), (1, ())
    while i > 0:
        i, j = i - 1, j - 1
        if j < 0:
            return None
        left, right = before[i], after[j]
        ins, outs = [i], [j]
        while left != right:
            if _divides(left, right) and i > 0:
                i -= 1
                left = _times(left, before[i])
                ins.append(i)
            elif _divides(right, left) and j > 0:
                j -= 1
                right = _times(right, after[j])
                outs.append(j)
            else:
                return None
        if dim in ins:
            lead_in = [k for k in sorted(ins) if before[k] != one]
            lead_out = [k for k in sorted(outs) if after[k] != one]
            if before[dim] == one:
                return None
            return lead_out[0] if lead_in and lead_in[0] == dim and lead_out else None
        while i > 0 and before[i - 1] == one and i - 1 != dim:
            i -= 1
        while j > 0 and after[j - 1] == one:
            j -= 1
    return None
