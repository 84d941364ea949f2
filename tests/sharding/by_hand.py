"""A block of a transformer cut by hand, so that running and comparing ranks is tested without the passes that cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from adkit.graph.identity import Tag, identities, set_tag
from adkit.graph.placement import ShardingPlan
from adkit.graph.snapshot import Snapshot, take
from adkit.sharding.agreement import Agreement
from adkit.sharding.lockstep import RankFails, Together

ops: Any = torch.ops.adkit
aten: Any = torch.ops.aten
N, K, H, D, F, V = 8, 4, 6, 32, 48, 40


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Whole weights of the block."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "embed": (V, D), "norm": (D,), "q": (N * H, D), "q_norm": (N * H,), "k": (K * H, D), "v": (K * H, D),
        "o": (D, N * H), "gate": (F, D), "up": (F, D), "down": (D, F),
    }  # fmt: skip
    return {n: torch.randn(s, generator=g) / (s[-1] ** 0.5 if len(s) > 1 else 1.0) for n, s in shapes.items()}


def rank_weights(whole: dict[str, Tensor], rank: int, tp: int) -> dict[str, Tensor]:
    """One rank's parts: features of q, gate, up and their readers' inputs; kv heads copied where they are too few."""
    part = dict(whole)
    for name in ("q", "q_norm", "gate", "up"):
        part[name] = whole[name].chunk(tp)[rank]
    for name in ("o", "down"):
        part[name] = whole[name].chunk(tp, 1)[rank]
    copies = max(1, tp // K)
    for name in ("k", "v"):
        part[name] = whole[name].chunk(min(tp, K))[rank // copies]
    part["embed"] = whole["embed"].chunk(tp)[rank]
    return part


def build(
    w: dict[str, Tensor], heads: int = N, rank: int = 0, tp: int = 1, offset: int | None = None
) -> GraphModule:
    """The block over these weights: whole, or (``tp`` > 1) one rank's, with its collectives."""
    holder = torch.nn.Module()
    graph = Graph()
    ids = graph.create_node("placeholder", "input_ids", name="input_ids")

    def get(name: str) -> Any:
        holder.register_buffer(name, w[name].contiguous())
        return graph.create_node("get_attr", name, name=f"w_{name}")

    def call(name: str, op: Any, *args: Any, **kwargs: Any) -> Any:
        return graph.create_node("call_function", op, args, kwargs, name=name)

    def summed(name: str, x: Any) -> Any:
        return x if tp == 1 else call(f"{name}_sum", ops.torch_dist_all_reduce.default, x)

    if tp == 1:
        h = call("embedding", aten.embedding.default, get("embed"), ids)
    else:
        rows = V // tp
        start = rank * rows if offset is None else offset
        local = call("embedding_ids", aten.sub.Tensor, ids, start)
        mine = call("embedding_mine", aten.lt.Scalar, call("embedding_at", aten.abs.default, local), rows)
        kept = call("embedding_kept", aten.clamp.default, local, 0, rows - 1)
        same = call("embedding_same", aten.eq.Tensor, kept, local)
        both = call("embedding_both", aten.logical_and.default, mine, same)
        picked = call("embedding_rows", aten.embedding.default, get("embed"), kept)
        masked = call(
            "embedding", aten.mul.Tensor, picked, call("embedding_mask", aten.unsqueeze.default, both, -1)
        )
        h = summed("embedding", masked)
    x = call("norm", ops.torch_rmsnorm.default, h, get("norm"), 1e-6)
    q = call("q_proj", ops.torch_linear_simple.default, x, get("q"))
    if tp == 1:
        q = call("q_norm", ops.torch_rmsnorm.default, q, get("q_norm"), 1e-6)
    else:
        q = call("q_norm", ops.torch_dist_sharded_rmsnorm.default, q, get("q_norm"), 1e-6, world=tp)
    q = call("q_view", aten.view.default, q, [2, -1, heads, H])
    kv = [call(f"{n}_proj", ops.torch_linear_simple.default, x, get(n)) for n in "kv"]
    k, v = (call(f"{n}_view", aten.unflatten.int, t, -1, [-1, H]) for n, t in zip("kv", kv, strict=True))
    a = call("attention", ops.torch_attention.default, q, k, v)
    flat = call("flat", aten.flatten.using_ints, a, 2)
    o = summed("o_proj", call("o_proj", ops.torch_linear_simple.default, flat, get("o")))
    h = call("add", aten.add.Tensor, h, o)
    gate, up = (call(f"{n}_proj", ops.torch_linear_simple.default, h, get(n)) for n in ("gate", "up"))
    act = call("swiglu", ops.torch_swiglu.default, gate, up)
    down = summed("down_proj", call("down_proj", ops.torch_linear_simple.default, act, get("down")))
    out = call("out", aten.add.Tensor, h, down)
    graph.output((out,))
    return GraphModule(holder, graph)


class World:
    """The block whole and on ranks, each node with the identity that a pass would give it."""

    def __init__(self, tp: int, change: Callable[[GraphModule, int], None] | None = None, **how: Any) -> None:
        self.tp = tp
        w = weights()
        self.whole = build(w)
        place = {n.name: i for i, n in enumerate(self.whole.graph.nodes)}
        self.ranks = []
        for r in range(tp):
            gm = build(rank_weights(w, r, tp), N // tp, r, tp, **{k: f(r) for k, f in how.items()})
            if change is not None:
                change(gm, r)
            self.ranks.append(gm)
        for gm in (self.whole, *self.ranks):
            for i, n in enumerate(gm.graph.nodes):
                stem = n.name.split("_sum")[0]
                stem = "embedding" if n.name.startswith("embedding_") else stem
                made = n.name not in place
                set_tag(
                    n,
                    Tag(1000 + i, (place[stem],))
                    if made and stem in place
                    else Tag(place.get(n.name, 1000 + i)),
                )
            identities(gm).adopt(gm.graph)

    def snapshots(self) -> tuple[Snapshot, Snapshot]:
        return take(self.whole), take(self.ranks[0])

    def agreement(self) -> Agreement:
        """Both run on the same tokens and compared."""
        whole, ranks = self.snapshots()
        found = Agreement(whole, [], ranks, ShardingPlan(tp=self.tp), 1e-5)
        ids = torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(1))
        feed = {"input_ids": ids}
        self.expected = Together([self.whole]).run([feed], on_call=found.keep)[0][0]
        try:
            self.found = [o[0] for o in Together(self.ranks).run([feed] * self.tp, on_call=found.look)]
        except RankFails as error:
            found.failed(error)
        return found
