"""Repeated decoder layers, found by structure: a graph of 32 equal layers reads as one layer, 32 times.

A *block* is the run of nodes of one layer; blocks of equal structure (same operations on the same inputs,
read relative to the layer) are one *variant*; a *segment* is either plain nodes or a loop over layers with
one or more variants (sliding and full attention in turns are two). Linear in the number of nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from adkit.graph.provenance import layer_of, without_layer
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot

LEAVES = ("placeholder", "get_attr")
_DIGITS = re.compile(r"\d+")
_UNBACKED = re.compile(r"\bu\d+\b")


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: its calls in order, and the parameters and inputs that nothing else reads."""

    layer: int
    nodes: tuple[int, ...]
    leaves: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """Blocks of equal structure; the first one represents them."""

    blocks: tuple[Block, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer indices, ascending."""
        return tuple(b.layer for b in self.blocks)

    @property
    def first(self) -> Block:
        """The representative."""
        return self.blocks[0]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of plain nodes (``nodes``) or a loop over layers (``variants``).

    ``carries[n][k]`` is the node that the k-th layer of the loop reads from before it: for ``k = 0`` a node
    outside the loop, after that a node of the layer before.
    """

    nodes: tuple[int, ...] = ()
    variants: tuple[Variant, ...] = ()
    carries: tuple[tuple[int, ...], ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """Layer indices in execution order (empty for plain nodes)."""
        return tuple(sorted(i for v in self.variants for i in v.layers))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The loop's blocks in execution order."""
        return tuple(sorted((b for v in self.variants for b in v.blocks), key=lambda b: b.layer))


class Folding:
    """A snapshot's segments, and which node represents which."""

    def __init__(self, segments: tuple[Segment, ...]) -> None:
        self.segments = segments

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    @cached_property
    def same(self) -> dict[int, tuple[int, ...]]:
        """For every representative node: the ids it stands for, itself first, in layer order."""
        found: dict[int, tuple[int, ...]] = {}
        for s in self.segments:
            for i in s.nodes:
                found[i] = (i,)
            for v in s.variants:
                for column in zip(*(b.nodes for b in v.blocks), strict=True):
                    found[column[0]] = column
                for column in zip(*(b.leaves for b in v.blocks), strict=True):
                    found[column[0]] = column
        return found

    @cached_property
    def representative(self) -> dict[int, int]:
        """For every node id, the id of the node that stands for it."""
        return {i: rep for rep, ids in self.same.items() for i in ids}

    @cached_property
    def layers(self) -> dict[int, Block]:
        """Every block by layer index."""
        return {b.layer: b for s in self.segments for b in s.blocks}

    def __repr__(self) -> str:
        parts = []
        for s in self.segments:
            if s.nodes:
                parts.append(f"{len(s.nodes)} nodes")
            for v in s.variants:
                parts.append(f"{layers_text(v.layers)}: {len(v.first.nodes)} nodes x{len(v.blocks)}")
        return f"Folding({'; '.join(parts)})"


def layers_text(layers: tuple[int, ...]) -> str:
    """Layer indices as text: ``layer 3``, ``layers 0-31``, ``layers 0, 2, 4, ... 24``."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    if len(layers) <= 5:
        return f"layers {', '.join(map(str, layers))}"
    return f"layers {', '.join(map(str, layers[:3]))}, ... {layers[-1]}"


def fold(snapshot: Snapshot) -> Folding:
    """The segments of ``snapshot``: every node in exactly one."""
    runs = _runs(snapshot)
    block_of: dict[int, int] = {}
    for b, (layer, ids) in enumerate(runs):
        if layer is not None:
            block_of.update(dict.fromkeys(ids, b))
    readers: dict[int, set[int | None]] = {n.id: set() for n in snapshot}
    for n in snapshot:
        for i in n.inputs():
            readers[i].add(block_of.get(n.id))

    owned: dict[int, list[int]] = {}
    signed: list[_Signed] = []
    for b, (layer, ids) in enumerate(runs):
        if layer is not None:
            previous = b - 1 if b and runs[b - 1][0] is not None else None
            signed.append(_sign(snapshot, b, previous, layer, ids, readers, block_of))
            owned[b] = signed[-1].leaves
    by_run = {s.run: s for s in signed}
    own = {i for ids in owned.values() for i in ids}

    segments: list[Segment] = []
    stretch: list[_Signed] = []
    leaves = tuple(n.id for n in snapshot if n.op in LEAVES and n.id not in own)
    if leaves:
        segments.append(Segment(nodes=leaves))
    for b, (layer, ids) in enumerate(runs):
        if layer is None:
            segments += _loops(stretch)
            stretch = []
            segments.append(Segment(nodes=tuple(ids)))
        else:
            stretch.append(by_run[b])
    segments += _loops(stretch)
    return Folding(tuple(segments))


def _runs(snapshot: Snapshot) -> list[tuple[int | None, list[int]]]:
    """Calls in order, cut where the layer changes; few strays inside a layer are counted to it."""
    runs: list[tuple[int | None, list[int]]] = []
    early = _shared_sizes(snapshot)
    if early:
        runs.append((None, list(early)))
    for n in snapshot:
        if n.op in LEAVES or n.id in early:
            continue
        layer = layer_of(n.module_path) if n.op != "output" else None
        if runs and runs[-1][0] == layer:
            runs[-1][1].append(n.id)
        else:
            runs.append((layer, [n.id]))
        # layer i, a short stray run, layer i again: one layer
        while len(runs) >= 3 and runs[-1][0] is not None and runs[-3][0] == runs[-1][0]:
            if len(runs[-2][1]) > len(runs[-3][1]):
                break
            tail, stray, head = runs.pop(), runs.pop(), runs.pop()
            runs.append((head[0], head[1] + stray[1] + tail[1]))
    merged: list[tuple[int | None, list[int]]] = []
    for k, (layer, ids) in enumerate(runs):
        between = (
            0 < k < len(runs) - 1 and merged and merged[-1][0] is not None and runs[k + 1][0] is not None
        )
        if layer is None and between:  # nodes of no module between two layers: the end of the first
            merged[-1][1].extend(ids)
        else:
            merged.append((layer, list(ids)))
    # an index that comes back later (a second stack, or strays) is not the same layer: the longest run is
    longest: dict[int, int] = {}
    for k, (layer, ids) in enumerate(merged):
        if layer is not None and (layer not in longest or len(ids) > len(merged[longest[layer]][1])):
            longest[layer] = k
    return [
        (layer if layer is not None and longest[layer] == k else None, ids)
        for k, (layer, ids) in enumerate(merged)
    ]


def _shared_sizes(snapshot: Snapshot) -> dict[int, None]:
    """Sizes computed from the inputs alone (``8 * B``) that several layers read.

    Export files them under the first layer that asks; they would make that layer unlike the others.
    """
    scalars = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    from_inputs: dict[int, None] = {}
    read_in: dict[int, set[int]] = {}
    for n in snapshot:
        for i in n.inputs():
            if n.layer is not None:
                read_in.setdefault(i, set()).add(n.layer)
        if n.op != "call_function" or not isinstance(n.val, scalars):
            continue
        if all(snapshot[i].op in LEAVES or i in from_inputs for i in n.inputs()):
            from_inputs[n.id] = None
    wanted: set[int] = set()
    for n in reversed(snapshot.nodes):
        shared = n.layer is not None and bool(read_in.get(n.id, set()) - {n.layer})
        if n.id in from_inputs and (shared or n.id in wanted):
            wanted.add(n.id)
            wanted.update(n.inputs())
    return dict.fromkeys(i for i in from_inputs if i in wanted)


@dataclass(slots=True)
class _Signed:
    run: int
    layer: int
    nodes: list[int]
    leaves: list[int]
    carries: list[int]
    signature: tuple[Any, ...]


def _sign(
    snapshot: Snapshot,
    run: int,
    previous: int | None,
    layer: int,
    ids: list[int],
    readers: dict[int, set[int | None]],
    block_of: dict[int, int],
) -> _Signed:
    place = {i: k for k, i in enumerate(ids)}
    leaves: dict[int, int] = {}
    carries: dict[int, int] = {}

    def ref(r: Ref) -> tuple[Any, ...]:
        if r.id in place:
            return ("here", place[r.id])
        n = snapshot[r.id]
        if n.op in LEAVES:
            numbered = n.op == "get_attr" or _DIGITS.search(n.target_name)
            if readers[r.id] == {run} and not numbered and previous is None:  # what the first layer starts on
                return ("carry", carries.setdefault(r.id, len(carries)))
            if readers[r.id] == {run} and numbered:
                leaves.setdefault(r.id, len(leaves))
                return ("own", _general(n, layer), _general_shape(n.shape))
            return ("shared", r.id)
        home = block_of.get(r.id)
        read_by = {b for b in readers[r.id] if b is not None}
        if (home is not None and home == previous and read_by <= {home, run}) or (
            previous is None and home is None and read_by == {run}
        ):
            return ("carry", carries.setdefault(r.id, len(carries)))
        return ("outer", r.id)

    rows = []
    for i in ids:
        n = snapshot[i]
        rows.append(
            (
                n.op,
                without_layer(n.target_name),
                _freeze(n.args, ref),
                _freeze(n.kwargs, ref),
                _general_shape(n.shape),
                n.dtype,
            )
        )
    return _Signed(run, layer, ids, list(leaves), list(carries), tuple(rows))


def _general(n: NodeRecord, layer: int) -> str:
    name = n.target_name
    return without_layer(name) if layer_of(name) == layer else _DIGITS.sub("*", name)


@lru_cache(maxsize=1 << 12)  # asked of every node, of a few shapes
def _general_shape(shape: tuple[Any, ...] | None) -> Any:
    return shape and tuple(d if isinstance(d, int) else _UNBACKED.sub("u", d) for d in shape)


def _freeze(value: Any, ref: Any) -> Any:
    if isinstance(value, Ref):
        return ref(value)
    if isinstance(value, (tuple, list)):
        return tuple([_freeze(v, ref) for v in value])
    if isinstance(value, dict):
        return tuple((k, _freeze(v, ref)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", *(_freeze(v, ref) for v in (value.start, value.stop, value.step)))
    # repr, so that 1, 1.0 and True stay apart and anything unhashable still compares
    return without_layer(value) if isinstance(value, str) else (type(value), repr(value))


def _loops(stretch: list[_Signed]) -> list[Segment]:
    """Adjacent layers as segments: contiguous equal layers are one loop; interleaved variants share one."""
    kinds: dict[tuple[Any, ...], int] = {}
    kind = [kinds.setdefault(s.signature, len(kinds)) for s in stretch]
    last = {k: at for at, k in enumerate(kind)}
    segments = []
    start = 0
    while start < len(stretch):
        stop = start
        end = last[kind[start]]
        while stop <= end:
            end = max(end, last[kind[stop]])
            stop += 1
        segments += _loop(stretch[start:stop], kind[start:stop])
        start = stop
    return segments


def _loop(blocks: list[_Signed], kind: list[int]) -> list[Segment]:
    carries = _carries(blocks, kind)
    if carries is None:  # equal layers, but not wired alike: no loop says that
        return [s for b, k in zip(blocks, kind, strict=True) for s in _loop([b], [k])]
    variants: dict[int, list[Block]] = {}
    for b, k in zip(blocks, kind, strict=True):
        variants.setdefault(k, []).append(Block(b.layer, tuple(b.nodes), tuple(b.leaves)))
    return [Segment(variants=tuple(Variant(tuple(v)) for v in variants.values()), carries=carries)]


def _carries(blocks: list[_Signed], kind: list[int]) -> tuple[tuple[int, ...], ...] | None:
    width = len(blocks[0].carries)
    if any(len(b.carries) != width for b in blocks):
        return None if len(blocks) > 1 else ()
    at: dict[tuple[int, int], int] = {}
    for k in range(1, len(blocks)):
        place = {i: p for p, i in enumerate(blocks[k - 1].nodes)}
        for n, i in enumerate(blocks[k].carries):
            if at.setdefault((kind[k - 1], n), place[i]) != place[i]:
                return None
    return tuple(tuple(b.carries[n] for b in blocks) for n in range(width))


__all__ = ["LEAVES", "Block", "Folding", "Segment", "Variant", "fold", "layers_text"]
