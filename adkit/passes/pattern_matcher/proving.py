"""Running a part of a graph on small random numbers, to prove what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from adkit.graph.shape_only import ShapeOnly
from adkit.passes.pattern_matcher.masks import NotUnderstood

PROOF_SIZE = (2, 7)  # batch, sequence
_HALF = (torch.float16, torch.bfloat16)


def is_size(node: Node) -> bool:
    """Whether the node's value is a number that follows from sizes."""
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


def compute(
    shapes: ShapeOnly, nodes: Iterable[Node], given: Mapping[Node, Tensor], small: Mapping[int, int]
) -> Any:
    """What the last of ``nodes`` computes from ``given``, in float32 on the CPU, at ``PROOF_SIZE``.

    ``small`` replaces widths where they are written as literals, so that a proof about a large model computes
    with small matrices. Raises NotUnderstood when a node reads what is not given.
    """

    def literal(a: Any) -> Any:
        if isinstance(a, int) and not isinstance(a, bool):
            return small.get(a, a)
        return torch.float32 if a in _HALF else torch.device("cpu") if isinstance(a, torch.device) else a

    values: dict[Node, Any] = {}
    last = None
    for last in nodes:
        if last in given:
            values[last] = given[last].clone()
        elif is_size(last):
            values[last] = shapes.size(last.meta["val"], *PROOF_SIZE)
        elif last.op != "call_function":
            raise NotUnderstood(f"the block reads {last.target}, which has no place in torch_moe")
        else:
            args, kwargs = map_arg(
                map_aggregate((last.args, last.kwargs), literal), lambda a: values[a]
            )  # values are put in last: they are not literals
            with torch.no_grad():
                values[last] = last.target(*args, **kwargs)  # type: ignore[operator]
    assert last is not None
    return values[last]
