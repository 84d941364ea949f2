"""What stands in a hint's place on one rank: a function a hint op, from its arguments and the world alone.

Each function gets the hint, the world that counts for it (a world of one where its layer stays whole) and somewhere
to write (:class:`Writer`), and gives back the node that replaces the hint. It is called twice: once to learn which
parts of which weights are wanted, then to write. All ranks write the same nodes in the same order; only literals and
weights differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.contract import Cut, DistConfig, LocalWeight, ShardingError, nearest
from adkit.graph.matching import aten
from adkit.ops.hints import TP_MODES
from adkit.passes.sharding.op_kinds import stored
from adkit.passes.sharding.shares import Ranges, local_size, shares

ops: Any = torch.ops.adkit


@dataclass(frozen=True)
class Part:
    """What each rank has of an operand: its cuts, a rank after another; ``zero``: which ranks have zeros instead."""

    cuts: tuple[tuple[Cut, ...], ...]
    zero: tuple[bool, ...] = ()

    @property
    def whole(self) -> bool:
        """True when every rank has everything."""
        return not any(self.cuts) and not any(self.zero)

    @property
    def turned(self) -> Part:
        """The same part of a matrix that is stored the other way around."""
        return Part(tuple(tuple(Cut(1 - c.dim, c.ranges) for c in cuts) for cuts in self.cuts), self.zero)

    def of(self, name: str, rank: int) -> LocalWeight:
        """One rank's part of the weight ``name``."""
        return LocalWeight(name, self.cuts[rank], bool(self.zero) and self.zero[rank])


class Writer(Protocol):
    """Where a hint's replacement is written."""

    def cut(self, operand: Node | None, part: Part) -> Node | None:
        """This rank's part of an operand: another weight, or a slice of a computed value."""
        ...

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call in the hint's place."""
        ...


@dataclass(frozen=True)
class Strategies:
    """How sums and joins over ranks are to be made, as the exchanges carry it."""

    all_reduce: str = "AUTO"
    all_gather: str = "AUTO"


@dataclass(frozen=True)
class Hint:
    """One hint: its node, its arguments by name (defaults filled in), ``what`` for messages.

    ``overrides`` are arguments that the pass decided instead of the node's own.
    """

    node: Node
    values: dict[str, Any]
    what: str
    strategies: Strategies
    overrides: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def size(self, name: str, dim: int) -> int:
        """Elements of an operand along a dimension."""
        return int(self.values[name].meta["val"].shape[dim])

    def rank(self, name: str) -> int:
        """Dimensions of an operand."""
        return int(self.values[name].meta["val"].dim())


def bind(node: Node, strategies: Strategies, overrides: dict[str, Any] | None = None) -> Hint:
    """The hint behind a node."""
    values: dict[str, Any] = {}
    for i, a in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        here = not a.kwarg_only and i < len(node.args)
        values[a.name] = node.args[i] if here else node.kwargs.get(a.name, a.default_value)
    weight: Any = values.get("weight", values.get("gate_up", values.get("x")))
    read = stored(weight)
    what = node.name if read is None else f"{node.name} ({read.target})"
    return Hint(node, values | (overrides or {}), what, strategies, overrides or {})


# --- parts


def along(dim: int, ranges: Sequence[Ranges], size: int) -> list[tuple[Cut, ...]]:
    """The cut of each rank along one dimension; none where it holds all of it."""
    return [() if r == ((0, size),) else (Cut(dim, r),) for r in ranges]


def joined(*dims: list[tuple[Cut, ...]], zero: Sequence[bool] = ()) -> Part:
    """A part cut along several dimensions."""
    return Part(tuple(sum(cuts, ()) for cuts in zip(*dims, strict=True)), tuple(zero) if any(zero) else ())


def _features(h: Hint, name: str, dim: int, dist: DistConfig, copies: bool = True) -> list[tuple[Cut, ...]]:
    """A dense layer's operand cut along ``dim`` as the hint says."""
    size = h.size(name, dim)
    found = shares(
        size, dist.tp_size, blocks=h.values.get("output_sizes"), unit=h.values.get("tp_min_local_shape", 1),
        copies=copies, what=h.what,
    )  # fmt: skip
    return along(dim, found, size)


def _once(ranks: int, holder: Callable[[int], bool]) -> tuple[bool, ...]:
    """Zeros on every rank but those that add a bias."""
    return tuple(not holder(r) for r in range(ranks))


# --- hints


