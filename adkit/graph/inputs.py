"""New graph inputs: placeholders with fake values whose dynamic sizes are symbols, fresh or shared."""

from __future__ import annotations

from typing import Any

import torch
from torch._dynamo.source import LocalSource
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

#: A size: a number, dynamic with a symbol of its own (None), or dynamic and shared by all of that name, which
#: may carry an addend ("sequences + 1").
Dim = int | str | None


class GraphInputs:
    """The placeholders of a graph, and how to add to them; one look at the graph serves many additions."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.known: dict[str, Node] = {}
        self.sizes: dict[str, Any] = {}
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

    def add(self, name: str, shape: tuple[Dim, ...], dtype: torch.dtype) -> Node:
        """The placeholder ``name``, made after the last one if new; ``shape`` as in :data:`Dim`.

        Sizes known to be equal share a name (and so a symbol): layers that differ in nothing else then fold,
        and a cost needs each size once. Placeholders are keywords, so their order carries no meaning.
        """
        if name in self.known:
            return self.known[name]
        graph = self.gm.graph
        with (
            graph.inserting_after(self._last)
            if self._last is not None
            else graph.inserting_before(self._first)
        ):
            node = graph.placeholder(name)
        node.meta["val"] = self._value(name, shape, dtype)
        self.known[name] = self._last = node
        return node

    def share(self, size: str, name: str, dim: int) -> None:
        """Let ``size`` be the size that input ``name`` has at ``dim``; no effect without such an input."""
        val = self.known[name].meta.get("val") if name in self.known else None
        if isinstance(val, torch.Tensor) and val.dim() > dim:
            self.sizes[size] = val.shape[dim]

    def _value(self, name: str, shape: tuple[Dim, ...], dtype: torch.dtype) -> torch.Tensor:
        sizes = [self._size(d, f"{name}.{i}") for i, d in enumerate(shape)]
        if self._mode is None:
            return torch.empty(sizes, dtype=dtype, device="meta")
        with self._mode:
            return torch.empty(sizes, dtype=dtype, device=self._device)

    def _size(self, dim: Dim, fresh: str) -> Any:
        if isinstance(dim, int):
            return dim
        name, _, more = (dim or fresh).partition(" + ")
        if name not in self.sizes:
            size: Any = 5 + len(self.sizes)
            if self._mode is not None:
                context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
                example = torch.empty(size, device="meta")
                size = self._mode.from_tensor(
                    example, source=LocalSource(name), symbolic_context=context
                ).shape[0]
            self.sizes[name] = size
        return self.sizes[name] + int(more or 0)


def add_input(gm: GraphModule, name: str, shape: tuple[Dim, ...], dtype: torch.dtype) -> Node:
    """Add one input; see :meth:`GraphInputs.add`."""
    return GraphInputs(gm).add(name, shape, dtype)
