"""``sharding_transform_executor``: the plan, written into the graph as hints."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, cast

from torch.fx import GraphModule, Node

from adkit.contract import ShardingError
from adkit.graph.edit import Site
from adkit.graph.identity import tag_of
from adkit.graph.matching import arg, aten, dtype_of, same_shape
from adkit.graph.placement import PLAN, Decision, PlanRow, ShardingPlan
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register
from adkit.passes.sharding.layout_rules import PICKS, slice_bounds, slice_dim
from adkit.passes.sharding.op_kinds import EMBEDDING, LINEAR, MOE, adkit_ops, name_of
from adkit.passes.sharding.planning import check_sizes, follow, min_local, sizes_of
from adkit.passes.sharding.settings import WorldConfig, agreed_world
from adkit.passes.sharding.spread import Propagation, Share, Slices, rank_of
from adkit.passes.sharding.stacks import stack_of


@register
class ShardingTransformExecutor(Pass):
    """Write the plan of ``detect_sharding`` into the graph as hints, which compute what was there before.

    Why: the graph is still the whole model and can be checked on one device; every hint says by itself what a rank
    does at that node, so cutting needs no look at its neighbours.

        before: view(linear(x, W), [B, S, 32, 128])
        after:  view(linear(x, W, tp_mode="colwise", tp_min_local_shape=128), [B, S, 32, 128], tp_scaled_dim=2)
    """

    key = "sharding_transform_executor"
    stage = Stage.SHARDING
    Config: ClassVar[type[WorldConfig]] = WorldConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Write every hint; ShardingError where the plan (edited, perhaps) contradicts itself."""
        dist = agreed_world(self.config, ctx.dist)
        plan = gm.meta.get(PLAN)
        if not isinstance(plan, ShardingPlan):
            return PassInfo(skipped=True, reason="no plan: one rank, or detect_sharding has not run")
        rows = {n: _kept(r, self.config) for n, r in rows_by_node(gm, plan).items()}
        decisions: dict[Node, Decision] = {n: r.decision for n, r in rows.items() if r.decision != "follow"}
        found = follow(gm, decisions, dist, "the plan")
        check_sizes(found, decisions, dist)
        count = _Writer(self, gm, found, rows, own_tokens=dist.enable_attention_dp).write()
        return PassInfo(num_matches=count)


def _kept(row: PlanRow, config: WorldConfig) -> PlanRow:
    """The row, or whole where ``shard_layers`` leaves it out."""
    if row.decision in ("whole", "follow") or config.cuts(row.layer_type):
        return row
    return replace(row, decision="whole")


def rows_by_node(gm: GraphModule, plan: ShardingPlan) -> dict[Node, PlanRow]:
    """The plan's rows by the graph's nodes; ShardingError for a row whose node is not there."""
    by_id = {t.id: n for n in gm.graph.nodes if (t := tag_of(n)) is not None}
    by_name = {n.name: n for n in gm.graph.nodes}
    rows: dict[Node, PlanRow] = {}
    for row in plan:
        node = by_id.get(row.node) if row.node >= 0 else by_name.get(row.name)
        if node is None:
            raise ShardingError(
                f"the plan names {row.name} ({row.module}), which is not in this graph: it was made for "
                "another one; run detect_sharding again"
            )
        rows[node] = row
    return rows


