"""What one rank keeps in memory, against its fair share of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adkit.contract import CacheSpec, DistConfig, EngineConfig, LocalWeight
from adkit.graph.display import mimebundle
from adkit.graph.placement import PlanRow, ShardingPlan
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot
from adkit.models.memory import human
from adkit.ops.mixers import MIXERS

#: What layers are called in ``RankMemory.by_kind``; weights of no cut layer go by the op that reads them.
KINDS = {"mha": "attention", "mla": "attention", "mlp": "mlp", "moe": "experts", "vocab": "vocabulary"}


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank holds.

    ``weights``: parameters and buffers its graph reads; ``by_kind`` splits them (attention, mlp, experts, router,
    vocabulary, norm, other); ``replicated`` of them are whole on every rank. ``total``: the uncut model's weights;
    ``cache_per_token``: keys and values of one token over all layers; ``cache``: ``max_batch_size`` sequences of
    ``max_seq_len``.
    """

    rank: int
    world: int
    weights: int
    total: int
    replicated: int
    by_kind: Mapping[str, int] = field(default_factory=dict)
    whole_by_kind: Mapping[str, int] = field(default_factory=dict)
    cache_per_token: float = 0.0
    cache: int = 0

    @property
    def share(self) -> float:
        """Weights over the fair share total / world: 1 is perfect, ``world`` is no sharding at all."""
        return self.weights * self.world / self.total if self.total else 1.0

    def fraction(self, kind: str) -> float:
        """Of the uncut model's weights of a kind, how much is here: ``memory.fraction("experts")``."""
        whole = self.whole_by_kind.get(kind, 0)
        return self.by_kind.get(kind, 0) / whole if whole else 0.0

    def table(self) -> Any:
        """By kind, as a pandas DataFrame: bytes here, bytes of the uncut model, the fraction held here."""
        import pandas as pd

        rows = {k: (n, self.whole_by_kind[k], n / self.whole_by_kind[k]) for k, n in self.by_kind.items()}
        rows["all"] = (self.weights, self.total, self.weights / self.total if self.total else 1.0)
        return pd.DataFrame.from_dict(rows, orient="index", columns=["bytes", "whole bytes", "fraction"])

    def __repr__(self) -> str:
        kinds = ", ".join(f"{human(n)} {k}" for k, n in self.by_kind.items())
        return (
            f"rank {self.rank} of {self.world}: {human(self.weights)} of {human(self.total)} weights "
            f"({self.share:.3f} x a fair share, {human(self.replicated)} on every rank: {kinds}); "
            f"{human(self.cache_per_token)} cache a token, {human(self.cache)} at full batch and length"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


def rank_memory(
    graph: Snapshot, whole: Snapshot, plan: ShardingPlan, engine: EngineConfig, dist: DistConfig,
    local: Mapping[str, LocalWeight], tied: Mapping[str, str],
) -> RankMemory:  # fmt: skip
    """Count one rank's graph; ``whole`` is the uncut one, ``local`` the recipes of its cut weights by name, ``tied``
    maps names to those whose tensor they share."""
    kinds = weight_kinds(whole, plan)
    mine: dict[str, int] = {}
    replicated = 0
    seen: set[Any] = set()
    for name, size in weight_sizes(graph).items():
        recipe = local.get(name)
        full = recipe.name if recipe is not None else name
        tensor = (tied.get(full, full), recipe.cuts if recipe is not None else ())
        if tensor in seen:
            continue
        seen.add(tensor)
        kind = kinds.get(full, "other")
        mine[kind] = mine.get(kind, 0) + size
        replicated += size if recipe is None else 0
    all_of: dict[str, int] = {}
    for name, size in weight_sizes(whole).items():
        if tied.get(name, name) == name or tied[name] not in kinds:
            all_of[kinds[name]] = all_of.get(kinds[name], 0) + size
    per_token = cache_bytes_per_token(graph, engine.page_size)
    return RankMemory(
        rank=dist.rank,
        world=dist.world_size,
        weights=sum(mine.values()),
        total=sum(all_of.values()),
        replicated=replicated,
        by_kind=dict(sorted(mine.items(), key=lambda kv: -kv[1])),
        whole_by_kind={**dict.fromkeys(mine, 0), **all_of},
        cache_per_token=per_token,
        cache=int(per_token * _cached_tokens(engine)),
    )


def weight_sizes(graph: Snapshot) -> dict[str, int]:
    """Bytes of each tensor that the graph reads, by name."""
    return {
        n.target: n.val.numel() * n.val.dtype.itemsize
        for n in graph
        if n.op == "get_attr" and n.val is not None
    }


def weight_kinds(whole: Snapshot, plan: ShardingPlan) -> dict[str, str]:
    """What each weight is for: from the plan, else from the op that reads it."""
    kinds = {w: _of_row(r) for r in plan for w in r.weights if r.layer_type in KINDS}
    readers = whole.users()
    for n in whole:
        if n.op == "get_attr" and n.target not in kinds:
            ops = [whole[i].target_name for i in readers[n.id]]
            kinds[n.target] = next((k for o in ops for k in _of_op(o)), "other")
    return kinds


def _of_row(row: PlanRow) -> str:
    """What a row's weights are for; linears beside experts are routers (whole) or shared experts."""
    if row.layer_type != "moe" or "linear" not in row.op:
        return KINDS[row.layer_type]
    return "router" if row.decision == "whole" else "mlp"


def _of_op(op: str) -> list[str]:
    names = {
        "norm": "norm",
        "topk": "router",
        "moe": "experts",
        "embedding": "vocabulary",
        "attention": "attention",
    }
    return [kind for part, kind in names.items() if part in op]


def cache_bytes_per_token(graph: Snapshot, page_size: int) -> float:
    """Bytes that every mixer's cache takes for a token (before caches are inserted)."""
    specs = [s for n in graph if n.target in MIXERS for s in _specs(n, graph, page_size)]
    return sum(s.bytes_per_page for s in specs) / page_size


def _specs(n: NodeRecord, graph: Snapshot, page_size: int) -> tuple[CacheSpec, ...]:
    mixer = MIXERS[n.target]
    names = [a.name for a in n.target._schema.arguments]
    given = {**dict(zip(names, n.args, strict=False)), **n.kwargs}
    values = {k: graph[v.id].val if isinstance(v, Ref) else v for k, v in given.items()}
    return mixer.cache_specs(values, page_size, values["key"].dtype, n.name)


def _cached_tokens(engine: EngineConfig) -> int:
    pages = -(-engine.max_seq_len // engine.page_size)
    return engine.max_batch_size * pages * engine.page_size
