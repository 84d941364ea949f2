"""Hand-built graphs with layers, for what tiny models do not show: caches, alternation, two carries."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule, Node

from adkit.graph.identity import identities
from adkit.graph.snapshot import Snapshot, take

aten = torch.ops.aten


class Builder:
    """Adds nodes with values and module paths to a graph."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.root = torch.nn.Module()

    def put(self, node: Node, shape: tuple[int, ...], path: str = "") -> Node:
        node.meta["val"] = torch.empty(shape, device="meta")
        if path:
            node.meta["nn_module_stack"] = {path: (path, "Module")}
        return node

    def input(self, name: str, *shape: int) -> Node:
        return self.put(self.graph.placeholder(name), shape)

    def weight(self, path: str, *shape: int) -> Node:
        at = self.root
        *parents, leaf = path.split(".")
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.register_parameter(leaf, torch.nn.Parameter(torch.empty(shape, device="meta")))
        return self.put(self.graph.get_attr(path), shape)

    def call(self, target, args: tuple, shape: tuple[int, ...], path: str = "") -> Node:
        return self.put(self.graph.call_function(target, args), shape, path)

    def done(self, *results: Node) -> Snapshot:
        self.graph.output(tuple(results))
        gm = GraphModule(self.root, self.graph)
        identities(gm).settle(gm.graph)
        return take(gm)


def cached(layers: int = 3) -> Snapshot:
    """Layers that each read a parameter of their own and a cache placeholder of their own."""
    b = Builder()
    x = b.input("x", 1, 8)
    for i in range(layers):
        cache = b.input(f"k_cache_{i}", 4, 8)
        weight = b.weight(f"model.layers.{i}.proj.weight", 8, 8)
        y = b.call(aten.linear.default, (x, weight), (1, 8), f"model.layers.{i}.proj")
        z = b.call(aten.add.Tensor, (y, cache), (4, 8), f"model.layers.{i}")
        z = b.call(aten.sum.dim_IntList, (z, [0], True), (1, 8), f"model.layers.{i}")
        x = b.call(aten.add.Tensor, (x, z), (1, 8), f"model.layers.{i}")
    return b.done(x)


def two_carries(layers: int = 4) -> Snapshot:
    """Each layer hands two values to the next, the first of which is read after the second is made."""
    b = Builder()
    x, r = b.input("x", 8), b.input("r", 8)
    x = b.call(aten.neg.default, (x,), (8,))
    r = b.call(aten.abs.default, (r,), (8,))
    for i in range(layers):
        path = f"model.layers.{i}"
        new = b.call(aten.mul.Tensor, (x, r), (8,), path)
        r = b.call(aten.add.Tensor, (x, r), (8,), path)
        x = new
    return b.done(b.call(aten.add.Tensor, (x, r), (8,)))


def alternating(layers: int = 6) -> Snapshot:
    """Even layers negate, odd layers take the cosine."""
    b = Builder()
    x = b.input("x", 8)
    for i in range(layers):
        x = b.call(aten.cos.default if i % 2 else aten.neg.default, (x,), (8,), f"h.{i}.mlp")
        x = b.call(aten.abs.default, (x,), (8,), f"h.{i}")
    return b.done(x)