class _Writer:
    """Writes what a propagation found, node after node. ``now``: what stands for a node of the graph before.

    ``own_tokens``: ranks have tokens of their own, and each keeps those of a sum.
    """

    def __init__(
        self,
        of: Pass,
        gm: GraphModule,
        found: Propagation,
        rows: dict[Node, PlanRow],
        own_tokens: bool = False,
    ) -> None:
        self.of, self.gm, self.found, self.rows, self.own_tokens = of, gm, found, rows, own_tokens
        self.now: dict[Node, Node] = {}
        self.gathered: dict[Node, Node] = {}
        self.gathers: dict[Node, list[Node]] = {}
        for value, readers in found.gathered.items():
            for reader in readers:
                self.gathers.setdefault(reader, []).append(value)
        self.summed: dict[Node, Node] = {}
        self.parts: dict[tuple[Node, tuple[int, ...]], Node] = {}
        self.kinds: dict[Node, str] = {n: r.layer_type for n, r in rows.items()}
        for node, row in rows.items():
            if row.decision in ("batch", "gather") and (stack := stack_of(node)) is not None:
                self.kinds[stack.weight] = row.layer_type
        for node in gm.graph.nodes:
            self.kinds.setdefault(node, self._kind_behind(node))
        self.needs: dict[Node, list[Node]] = {}
        self.cuts: dict[Node, list[tuple[Node, Slices]]] = {}
        for term, readers in found.sums.items():
            for reader in dict.fromkeys(readers):
                self.needs.setdefault(reader, []).append(term)
        for (reader, operand), slices in found.sliced.items():
            self.cuts.setdefault(reader, []).append((operand, slices))
        self.count = 0

    def write(self) -> int:
        """Write all; returns how many hints."""
        for node in list(self.gm.graph.nodes):
            for term in self.needs.get(node, ()):
                node.replace_input_with(self._now(term), self.summed[term])
            for value in self.gathers.get(node, ()):
                self._gather(node, value)
            for operand, slices in self.cuts.get(node, ()):
                self._reads_part(node, operand, slices)
            if node in self.found.merged:
                self._merge(node)
            elif node in self.found.made:
                self._make_part(node)
            elif node in self.found.blocks:
                self._split(node)
            else:
                self._hint(node)
            if node in self.found.joined:
                self._join(node)
            if node in self.found.sums:
                self._sum(node)
        return self.count

    def _now(self, node: Node) -> Node:
        return self.now.get(node, node)

    def _kind_behind(self, node: Node) -> str:
        """A node between linears has the layer type of what it reads pieces of."""
        for a in node.all_input_nodes:
            if a in self.found.spreads and a in self.kinds:
                return self.kinds[a]
        return "unknown"

    def _read(self, node: Node, operand: Node) -> Node:
        """What ``node`` reads in the place of ``operand``, tokens of its own."""
        return self.summed[operand] if operand in self.needs.get(node, ()) else self._now(operand)

    def _gather(self, node: Node, value: Node) -> None:
        own = self._read(node, value)
        if value not in self.gathered:
            with self.of.site(self.gm, [own], label="all_gather", before=node) as s:
                kwargs = {"layer_type": self.kinds[node]}
                self.gathered[value] = s.call(adkit_ops.all_gather.default, (own, 0), kwargs, like=own)
            self.count += 1
        node.replace_input_with(own, self.gathered[value])

    def _reads_part(self, node: Node, operand: Node, slices: Slices) -> None:
        now = self.gathered[operand] if operand in self.gathers.get(node, ()) else self._read(node, operand)
        with self.of.site(self.gm, [now], label="shard", before=node) as s:
            part = self._shard(s, now, slices, self.kinds[node])
        node.replace_input_with(now, part)

    def _shard(self, s: Site, x: Node, slices: Slices, kind: str) -> Node:
        self.count += 1
        blocks = slices.blocks or ((slices.size, slices.share),)
        kwargs: dict[str, Any] = {"layer_type": kind, **_least(blocks)}
        if len(blocks) > 1:
            kwargs["output_sizes"] = [size for size, _ in blocks]
        return s.call(adkit_ops.shard.default, (x, slices.dim), kwargs, like=x)

    def _sum(self, node: Node) -> None:
        now = self._now(node)
        label = "reduce_scatter" if self.own_tokens else "all_reduce"
        with self.of.site(self.gm, [now], label=label, before=now.next) as s:
            kwargs = {"layer_type": self.kinds[node]}
            if self.own_tokens:
                self.summed[node] = s.call(adkit_ops.reduce_scatter.default, (now, 0), kwargs, like=now)
            else:
                self.summed[node] = s.call(adkit_ops.all_reduce.default, (now,), kwargs, like=now)
        self.count += 1

    def _join(self, node: Node) -> None:
        readers = list(node.users)
        with self.of.site(self.gm, [node], label="all_gather", before=node.next) as s:
            args, kwargs = (node, self.found.joined[node]), {"layer_type": self.kinds[node]}
            self.now[node] = s.call(adkit_ops.all_gather.default, args, kwargs, like=node)
        for reader in readers:
            reader.replace_input_with(node, self.now[node])
        self.count += 1

    def _merge(self, node: Node) -> None:
        terms, rest = self.found.merged[node]
        with self.of.site(self.gm, [node], label="one sum for parallel branches", before=node) as s:
            total = self._now(terms[0])
            for term in terms[1:]:
                total = self._plus(s, total, self._now(term))
            kwargs = {"layer_type": self.kinds[terms[0]]}
            total = s.call(adkit_ops.all_reduce.default, (total,), kwargs, like=total)
            for value in rest:
                total = self._plus(s, self.summed.get(value, self._now(value)), total)
            self.now[node] = total
            s.replace(node, total)
        self.count += 1

    @staticmethod
    def _plus(s: Site, a: Node, b: Node) -> Node:
        """Their sum; values of one shape and dtype need no look at what addition makes of them."""
        alike = same_shape(a, b) and dtype_of(a) == dtype_of(b)
        return s.call(aten.add.Tensor, (a, b), like=a if alike else None)

    def _make_part(self, node: Node) -> None:
        readers = list(node.users)
        with self.of.site(self.gm, [node], label="shard", before=node.next) as s:
            part = self._shard(s, node, self.found.made[node], self.kinds[node])
        self.now[node] = part
        for reader in readers:
            reader.replace_input_with(node, part)

    def _split(self, node: Node) -> None:
        """Splits and slices along a cut: one split into its blocks, of which a slice takes some."""
        x, picks = node.args[0], node.target in PICKS
        assert isinstance(x, Node)
        at = slice_dim(node) if picks else int(arg(node, 2, "dim", 0)) % rank_of(x)
        assert at is not None
        blocks = self.found.blocks[node]
        sizes = tuple(size for size, _ in blocks)
        with self.of.site(self.gm, [node], label="split", before=node) as s:
            parts = self.parts.get((x, sizes))
            if parts is None:
                kwargs = {**_least(blocks), "layer_type": self.kinds[node]}
                parts = s.call(adkit_ops.split_with_sizes.default, (x, list(sizes), at), kwargs)
                self.parts[x, sizes] = parts
                self.count += 1
            if not picks:
                self.now[node] = parts
            else:
                bounds = slice_bounds(node, sum(sizes))
                assert bounds is not None
                taken = self._blocks(sizes, *bounds)
                picked = [s.call(operator.getitem, (parts, i)) for i in taken]
                self.now[node] = picked[0] if len(picked) == 1 else s.call(aten.cat.default, (picked, at))
            s.replace(node, self.now[node])

    @staticmethod
    def _blocks(sizes: tuple[int, ...], start: int, stop: int) -> list[int]:
        """Which blocks lie between two bounds."""
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [
            i for i, (size, end) in enumerate(zip(sizes, ends, strict=True)) if start <= end - size < stop
        ]

    def _hint(self, node: Node) -> None:
        made = self._call(node)
        if made is None:
            return
        target, args, kwargs, label = made
        with self.of.site(self.gm, [node], label=label, before=node) as s:
            new = s.call(target, args, kwargs, like=node)
            self.now[node] = new
            s.replace(node, new)
        self.count += 1

    def _call(self, node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any], str] | None:
        """The hint in a node's place: target, arguments, keywords, label; None where it stays."""
        found, kind = self.found, {"layer_type": self.kinds[node]}
        decision = self.rows[node].decision if node in self.rows else "follow"
        if node.target is LINEAR and decision in ("colwise", "rowwise", "gather"):
            kwargs: dict[str, Any] = {"tp_mode": decision}
            if sizes := sizes_of(node, found):
                kwargs["output_sizes"] = list(sizes)
            if (least := min_local(node, found)) > 1:
                kwargs["tp_min_local_shape"] = least
            return node.target, node.args, {**node.kwargs, **kwargs, **kind}, f"linear {decision}"
        if node.target is MOE and decision == "experts":
            return node.target, node.args, {**node.kwargs, "shardable": True, **kind}, "experts"
        if node.target is EMBEDDING and decision == "vocab":
            return adkit_ops.embedding.default, node.args[:2], {"tp_mode": "vocab", **kind}, "embedding"
        if node in found.norms:
            return adkit_ops.rmsnorm.default, node.args, {**node.kwargs, **kind}, "rmsnorm"
        if node in found.scaled:
            at, size, shares = found.scaled[node]
            kwargs = {"tp_scaled_dim": at, **_least([(size, share) for share in shares])}
            return adkit_ops.view.default, node.args, {**kwargs, **kind}, "view"
        if node in found.expanded:
            shape = list(cast(Any, node.args[1]))
            shape[found.expanded[node]] = -1
            return node.target, (node.args[0], shape), node.kwargs, name_of(node.target)
        return None


def _least(blocks: Iterable[tuple[int, Share]]) -> dict[str, int]:
    """The hint for the smallest piece, where it is more than an element."""
    least = Propagation.least(blocks)
    return {"tp_min_local_shape": least} if least > 1 else {}
