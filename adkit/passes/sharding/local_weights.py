"""The weights of one rank's graph: which part stands under which name.

A weight that every reader wants the same part of keeps its name; one that is also read whole, or in another part, gets
a second name for the part. Names do not depend on the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from adkit.contract import LocalWeight
from adkit.graph.edit import Site
from adkit.graph.matching import aten
from adkit.models.loading import LOCAL
from adkit.passes.sharding.local_calls import Part
from adkit.passes.sharding.op_kinds import stored
from adkit.passes.tensors import put_tensor, tensor_at


def is_weight(node: Any) -> bool:
    """True for a read of a tensor that loading knows: no constant of the graph's own."""
    return isinstance(node, Node) and node.op == "get_attr" and not node.meta.get("adkit_constant", False)


def turned(node: Any) -> Node | None:
    """The weight that ``node`` turns around for one reader; None for other values."""
    weight = stored(node)
    return weight if weight is not node and is_weight(weight) and len(node.users) == 1 else None


@dataclass
class Wanted:
    """A :class:`~adkit.passes.sharding.local_calls.Writer` that writes nothing and notes which parts are wanted.

    ``reader`` is the hint being looked at; ``parts`` name -> parts in the order wanted; ``cut_reads`` pairs of (reader,
    weight's node).
    """

    reader: Node | None = None
    parts: dict[str, list[Part]] = field(default_factory=dict)
    cut_reads: set[tuple[Node, Node]] = field(default_factory=set)

    def cut(self, operand: Node | None, part: Part) -> Node | None:
        """Note a part of a weight."""
        if (weight := turned(operand)) is not None and not part.whole:
            reader, self.reader = self.reader, operand
            self.cut(weight, part.turned)
            self.reader = reader
        elif operand is not None and is_weight(operand) and not part.whole:
            assert self.reader is not None
            found = self.parts.setdefault(str(operand.target), [])
            if part not in found:
                found.append(part)
            self.cut_reads.add((self.reader, operand))
        return operand

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Nothing is written yet."""
        assert self.reader is not None
        return self.reader


def make_local(gm: GraphModule, wanted: Wanted, rank: int) -> dict[tuple[str, Part], str]:
    """Give ``gm`` this rank's parts, and say under which name each stands.

    ``gm.meta["adkit_local"]`` gets what they are. Weights on meta stay there; others are cut now. Names that share a
    tensor and want the same part still share one.
    """
    whole = {
        str(n.target)
        for n in gm.graph.nodes
        if is_weight(n) and any((user, n) not in wanted.cut_reads for user in n.users)
    }
    recipes: dict[str, LocalWeight] = dict(gm.meta.get(LOCAL, {}))
    made: dict[tuple[int, LocalWeight], Tensor] = {}
    names: dict[tuple[str, Part], str] = {}
    tensors = {name: tensor_at(gm, name) for name in wanted.parts}
    for name, parts in wanted.parts.items():
        tensor = tensors[name]
        assert tensor is not None, name
        for i, part in enumerate(parts):
            second = i + (name in whole)  # 0: the part stands under the weight's own name
            local_name = name if not second else f"{name}_local{second if second > 1 else ''}"
            recipe = part.of(name, rank)
            key = (id(tensor), part.of("", rank))
            if key not in made:
                made[key] = _taken(tensor, recipe)
            put_tensor(gm, local_name, made[key])
            recipes[local_name] = recipe
            names[name, part] = local_name
    if recipes:
        gm.meta[LOCAL] = recipes
    return names


def _taken(tensor: Tensor, recipe: LocalWeight) -> Tensor:
    if tensor.is_meta:
        local = torch.empty(recipe.shape(tensor.shape), dtype=tensor.dtype, device="meta")
    else:
        local = recipe.take(tensor.detach())
    return torch.nn.Parameter(local, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else local


@dataclass
class Rewriter:
    """A :class:`~adkit.passes.sharding.local_calls.Writer` into one site, for one rank.

    Values stay those of the whole graph until every hint has been read; ``cut_values`` keeps the parts' until then
    (weights of one shape share a value, from ``shapes``).
    """

    site: Site
    rank: int
    names: dict[tuple[str, Part], str]
    cut_values: dict[Node, Any]
    shapes: dict[Any, Any]

    def cut(self, operand: Node | None, part: Part) -> Node | None:
        """The part of a weight under its name; of a computed value a slice, or zeros."""
        if operand is None or part.whole:
            return operand
        if (weight := turned(operand)) is not None:
            local = self.cut(weight, part.turned)
            return operand if local is weight else self.call(aten.t.default, local)
        if is_weight(operand):
            name = self.names[str(operand.target), part]
            val = operand.meta["val"]
            # The node that read the whole weight reads the part where nobody else wants more.
            node = operand if name == operand.target else self.site.get_attr(name, val=val)
            if node not in self.cut_values:
                shape = part.of(name, self.rank).shape(val.shape)
                if (shape, val.dtype) not in self.shapes:
                    self.shapes[shape, val.dtype] = val.new_empty(shape)
                self.cut_values[node] = self.shapes[shape, val.dtype]
            return node
        return self._sliced(operand, part)

    def _sliced(self, value: Node, part: Part) -> Node:
        for cut in part.cuts[self.rank]:
            pieces = [self.call(aten.slice.Tensor, value, cut.dim, a, b) for a, b in cut.ranges]
            value = pieces[0] if len(pieces) == 1 else self.call(aten.cat.default, pieces, cut.dim)
        if any(part.zero):  # on every rank, so that all have the same nodes
            value = self.call(aten.mul.Scalar, value, 0.0 if part.zero[self.rank] else 1.0)
        return value

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call in the hint's place. Values come later, all at once: what stands before may still be whole."""
        return self.site.call(target, args, kwargs, like=self.site.anchor)
