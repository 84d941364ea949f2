"""``match_positions``: positions that the graph counts itself, taken from ``position_ids`` instead."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from adkit.graph.edit import fake_value
from adkit.graph.inputs import add_input
from adkit.graph.shape_only import EvaluationError, ShapeOnly
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.pattern_matcher.scores import with_asserts
from adkit.passes.registry import register

aten = torch.ops.aten
_SIZES = ((2, 7), (3, 13))
_B, _S = 1009, 10007  # no model has these sizes, so equal numbers mean equal dimensions
_MOST = 64  # nodes whose shape may change before a broadcast over the batch ends


@register
class MatchPositions(Pass):
    """Let positions come in as ``position_ids``.

    Some models number their tokens inside: an arange over the sequence, or a cumulative sum of ones. In a
    packed batch sequences start in the middle of the row and decoding starts in the middle of a sequence, so
    positions have to come from outside. What a node computes from sizes alone is evaluated at two lengths;
    where it counts 0, 1, 2, ... (plus a constant) the input takes its place, one row a sequence where shapes
    allow it, else the first row.

        before: arange(S) -> add(2) -> embedding(position table)
        after:  position_ids -> add(2) -> embedding(position table)
    """

    key = "match_positions"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Replace every counted position that token data meets."""
        shapes = ShapeOnly(gm, inputs=(), buffers=False)
        counted: dict[Node, tuple[int, list[Node]]] = {}
        strange: list[str] = []
        self._known: dict[Node, bool] = {}
        for node in sorted(shapes.nodes):
            outside = [u for u in node.users if u not in shapes and u.op != "output" and not _asserts(u)]
            if not outside or not self._varies(node, shapes):
                continue
            found = self._counters(node, shapes)
            if not found or not _token_local(node, list(found), shapes):
                strange.append(node.name)
                continue
            for counter, offset in found.items():
                way = set(shapes.closure(node))
                users = [u for u in counter.users if u in way or (counter is node and u in outside)]
                offset_users = counted.setdefault(counter, (offset, []))[1]
                offset_users.extend(u for u in users if u not in offset_users)
        first_row = sum(self._replace(gm, shapes, n, offset, users) for n, (offset, users) in counted.items())
        details: dict[str, Any] = {}
        if first_row:
            details["from the first row only"] = first_row
        if strange:
            details["not matched"] = f"computed from sizes, but no positions: {', '.join(strange[:8])}"
        return PassInfo(num_matches=len(counted), is_clean=not counted, details=details)

    def _varies(self, node: Node, shapes: ShapeOnly) -> bool:
        """A tensor with one sequence dimension along which it, or what it is computed from, is not constant.

        What is computed from positions may be the same for all short sequences: Llama 4 scales queries by
        floor(position / 8192).
        """
        if node not in self._known:
            self._known[node] = False
            long = _long_dims(node, shapes)
            if len(long) == 1:
                value = shapes.value(node, 2, 7)
                reads = [n for n in shapes.closure(node)[:-1] if node in n.users]
                self._known[node] = bool((value != value.narrow(long[0], 0, 1)).any()) or any(
                    self._varies(n, shapes) for n in reads
                )
        return self._known[node]

    def _counters(self, node: Node, shapes: ShapeOnly) -> dict[Node, int]:
        """The nearest nodes at or above ``node`` that count positions, each with its offset."""
        offset = _offset(node, shapes)
        if offset is not None:
            return {node: offset}
        found: dict[Node, int] = {}
        for n in node.all_input_nodes:
            if isinstance(n.meta.get("val"), Tensor) and n in shapes and self._varies(n, shapes):
                found.update(self._counters(n, shapes))
        return found

    def _replace(
        self, gm: GraphModule, shapes: ShapeOnly, node: Node, offset: int, users: list[Node]
    ) -> bool:
        """Put ``position_ids`` in the place of ``node``; returns whether only its first row could be used."""
        inputs = {n.target: n for n in gm.graph.nodes if n.op == "placeholder"}
        positions = inputs.get("position_ids")
        if positions is None:
            positions = add_input(gm, "position_ids", (None, None), torch.int64)
            positions.meta["val"] = torch.empty_like(inputs["input_ids"].meta["val"])
        val = node.meta["val"]
        shape = shapes.shape(node, _B, _S)
        wide = shape == (_B, _S) or _widens(gm, shapes, node, users)
        with self.site(gm, with_asserts([node]), label="positions", before=node) as s:
            new: Node = positions
            if not wide:
                new = (
                    s.call(aten.select.int, (new, 0, 0))
                    if len(shape) == 1
                    else s.call(aten.slice.Tensor, (new, 0, 0, 1))
                )
            if offset:
                new = s.call(aten.add.Tensor, (new, offset))
            if val.dtype != torch.int64:
                new = s.call(aten.to.dtype, (new, val.dtype))
            for user in users:
                user.replace_input_with(node, new)
        if wide and shape != (_B, _S):
            _revalue(gm, users)
        return not wide


