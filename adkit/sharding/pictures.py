"""Pictures of virtual ranks: ``v.plots``, a rank's layer with its cuts told, placements as an overlay.

How they look is :mod:`adkit.viz.mesh`' and :mod:`adkit.viz.dot`'s matter; here the data is collected.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adkit.contract import ConfigError
from adkit.graph.cost import Device, device_named
from adkit.graph.folding import layers_text
from adkit.graph.placement import PARTIAL, REPLICATED, Placement, ShardingPlan, cut
from adkit.graph.snapshot import NodeRecord, Snapshot
from adkit.graph.times import duration
from adkit.models.memory import human
from adkit.ops.dist import over_ranks
from adkit.sharding.agreement import counterparts
from adkit.sharding.comm import NVLINK4, Link
from adkit.viz import draw, mesh
from adkit.viz.dot import Drawing
from adkit.viz.plots import Plot

if TYPE_CHECKING:
    from adkit.sharding.comm import Comm
    from adkit.sharding.virtual import VirtualRanks


class MeshPlots:
    """Figures of virtual ranks; each is a matplotlib Figure (``layer``: a Drawing) that shows itself."""

    def __init__(self, v: VirtualRanks) -> None:
        self._v = v

    def mesh(self, layer: int | None = 0) -> Plot:
        """Which rank holds which slice of which weight of a layer (None: of what is outside of layers)."""
        v = self._v
        tensors = held_slices(v, layer)
        if not tensors:
            known = tuple(sorted({n.layer for n in v.whole if n.layer is not None}))
            raise ConfigError(f"no weights in layer {layer}; this model has {layers_text(known)}")
        where = "outside of layers" if layer is None else f"layer {layer}"
        return mesh.mesh(tensors, len(v.ranks), f"{v.wb.name}: who holds what, {where}, {len(v.ranks)} ranks")

    def memory(
        self, device: Device | str | Iterable[Device | str] = "H100 SXM", *, cache: bool = True
    ) -> Plot:
        """Bytes a rank by kind, against devices' memory and the fair share; ``cache``: with a full KV cache."""
        given = [device] if isinstance(device, Device | str) else list(device)
        devices = [_device(d) for d in given]
        rows = []
        for rank in self._v.ranks:
            m = rank.memory
            rows.append({**m.by_kind, **({"cache": m.cache} if cache else {})})
        total = self._v.ranks[0].memory.total
        limits = {d.name: d.memory for d in devices if d.memory}
        return mesh.memory_by_rank(rows, total, limits, f"{self._v.wb.name}: memory a rank")

    def comm(self, tokens: int = 1, sequences: int = 1) -> Plot:
        """What ranks say in one step of so many tokens, a bar for layers alike: bytes each sends, estimated time."""
        c = self._v.comm
        step = "a decode step" if tokens == sequences == 1 else f"{tokens:,} tokens"
        total = f"{human(c.sent(tokens, sequences))}, {duration(c.seconds(tokens, sequences))}"
        title = f"Communication among {c.world} ranks, {step}\nEach sends {total} on {c.link.name}"
        return mesh.comm_by_layer(_by_layer(c, tokens, sequences), title)

    def scaling(
        self,
        tps: Sequence[int] = (1, 2, 4, 8),
        device: Device | str = "H100 SXM",
        *,
        batch: int = 32,
        context: int = 1024,
        link: Link = NVLINK4,
        table: Any = None,
    ) -> Plot:
        """Estimated tokens/s over ranks beside the ideal; ``table``: one that ``v.scaling()`` made already."""
        found = (
            self._v.scaling(tps, device, batch=batch, context=context, link=link) if table is None else table
        )
        on, over, length = (found.attrs[k] for k in ("device", "link", "context"))
        where = f"{on.name}, {over.name}, {length:,} tokens of context"
        return mesh.scaling(found, f"{self._v.wb.name}: decode, estimated ({where})")

    def layer(self, layer: int = 0, rank: int = 0, **options: Any) -> Drawing:
        """A rank's graph of one layer: each box tells how its value is held; options as ``wb.graph.draw`` takes."""
        v = self._v
        graph = v.ranks[rank].graph
        title = f"layer {layer} on rank {rank} of {len(v.ranks)}"
        return draw(graph, layer=layer, title=title, notes=notes(v, graph), **options)

    def __repr__(self) -> str:
        rows = []
        for name, method in vars(type(self)).items():
            if not name.startswith("_"):
                told = (inspect.getdoc(method) or "").splitlines()[0].replace("``", "")
                rows.append(f"v.plots.{name + '()':<12} {told}")
        return "\n".join(rows)


def held_slices(v: VirtualRanks, layer: int | None) -> list[mesh.Tensor]:
    """What ranks hold of each weight that a layer reads, in the graph's order."""
    decisions = {w: r.decision for r in v.plan for w in r.weights}
    locals_ = [{w.name: w for w in rank.local.values()} for rank in v.ranks]
    found = []
    for n in v.whole:
        if n.op != "get_attr" or n.layer != layer or n.shape is None or n.target not in v.wb.factory.tensors:
            continue
        held: dict[tuple[Any, ...], list[int]] = {}
        for r, mine in enumerate(locals_):
            recipe = mine.get(n.target)
            if recipe is None or not recipe.zero:
                held.setdefault(tuple((c.dim, c.ranges) for c in recipe.cuts) if recipe else (), []).append(r)
        slices = tuple(mesh.Slice(tuple(ranks), dict(cuts)) for cuts, ranks in held.items())
        name = ".".join(
            n.target.removesuffix(".weight").split(".")[-2 if n.target.endswith(".bias") else -1 :]
        )
        shape = tuple(int(d) for d in n.shape)
        lacking = len(v.ranks) - sum(len(s.ranks) for s in slices)  # a bias that is added once
        note = decisions.get(n.target, "") if not lacking else "zeros elsewhere"
        found.append(mesh.Tensor(name, shape, slices, note))
    return found


