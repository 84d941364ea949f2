"""Do the ranks compute what the uncut model computes? Value by value, while all of them run.

Nothing here trusts the pass that cut: what ranks hold of a value is read off its shape (all of it, equal pieces along
one dimension, copies of pieces where there are more ranks than pieces) and then proved on the numbers: pieces equal
their part of the uncut model's value, whole values equal it on every rank, or else their sum does. The plan adds
only in which blocks a fused weight was cut. A node is matched with the uncut model's by identity (its id or origins).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from adkit.graph.display import mimebundle
from adkit.graph.identity import node_id
from adkit.graph.placement import PARTIAL, REPLICATED, Placement, ShardingPlan, cut
from adkit.graph.snapshot import NodeRecord, Snapshot
from adkit.ops.dist import over_ranks
from adkit.sharding.lockstep import RankFails

_aten = torch.ops.aten
#: Make memory that holds anything: there is nothing to compare before it is written.
_UNWRITTEN = {_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default}
_VIEWS = {_aten.slice.Tensor, _aten.select.int, _aten.view.default}


@dataclass(frozen=True)
class Divergence:
    """The first node at which the ranks leave the uncut model.

    ``node`` and ``id`` in the ranks' graphs, ``reference`` the node's name in the uncut one; ``rank`` the one furthest
    off (None: it is their sum that is wrong); ``placement`` what the ranks were taken to hold; ``max_abs`` and
    ``rmse_ratio`` by how much, NaN where there is no number to give; ``why`` in words.
    """

    node: str
    id: int
    op: str
    layer: int | None
    module: str
    source: str
    rank: int | None
    placement: Placement
    reference: str
    max_abs: float
    rmse_ratio: float
    why: str

    def __repr__(self) -> str:
        place = self.module or "outside any module"
        who = "the sum over ranks" if self.rank is None else f"rank {self.rank}"
        lines = [f"{self.node} = {self.op}(...) in {place}: {who} diverges"]
        if not math.isnan(self.rmse_ratio):
            lines[0] += f" (rmse ratio {self.rmse_ratio:.1e}, max abs {self.max_abs:.1e})"
        lines.append(f"  {self.why} (held as {self.placement})")
        if self.source:
            lines.append(f"  {self.source}")
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


@dataclass(frozen=True)
class Found:
    """What ranks hold of one value, and how far off the furthest is."""

    placement: Placement
    rank: int | None
    max_abs: float
    rmse_ratio: float


class Agreement:
    """Compares values of the ranks' graphs with those of the uncut one, as they are computed.

    ``whole``: the uncut graph; ``between``: graphs that nodes of the ranks' graph descend from it through;
    ``ranks``: rank 0's graph. ``tolerance`` bounds the rmse ratio of every value.
    """

    def __init__(
        self,
        whole: Snapshot,
        between: Sequence[Snapshot],
        ranks: Snapshot,
        plan: ShardingPlan,
        tolerance: float,
    ) -> None:
        self.whole, self.tolerance, self.records = whole, tolerance, ranks.by_id
        self.pairs = counterparts(whole, between, ranks)
        self.blocks = _blocks(plan, whole, between)
        self.wanted = {i for pair in self.pairs.values() for i in pair.ids}
        self.values: dict[int, Any] = {}  # of the uncut graph, of the prompt at hand
        self.held: dict[int, Placement] = {}  # nodes whose values agreed, and how ranks hold them
        self.divergence: Divergence | None = None

    def keep(self, nodes: Sequence[Node], values: list[Any]) -> None:
        """Take a value of the uncut graph (its run's ``on_call``)."""
        i = node_id(nodes[0])
        if i in self.wanted:
            kept = values[0]
            self.values[i] = kept.clone() if isinstance(kept, Tensor) and _written_to(nodes[0]) else kept

    def look(self, nodes: Sequence[Node], values: list[Any]) -> None:
        """Compare a value of the ranks (their run's ``on_call``); nothing more once one diverged."""
        if self.divergence is not None:
            return
        i = node_id(nodes[0])
        pair = self.pairs.get(i)
        if pair is None or _unwritten(nodes[0]):
            return
        known = [(w, self.values[w]) for w in pair.ids if w in self.values]
        tries = [(w, f) for w, v in known if (f := self._compare(i, w, v, values)) is not None]
        if not tries:
            self._shapeless(i, pair, known, values)
            return
        w, best = min(tries, key=lambda t: _rank_of(t[1].rmse_ratio))
        if best.rmse_ratio <= self.tolerance:
            self.held[i] = best.placement
        elif pair.strict:
            self.divergence = self._told(i, w, best)

    def failed(self, error: RankFails) -> None:
        """A node raised on a rank: that is where they part."""
        if self.divergence is None:
            i = node_id(error.node)
            pair = self.pairs.get(i)
            nothing = Found(REPLICATED, error.rank, math.nan, math.nan)
            self.divergence = self._told(
                i, pair.ids[-1] if pair else None, nothing, f"it fails there: {error.why}"
            )

    def _compare(self, i: int, w: int, whole: Any, values: list[Any]) -> Found | None:
        """The worst of a value's tensors; None where shapes fit no way of holding it."""
        wholes = [t for t in tree_leaves(whole) if isinstance(t, Tensor)]
        pieces = [[t for t in tree_leaves(v) if isinstance(t, Tensor)] for v in values]
        if not wholes or any(len(p) != len(wholes) for p in pieces):
            return None
        found = []
        for t, *parts in zip(wholes, *pieces, strict=True):
            one = explain(t, parts, self._blocks_at(i, w), self.tolerance)
            if one is None:
                return None
            found.append(one)
        return max(found, key=lambda f: _rank_of(f.rmse_ratio))

    def _blocks_at(self, i: int, w: int) -> Blocks | None:
        return self.blocks.get(i) or self.blocks.get(w)

    def _shapeless(self, i: int, pair: Pair, known: list[tuple[int, Any]], values: list[Any]) -> None:
        """A value whose shape is no share of the uncut one's: wrong where it is the very same node."""
        if not (pair.same and known and isinstance(known[0][1], Tensor) and isinstance(values[0], Tensor)):
            return
        shapes = " and ".join(sorted({str(list(v.shape)) for v in values}))
        why = f"ranks hold {shapes}, which is no share of {list(known[0][1].shape)} for {len(values)} ranks"
        self.divergence = self._told(i, known[0][0], Found(REPLICATED, 0, math.nan, math.nan), why)

    def _told(self, i: int, w: int | None, found: Found, why: str = "") -> Divergence:
        record = self.records[i]
        return Divergence(
            node=record.name,
            id=i,
            op=record.target_name,
            layer=record.layer,
            module=record.module_path,
            source=str(record.source or ""),
            rank=found.rank,
            placement=found.placement,
            reference="" if w is None else self.whole[w].name,
            max_abs=found.max_abs,
            rmse_ratio=found.rmse_ratio,
            why=why or self._why(record, found),
        )

    def _why(self, record: NodeRecord, found: Found) -> str:
        """What is likely: an input that was never added up, else what was compared."""
        unsummed = [self.records[i].name for i in record.inputs() if self.held.get(i) == PARTIAL]
        if unsummed and not over_ranks(record.target):
            return f"it reads {', '.join(unsummed)}, of which ranks hold terms that nothing added up (all_reduce)"
        if found.placement.kind == "cut":
            return f"its piece is not its share of the uncut value along dimension {found.placement.dim}"
        if found.rank is None:
            return "neither a rank's value nor the sum of all is the uncut model's"
        return "the ranks' values are not the uncut model's"


def _unwritten(node: Any) -> bool:
    """True for memory that was made and not written, and what looks at it."""
    while node.target in _VIEWS:
        node = node.args[0]
    return node.target in _UNWRITTEN


def _written_to(node: Node) -> bool:
    """True where a later node changes the value in its place."""
    return any(
        isinstance(u.target, torch._ops.OpOverload) and u.target._schema.is_mutable and u.args[:1] == (node,)
        for u in node.users
    )


@dataclass(frozen=True)
class Blocks:
    """How a dimension that holds several weights' outputs is cut: every block of ``sizes``, none below ``least``."""

    sizes: tuple[int, ...]
    least: int = 1


@dataclass(frozen=True)
class Pair:
    """A node's counterparts in the uncut graph, best last. ``same``: it is that very node; ``strict``: a difference is
    an error, not a sign that they were no counterparts."""

    ids: tuple[int, ...]
    same: bool
    strict: bool


def counterparts(whole: Snapshot, between: Sequence[Snapshot], ranks: Snapshot) -> dict[int, Pair]:
    """For call nodes of ``ranks``: the nodes of ``whole`` whose value they may compute.

    A rewrite's last node computes what it replaced; those before it may be steps on the way. A node that replaces
    several need not compute any of them.
    """
    roots: dict[int, tuple[int, ...]] = {n.id: (n.id,) for n in whole}
    for snapshot in (*between, ranks):
        for n in snapshot:
            if n.id not in roots:
                found = dict.fromkeys(r for o in n.origins for r in roots.get(o, ()))
                roots[n.id] = tuple(found)
    calls = [n for n in ranks if n.op == "call_function" and roots[n.id]]
    last = {r: n.id for n in calls for r in roots[n.id]}
    place = {n.id: i for i, n in enumerate(whole)}
    pairs: dict[int, Pair] = {}
    for n in calls:
        ids = tuple(sorted(roots[n.id], key=place.__getitem__))
        same = ids == (n.id,)
        pairs[n.id] = Pair(ids, same, same or (len(ids) == 1 and last[ids[0]] == n.id))
    return pairs


def _blocks(plan: ShardingPlan, whole: Snapshot, between: Sequence[Snapshot]) -> dict[int, Blocks]:
    """Nodes of which a dimension holds several blocks, by id: from the plan's rows, the hints, and what reads them."""
    found = {r.node: Blocks(r.sizes, r.min_local) for r in plan if r.sizes and r.decision == "colwise"}
    _follow(whole, found)
    found |= {r.node: Blocks((), r.min_local) for r in plan if not r.sizes and r.min_local > 1}
    for snapshot in between:
        for n in snapshot:
            if isinstance(n.kwargs.get("output_sizes"), (tuple, list)):
                least = n.kwargs.get("tp_min_local_shape", 1)
                found[n.id] = Blocks(tuple(n.kwargs["output_sizes"]), least)
    return found


def _follow(whole: Snapshot, found: dict[int, Blocks]) -> None:
    """The same blocks for weights that nodes in ``found`` read turned around, and for what reads them, also as heads.

    That is only a way of holding a value that is tried: numbers decide.
    """
    for n in whole:
        inputs = n.inputs()
        if n.id in found:
            turned = [i for i in inputs if whole.by_id[i].target is torch.ops.aten.t.default]
            found.update(dict.fromkeys(turned, found[n.id]))
        elif inputs and inputs[0] in found and isinstance(n.val, Tensor):
            blocks = found[inputs[0]]
            known = [d for d in n.val.shape if isinstance(d, int) and d > 1]
            # All of the blocks, not what was split off them; pieces of theirs along the first dimension.
            each = sum(blocks.sizes) // known[0] if known else 0
            if math.prod(known) == sum(blocks.sizes) and all(s % each == 0 for s in blocks.sizes):
                least = max(blocks.least // each, 1)
                found[n.id] = Blocks(tuple(s // each for s in blocks.sizes), least)


def explain(whole: Tensor, pieces: list[Tensor], blocks: Blocks | None, tolerance: float) -> Found | None:
    """What ranks hold of ``whole`` and how far off they are; None where shapes fit no way of holding it."""
    if len({p.shape for p in pieces}) > 1 or pieces[0].dim() != whole.dim():
        return None
    differ = [d for d, (a, b) in enumerate(zip(whole.shape, pieces[0].shape, strict=True)) if a != b]
    if not differ:
        each = _furthest(REPLICATED, [whole] * len(pieces), pieces)
        if each.rmse_ratio <= tolerance or len(pieces) == 1 or not whole.is_floating_point():
            return each
        total = torch.stack([p.double() for p in pieces]).sum(0)
        summed = Found(PARTIAL, None, *difference(whole, total))
        return summed if summed.rmse_ratio <= tolerance else min(
            each, summed, key=lambda f: _rank_of(f.rmse_ratio)
        )  # fmt: skip
    if len(differ) > 1:
        return None
    dim = differ[0]
    shares = _shares(whole.shape[dim], pieces[0].shape[dim], len(pieces), blocks)
    if shares is None:
        return None
    expected = [torch.cat([whole.narrow(dim, a, b - a) for a, b in share], dim) for share in shares]
    return _furthest(cut(dim), expected, pieces)


def _shares(whole: int, local: int, ranks: int, blocks: Blocks | None) -> list[list[tuple[int, int]]] | None:
    """Each rank's ranges of a dimension of ``whole`` elements of which it holds ``local``; None where that is no share.

    Ranks hold consecutive pieces; where there are more ranks than pieces, neighbours hold copies.
    """
    sizes = blocks.sizes if blocks is not None and sum(blocks.sizes) == whole else (whole,)
    least = blocks.least if blocks is not None else 1
    locals_ = [max(size // ranks, min(least, size)) for size in sizes] if len(sizes) > 1 else [local]
    if sum(locals_) != local:
        return None
    shares: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    start = 0
    for size, mine in zip(sizes, locals_, strict=True):
        copies, rest = divmod(mine * ranks, size) if mine and size else (0, 1)
        if rest or copies < 1 or ranks % copies:
            return None
        for r in range(ranks):
            at = start + (r // copies) * mine
            shares[r].append((at, at + mine))
        start += size
    return shares


def _furthest(placement: Placement, expected: list[Tensor], pieces: list[Tensor]) -> Found:
    found = [(difference(e, p), r) for r, (e, p) in enumerate(zip(expected, pieces, strict=True))]
    (most, ratio), rank = max(found, key=lambda f: _rank_of(f[0][1]))
    return Found(placement, rank, most, ratio)


def difference(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """(largest absolute difference, rmse ratio) in float64; infinities and NaN that both have count as equal."""
    a, b = expected.detach().double(), actual.detach().double()
    alike = (a == b) | (a.isnan() & b.isnan())
    if bool(alike.all()):
        return 0.0, 0.0
    d = torch.where(alike, 0.0, b - a)
    scale = float(torch.where(a.isfinite(), a, 0.0).square().mean().sqrt())
    error = float(d.square().mean().sqrt())
    return float(d.abs().max()), error / scale if scale else math.inf


def _rank_of(ratio: float) -> float:
    """NaN is the worst of all."""
    return math.inf if math.isnan(ratio) else ratio


def summary(held: Mapping[int, Placement]) -> dict[str, int]:
    """How many values were held in which way."""
    counts: dict[str, int] = {}
    for p in held.values():
        counts[str(p)] = counts.get(str(p), 0) + 1
    return counts
