"""New graph inputs: placeholders with fake values whose dynamic sizes are fresh symbols."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from adkit.graph.edit import fake_mode_of


def add_input(gm: GraphModule, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Node:
    """The placeholder ``name``, added after the last one if new; None in ``shape`` is a dynamic size.

    Placeholders are keywords, so their order carries no meaning.
    """
    last: Node | None = None
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if node.target == name:
                return node
            last = node
    if last is None:
        with gm.graph.inserting_before(next(iter(gm.graph.nodes))):
            node = gm.graph.placeholder(name)
    else:
        with gm.graph.inserting_after(last):
            node = gm.graph.placeholder(name)
    node.meta["val"] = _fake_input(gm, name, shape, dtype)
    return node


def _fake_input(gm: GraphModule, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> torch.Tensor:
    from torch._dynamo.source import LocalSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    device = next((n.meta["val"].device for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)), "meta")
    example = torch.empty(tuple(5 + i if d is None else d for i, d in enumerate(shape)), dtype=dtype, device=device)
    mode = fake_mode_of(gm)
    if mode is None:
        return example.to("meta")
    dynamic = [DimDynamic.DYNAMIC if d is None else DimDynamic.STATIC for d in shape]
    context = StatelessSymbolicContext(dynamic_sizes=dynamic)
    fake: torch.Tensor = mode.from_tensor(example, source=LocalSource(name), symbolic_context=context)
    return fake