def placements(v: VirtualRanks, graph: Snapshot) -> dict[int, Placement]:
    """How ranks hold each value of a rank's graph, by node id, read off shapes and the plan (``v.check()`` proves it).

    A value whose counterpart in the uncut graph is larger along one dimension is cut there; a term is what the plan
    sums, until an op over ranks has added it up. Where ranks have sequences of their own values are pieces of the
    batch, but between a gather of tokens and the op that scatters their sum.
    """
    pairs = counterparts(v.whole, [v.hinted], graph)
    apart = v.dist.pools > 1
    found: dict[int, Placement] = {n.id: cut(0) for n in graph if n.op == "placeholder" and apart}
    terms = _terms(v.plan, v.hinted)
    everyones: set[int] = set()  # values of the tokens of all ranks, where each has its own
    for n in graph:
        if n.op != "call_function":
            continue
        if apart and "reduce_scatter" in n.target_name:
            found[n.id] = cut(0)
            continue
        if apart and not over_ranks(n.target) and not everyones.intersection(n.inputs()):
            found[n.id] = cut(0) if any(found.get(i) == cut(0) for i in n.inputs()) else REPLICATED
            continue
        everyones.add(n.id)
        reads_terms = any(found.get(i) == PARTIAL for i in n.inputs())
        if over_ranks(n.target):
            found[n.id] = REPLICATED
        elif n.id in terms or any(o in terms for o in n.origins) or reads_terms:
            if n.val is None or n.val.dtype.is_floating_point:  # not the ids of a rank's own experts
                found[n.id] = PARTIAL
        else:
            wholes = pairs[n.id].ids if n.id in pairs else ()
            known = [p for w in reversed(wholes) if (p := _cut_of(n, v.whole[w]))]
            if n.shape is None:  # several values, each as what they are made of
                known = [p for i in n.inputs() if (p := found.get(i, REPLICATED)) != REPLICATED]
            found[n.id] = known[0] if known else REPLICATED
    return {i: p for i, p in found.items() if graph[i].op == "call_function"}


def notes(v: VirtualRanks, graph: Snapshot) -> dict[int, str]:
    """What a picture of a rank's graph tells of each node: the plan's decision, and how ranks hold its value."""
    held = placements(v, graph)
    rows = {r.node: r for r in v.plan}
    sent = {c.id: human(c.token_bytes) for c in v.comm}
    parents = {n.id: n.origins for n in v.hinted}
    found = {}
    for i, p in held.items():
        if i in sent:
            found[i] = f"{sent[i]} a token"
            continue
        roots = [i, *graph[i].origins, *(o for j in graph[i].origins for o in parents.get(j, ()))]
        row = next((rows[j] for j in roots if j in rows), None)
        decision = "" if row is None or row.decision in ("follow", "whole") else f"{row.decision}, "
        found[i] = f"{decision}{p}"
    return found


def overlay(v: VirtualRanks, graph: Snapshot) -> Mapping[int, str]:
    """Placements as words for the explorer, exchanges by their kind."""
    kinds = {c.id: c.kind for c in v.comm}
    return {i: kinds.get(i, str(p)) for i, p in placements(v, graph).items()}


def _terms(plan: ShardingPlan, hinted: Snapshot) -> set[int]:
    """Ids of the nodes where terms of a sum begin, in the uncut and in the hinted graph."""
    terms = {r.node for r in plan if r.placement == PARTIAL}
    return terms | {n.id for n in hinted if any(o in terms for o in n.origins) and not over_ranks(n.target)}


def _cut_of(n: NodeRecord, whole: NodeRecord) -> Placement | None:
    """A cut along the one dimension in which a value is smaller than its counterpart."""
    if n.shape is None or whole.shape is None or len(n.shape) != len(whole.shape):
        return None
    pairs = enumerate(zip(n.shape, whole.shape, strict=True))
    dims = [d for d, (a, b) in pairs if isinstance(a, int) and isinstance(b, int) and a < b]
    return cut(dims[0]) if len(dims) == 1 else None


def _by_layer(c: Comm, tokens: int, sequences: int) -> list[tuple[str, float, float, float]]:
    """(name, bytes, us of latency, us of bytes) a place; layers that say the same are one row."""
    places: dict[Any, list[Any]] = {}
    for one in c:
        places.setdefault(one.module.split(".")[-1] if one.layer is None else one.layer, []).append(one)
    rows: dict[tuple[float, float, float], list[Any]] = {}
    for place, said in places.items():
        sent = sum(s.sent(tokens, sequences) for s in said)
        fact = (sent, 1e6 * c.link.latency * len(said), 1e6 * sent / c.link.bandwidth)
        key: Any = (*fact, isinstance(place, int), "" if isinstance(place, int) else place)
        rows.setdefault(key, []).append(place)
    found = []
    for key, alike in rows.items():
        name = f"layer {alike[0]}" if isinstance(alike[0], int) else alike[0] or "outside"
        if len(alike) > 1:
            name = f"each of {len(alike)} layers"
        found.append((name, *key[:3]))
    return found


def _device(given: Device | str) -> Device:
    try:
        return device_named(given)
    except ValueError as error:
        raise ConfigError(str(error)) from None


__all__ = ["MeshPlots", "held_slices", "notes", "overlay", "placements"]
