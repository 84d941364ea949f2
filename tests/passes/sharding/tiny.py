"""Tiny models as canonical graphs, planned, hinted and cut over ranks."""

from __future__ import annotations

import copy
from functools import cache
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.fx import Graph, GraphModule

from adkit.contract import DistConfig, EngineConfig
from adkit.graph.edit import clean
from adkit.graph.identity import identities
from adkit.graph.placement import PLAN, PlanRow, ShardingPlan
from adkit.graph.step import PassInfo
from adkit.passes import Context, get_pass
from adkit.sharding.lockstep import Together
from tests.passes.graphs import inputs_for, tiny_graph

VOCAB = 136  # eight ranks can share it


@cache
def _canonical(kind: str, overrides: tuple[tuple[str, Any], ...]) -> GraphModule:
    gm = tiny_graph(kind, **{"vocab_size": VOCAB, **dict(overrides)})
    passes = yaml.safe_load((files("adkit.passes") / "default.yaml").read_text())["transforms"]
    for key, fields in passes.items():
        if fields["stage"] == "pattern_matcher" and fields.get("enabled", True):
            run(gm, key, DistConfig.of())
    return gm


def canonical(kind: str, **overrides: Any) -> GraphModule:
    """A tiny model of a type after the pattern matchers; a graph of its own over shared weights."""
    return duplicate(_canonical(kind, tuple(sorted(overrides.items()))))


def duplicate(gm: GraphModule) -> GraphModule:
    """Another graph over the same weights, nodes with the same ids."""
    graph, nodes = Graph(), {}  # type: ignore[var-annotated]
    graph.output(graph.graph_copy(gm.graph, nodes))
    new = GraphModule(gm, graph)
    new.meta.update({k: copy.copy(v) for k, v in gm.meta.items() if k != "adkit_ids"})
    identities(new).next_id = identities(gm).next_id
    identities(new).adopt(new.graph)
    return new


def run(gm: GraphModule, key: str, dist: DistConfig, **config: Any) -> PassInfo:
    """Run one pass as the pipeline does; the graph must hold together."""
    context = Context(factory=None, engine=EngineConfig(), device=torch.device("cpu"), dist=dist)
    info = get_pass(key)(config).apply(gm, context)
    clean(gm)
    gm.graph.lint()
    gm.recompile()
    identities(gm).settle(gm.graph)
    return info


def planned(gm: GraphModule, dist: DistConfig | int = 2, **config: Any) -> ShardingPlan:
    """The plan that detect_sharding makes; it stands in ``gm.meta``."""
    run(gm, "detect_sharding", DistConfig.of(tp=dist) if isinstance(dist, int) else dist, **config)
    plan: ShardingPlan = gm.meta[PLAN]
    return plan


def hinted(gm: GraphModule, dist: DistConfig | int = 2, **config: Any) -> GraphModule:
    """The graph with the plan's hints in it."""
    dist = DistConfig.of(tp=dist) if isinstance(dist, int) else dist
    planned(gm, dist, **config)
    run(gm, "sharding_transform_executor", dist)
    return gm


def logits(gm: GraphModule) -> Tensor:
    """The model's output on fixed tokens."""
    with torch.no_grad():
        return gm(**inputs_for(gm, 2, 9, VOCAB))[0]


def logits_on_ranks(gm: GraphModule, dist: DistConfig) -> list[Tensor]:
    """Every rank's output of a hinted graph, run together."""
    ranks = []
    for rank in range(dist.world_size):
        ranks.append(duplicate(gm))
        run(ranks[-1], "apply_sharding_hints", dist.at(rank))
    feed = inputs_for(gm, 2, 9, VOCAB)
    with torch.no_grad():
        return [out[0] for out in Together(ranks).run([feed] * dist.world_size)]


def short(row: PlanRow) -> str:
    """``self_attn.q_proj``: a row's module below its layer."""
    return row.module.split("layers.0.")[-1]
