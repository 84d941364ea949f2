"""Tiny sensitive models with enough heads and experts to cut, and mistakes to make in their ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node
from transformers import AutoConfig

import adkit
from adkit.graph.step import PassInfo
from adkit.passes import Context, Pass, Stage
from adkit.sharding import VirtualRanks
from tests.zoo import tiny

#: The types that sharding is proved for (issue 4).
TYPES = (
    "llama", "qwen3", "gemma2", "phi3", "gpt_oss", "mixtral", "qwen3_moe", "cohere2", "olmo2", "glm4",
)  # fmt: skip
MOE_TYPES = ("gpt_oss", "mixtral", "qwen3_moe")

_SIZES: dict[str, Any] = {
    "vocab_size": 144,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts": 8,
    "moe_intermediate_size": 48,
}


def saved(folder: Path, kind: str, **more: Any) -> Path:
    """A checkpoint of a tiny model of the type in ``folder``; 8 query heads, 2 kv heads, 8 experts."""
    default = AutoConfig.for_model(kind)
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    path = folder / kind
    if not path.exists():
        tiny(kind, **{k: v for k, v in _SIZES.items() if k in known}, **more)[1].save_pretrained(path)
    return path


def bench(path: Path, **options: Any) -> adkit.Workbench:
    """A Workbench on a checkpoint, before sharding."""
    wb = adkit.Workbench(path, device="cpu", max_seq_len=64, page_size=4, progress=False, **options)
    return wb.run(until="pattern_matcher")


class Change(Pass):
    """A mistake made on purpose, on every rank."""

    key = "change"
    stage = Stage.SHARDING

    def __init__(self, change: Callable[[GraphModule, int], None]) -> None:
        super().__init__()
        self.change = change

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        self.change(gm, ctx.dist.rank)
        return PassInfo(num_matches=1)


def mutated(v: VirtualRanks, change: Callable[[GraphModule, int], None]) -> VirtualRanks:
    """The same world after ``change(graph module, rank)`` was made to every rank."""
    for rank in v.ranks:
        rank.wb.insert(Change(change), after="apply_sharding_hints")
        rank.wb.run(until="change")
    return v


def nodes(gm: GraphModule, target: Any, module: str = "") -> list[Node]:
    """Calls of ``target`` that read a weight of ``module`` or stand in it."""
    found = []
    for n in gm.graph.nodes:
        if n.target is target:
            weights = [str(a.target) for a in n.all_input_nodes if a.op == "get_attr"]
            stack = n.meta.get("nn_module_stack") or {}
            places = [str(place[0]) for place in stack.values()]
            if not module or any(module in t for t in (*weights, *places)):
                found.append(n)
    return found