def linear(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """colwise: rows of the weight; rowwise: columns, the bias on rank 0 alone; gather: rows, and outputs are joined."""
    mode = h["tp_mode"]
    if mode not in TP_MODES:
        raise ShardingError(f"{h.what}: tp_mode={mode!r}{nearest(str(mode), TP_MODES)}")
    weight, bias = h["weight"], h["bias"]
    if mode in ("colwise", "gather"):
        # A joined output must have every piece once.
        cuts = _features(h, "weight", 0, dist, copies=mode == "colwise")
        weight, bias = out.cut(weight, joined(cuts)), out.cut(bias, joined(cuts))
    elif mode == "rowwise":
        weight = out.cut(weight, joined(_features(h, "weight", 1, dist, copies=False)))
        none: list[tuple[Cut, ...]] = [()] * dist.world_size
        bias = out.cut(bias, joined(none, zero=_once(dist.world_size, lambda r: r == 0)))
    result = out.call(ops.torch_linear_simple.default, h["input"], weight, *([] if bias is None else [bias]))
    if mode == "gather":
        return _gathered(result, -1, dist, h, out)
    return result


def _gathered(x: Node, dim: int, dist: DistConfig, h: Hint, out: Writer) -> Node:
    if dist.world_size == 1:
        return x
    if h.values.get("output_sizes") and len(h["output_sizes"]) > 1:
        raise ShardingError(
            f"{h.what}: tp_mode='gather' with {len(h['output_sizes'])} output_sizes would join the blocks in another "
            "order: give each block a linear of its own, or leave output_sizes out"
        )
    target = ops.torch_dist_all_gather.default
    return out.call(target, x, dim, dist.world_size, h.strategies.all_gather)


def view(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """The literal at ``tp_scaled_dim`` counts one rank's share."""
    shape, at = list(h["shape"]), h["tp_scaled_dim"]
    if at is not None:
        if not -len(shape) <= at < len(shape):
            raise ShardingError(f"{h.what}: tp_scaled_dim={at} is no dimension of a view of {len(shape)}")
        if isinstance(shape[at], int) and shape[at] != -1:
            shape[at] = local_size(shape[at], dist.tp_size, unit=h["tp_min_local_shape"], what=h.what)
    return out.call(aten.reshape.default, h["x"], shape)


def split_with_sizes(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """Each size counts one rank's share."""
    sizes = list(h["sizes"])
    if h["shardable"]:
        unit = h["tp_min_local_shape"]
        sizes = [
            local_size(n, dist.tp_size, unit=unit, what=h.what) if isinstance(n, int) else n for n in sizes
        ]
    return out.call(aten.split_with_sizes.default, h["x"], sizes, h["dim"])


def shard(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """The share itself."""
    cuts = _features(h, "x", h["dim"] % h.rank("x"), dist)
    return out.cut(h["x"], joined(cuts))  # type: ignore[return-value]


def embedding(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """Rows of the share of the vocabulary, zeros for ids of other shares."""
    if h["tp_mode"] not in ("vocab", "none"):
        raise ShardingError(
            f"{h.what}: tp_mode={h['tp_mode']!r}{nearest(str(h['tp_mode']), ('vocab', 'none'))}"
        )
    if h["tp_mode"] == "none" or dist.world_size == 1:
        return out.call(aten.embedding.default, h["weight"], h["ids"])
    size = h.size("weight", 0)
    found = shares(size, dist.world_size, copies=False, what=f"the vocabulary of {h.what}")
    weight = out.cut(h["weight"], joined(along(0, found, size)))
    return out.call(ops.torch_vocab_embedding.default, weight, h["ids"], found[dist.rank][0][0])


def rmsnorm(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """A norm whose rows are cut; its weight too, unless a ``shard`` hint has done that."""
    rest = (h["eps"], h["weight_offset"], h["weight_in_float"])
    if dist.world_size == 1:
        return out.call(ops.torch_rmsnorm.default, h["input"], h["weight"], *rest)
    weight = h["weight"]
    if isinstance(weight, Node) and weight.target is not ops.shard.default:
        size = h.size("weight", 0)
        weight = out.cut(weight, joined(along(0, shares(size, dist.tp_size, what=h.what), size)))
    target = ops.torch_dist_sharded_rmsnorm.default
    strategy = h.strategies.all_reduce
    return out.call(target, h["input"], weight, *rest, world=dist.world_size, strategy=strategy)


def all_reduce(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """The sum over ranks."""
    if dist.world_size == 1:
        return h["x"]
    return out.call(ops.torch_dist_all_reduce.default, h["x"], h.strategies.all_reduce)


def all_gather(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """The pieces of all ranks."""
    if dist.world_size == 1:
        return h["x"]
    target = ops.torch_dist_all_gather.default
    return out.call(target, h["x"], h["dim"], dist.world_size, h.strategies.all_gather)


def reduce_scatter(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """The sum over ranks, of which each keeps its piece."""
    if dist.world_size == 1:
        return h["x"]
    target = ops.torch_dist_reduce_scatter.default
    return out.call(target, h["x"], h["dim"], dist.world_size, h.strategies.all_reduce)


def moe(h: Hint, dist: DistConfig, out: Writer) -> Node:
    """Experts dealt to ``moe_ep_size`` groups of ranks, each expert's hidden features cut over the rest.

    An id of another rank's expert becomes one of no expert. ``down_bias`` is added by the first rank that has it.
    With attention data parallelism every rank has tokens of its own: all are gathered, and each rank gets its own back.
    """
    names = ("hidden", "topk_ids", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias")
    given = {name: h[name] for name in names}
    keep = ("act", "transposed", "interleaved", "gated", "alpha", "limit", "up_offset")
    kwargs = {
        k: h[k] for k in keep if k in h.node.kwargs
    }  # what the hint's writer said, defaults left to the op
    ranks = [dist.at(r) for r in range(dist.world_size)]
    if not h["shardable"]:
        ranks = [DistConfig.of()]
    if len(ranks) > 1:
        count, hidden_dim = h.size("gate_up", 0), 1 if h["transposed"] else 2
        dealt = shares(count, dist.moe_ep_size, copies=False, what=f"the experts of {h.what}")
        experts = along(0, [dealt[d.moe_ep_rank] for d in ranks], count)
        up_dim, width = (2 if h["transposed"] else 1), h.size("down", hidden_dim)

        def features(dim: int, factor: int) -> list[tuple[Cut, ...]]:
            """The hidden features of an expert along a dimension: gate and up after one another, or in pairs."""
            pairs = factor == 2 and h["interleaved"]
            blocks = [width] * factor if factor == 2 and not pairs else None
            found = shares(
                width * factor, dist.moe_tp_size, blocks=blocks, unit=2 if pairs else 1, copies=False,
                what=f"the hidden features of the experts of {h.what}",
            )  # fmt: skip
            return along(dim, [found[d.moe_tp_rank] for d in ranks], width * factor)

        factor = 2 if h["gated"] else 1
        given["gate_up"] = out.cut(given["gate_up"], joined(experts, features(up_dim, factor)))
        given["down"] = out.cut(given["down"], joined(experts, features(hidden_dim, 1)))
        given["gate_up_bias"] = out.cut(given["gate_up_bias"], joined(experts, features(1, factor)))
        first = [d.moe_tp_rank != 0 for d in ranks]
        given["down_bias"] = out.cut(given["down_bias"], joined(experts, zero=first))
        if dist.enable_attention_dp:
            gather = ops.torch_dist_all_gather.default
            for name in ("hidden", "topk_ids", "topk_weights"):
                given[name] = out.call(gather, given[name], 0, dist.world_size, h.strategies.all_gather)
        if dist.moe_ep_size > 1:
            (start, stop) = dealt[dist.moe_ep_rank][0]
            target = ops.torch_moe_local_ids.default
            given["topk_ids"] = out.call(target, given["topk_ids"], start, stop - start)
    args = [given[name] for name in names]
    while args[-1] is None:
        args.pop()
    result = out.call(ops.torch_moe.default, *args, **kwargs)
    if len(ranks) > 1 and dist.enable_attention_dp:
        scatter = ops.torch_dist_reduce_scatter.default
        result = out.call(scatter, result, 0, dist.world_size, h.strategies.all_reduce)
    return result


#: What is written for each op that carries hints.
LOCAL_CALLS: dict[Any, Callable[[Hint, DistConfig, Writer], Node]] = {
    ops.torch_linear_simple.default: linear,
    ops.torch_moe.default: moe,
    ops.view.default: view,
    ops.split_with_sizes.default: split_with_sizes,
    ops.shard.default: shard,
    ops.embedding.default: embedding,
    ops.rmsnorm.default: rmsnorm,
    ops.all_reduce.default: all_reduce,
    ops.all_gather.default: all_gather,
    ops.reduce_scatter.default: reduce_scatter,
}