def _long_dims(node: Node, shapes: ShapeOnly) -> list[int]:
    """Dimensions of a tensor that grow with the sequence; none where its value cannot be told."""
    val = node.meta.get("val")
    if not isinstance(val, Tensor) or val.ndim == 0:
        return []
    try:
        shapes.value(node, 2, 7)
        sizes = zip(shapes.shape(node, 2, 7), shapes.shape(node, 2, 13), strict=True)
        return [i for i, (a, b) in enumerate(sizes) if a != b]
    except EvaluationError:
        return []


def _offset(node: Node, shapes: ShapeOnly) -> int | None:
    """c when ``node`` is 0 + c, 1 + c, 2 + c, ... of shape [S], [1, S] or [B, S]; None otherwise."""
    offsets = set()
    try:
        for batch, seq in _SIZES:
            value = shapes.value(node, batch, seq)
            if tuple(value.shape) not in ((seq,), (1, seq), (batch, seq)) or value.dtype == torch.bool:
                return None
            offset = float(value.reshape(-1)[0])
            if not torch.equal(value.double(), (torch.arange(seq).double() + offset).expand_as(value)):
                return None
            offsets.add(offset)
    except EvaluationError:
        return None
    if len(offsets) != 1 or not (offset := offsets.pop()).is_integer():
        return None
    return int(offset)


def _token_local(node: Node, counters: list[Node], shapes: ShapeOnly) -> bool:
    """Whether each element of ``node`` depends on its own position, not on others and not on the length."""
    if counters == [node]:
        return True
    long, short = shapes.value(node, 2, 13), shapes.value(node, 2, 7)
    dim = next(i for i, (a, b) in enumerate(zip(long.shape, short.shape, strict=True)) if a != b)
    if long.shape[dim] != 13 or short.shape[dim] != 7 or not torch.equal(long.narrow(dim, 0, 7), short):
        # flattened over the batch: rows of 7 inside rows of 13
        if long.shape[dim] != 26 or short.shape[dim] != 14:
            return False
        long, short = (t.unflatten(dim, (2, -1)) for t in (long, short))
        dim += 1
        if not torch.equal(long.narrow(dim, 0, 7), short):
            return False
    order = torch.tensor([3, 0, 6, 5, 1, 4, 2])
    given = {c: shapes.value(c, 2, 7).index_select(-1, order) for c in counters}
    return torch.equal(shapes.value(node, 2, 7, given).reshape(short.shape), short.index_select(dim, order))


def _widens(gm: GraphModule, shapes: ShapeOnly, node: Node, users: list[Node]) -> bool:
    """Whether ``node`` may have one row a sequence: shapes downstream must fall back to what they were."""
    changed: dict[Node, Any] = {node: torch.empty(_B, _S, dtype=node.meta["val"].dtype, device="meta")}

    def value(a: Node) -> Any:
        if a in changed:
            return changed[a]
        val = a.meta.get("val")
        if isinstance(val, Tensor):
            return torch.empty(shapes.shape(a, _B, _S), dtype=val.dtype, device="meta")
        return shapes.size(val, _B, _S)

    pending = set(users)
    at = node.next
    while pending and at.op != "root":
        if at in pending:
            pending.discard(at)
            target: Any = at.target
            if at.op != "call_function" or len(changed) > _MOST or target is operator.getitem:
                return False
            if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
                return False
            try:
                out = target(*map_arg(at.args, value), **map_arg(at.kwargs, value))
                same = isinstance(out, Tensor) and tuple(out.shape) == shapes.shape(at, _B, _S)
            except Exception:  # whatever an operator says to shapes that do not fit
                return False
            if not isinstance(out, Tensor):
                return False
            if not same:
                changed[at] = out
                pending.update(at.users)
        at = at.next
    return not pending


def _revalue(gm: GraphModule, users: list[Node]) -> None:
    """Recompute values from ``users`` on until shapes are what they were."""
    pending = set(users)
    at = min(users)
    while pending and at.op != "root":
        if at in pending:
            pending.discard(at)
            old = at.meta.get("val")
            new = fake_value(at.target, at.args, at.kwargs)  # type: ignore[arg-type]
            at.meta["val"] = new
            if isinstance(old, Tensor) and [str(d) for d in old.shape] != [str(d) for d in new.shape]:
                pending.update(at.users)
        at = at.next


def _asserts(node: Node) -> bool:
    return node.target is aten._assert_tensor_metadata.default
