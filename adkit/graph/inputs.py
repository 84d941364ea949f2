"""New graph inputs: placeholders with fake values whose dynamic sizes are fresh symbols."""

from __future__ import annotations

import torch
from torch._dynamo.source import LocalSource
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext


class GraphInputs:
    """The placeholders of a graph, and how to add to them; one look at the graph serves many additions."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.known: dict[str, Node] = {}
        first: Node | None = None
        vals = []
        for node in gm.graph.nodes:
            first = first or node
            if node.op == "placeholder":
                self.known[str(node.target)] = node
            vals.append(node.meta.get("val"))
        self._last = next(reversed(self.known.values()), None)
        self._first = first
        self._mode = detect_fake_mode(vals)
        self._device = next((v.device for v in vals if isinstance(v, torch.Tensor)), torch.device("meta"))

    def add(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Node:
        """The placeholder ``name``, made after the last one if new; None in ``shape`` is a dynamic size.

        Placeholders are keywords, so their order carries no meaning.
        """
        if name in self.known:
            return self.known[name]
        graph = self.gm.graph
        with graph.inserting_after(self._last) if self._last is not None else graph.inserting_before(self._first):
            node = graph.placeholder(name)
        node.meta["val"] = self._value(name, shape, dtype)
        self.known[name] = self._last = node
        return node

    def _value(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> torch.Tensor:
        example = torch.empty(
            tuple(5 + i if d is None else d for i, d in enumerate(shape)), dtype=dtype, device="meta"
        )
        if self._mode is None:
            return example
        dynamic = [DimDynamic.DYNAMIC if d is None else DimDynamic.STATIC for d in shape]
        context = StatelessSymbolicContext(dynamic_sizes=dynamic)
        fake: torch.Tensor = self._mode.from_tensor(example, source=LocalSource(name), symbolic_context=context)
        with self._mode:
            return torch.empty(fake.shape, dtype=dtype, device=self._device)


def add_input(gm: GraphModule, name: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> Node:
    """Add one input; see :meth:`GraphInputs.add`."""
    return GraphInputs(gm).add(name, shape, dtype)
