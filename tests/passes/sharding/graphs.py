"""Small graphs with hints, cut for every rank and run together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from adkit.contract import DistConfig, EngineConfig
from adkit.graph.edit import clean
from adkit.graph.step import PassInfo
from adkit.ops.dist import lockstep, over_ranks
from adkit.passes import Context, get_pass

ops: Any = torch.ops.adkit


class Net(nn.Module):
    """A module of float64 parameters whose forward is a function of them and x."""

    def __init__(self, forward: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(value, requires_grad=False))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def exported(net: nn.Module, x: Tensor) -> GraphModule:
    """``net`` as a graph module over its own parameters, with values; the first dimension is open."""
    dims = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(net, (), kwargs={"x": x}, strict=False, dynamic_shapes=dims)
    gm = program.module(check_guards=False)
    gm.graph.set_codegen(torch.fx.graph.CodeGen())
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]
    gm = GraphModule(dict(tensors), gm.graph)
    clean(gm)
    return gm


def cut(gm: GraphModule, dist: DistConfig, **config: Any) -> PassInfo:
    """Run the pass for one rank; the graph must hold together."""
    context = Context(factory=None, engine=EngineConfig(), device=torch.device("cpu"), dist=dist)
    info = get_pass("apply_sharding_hints")(config).apply(gm, context)
    clean(gm)
    gm.graph.lint()
    gm.recompile()
    return info


def together(graphs: list[GraphModule], *inputs: Any, apart: bool = False) -> list[Any]:
    """Every rank's output: all graphs run side by side, node by node; they must have the same nodes.

    ``apart``: an input is a list, a rank's each.
    """
    runs = [Interpreter(gm) for gm in graphs]
    feeds = [iter([v[r] for v in inputs] if apart else inputs) for r in range(len(graphs))]
    for nodes in zip(*(gm.graph.nodes for gm in graphs), strict=True):
        assert len({(n.op, str(n.target) if n.op != "get_attr" else "", n.name) for n in nodes}) == 1, nodes
        first = nodes[0]
        loaded = [(_load(r, n.args), _load(r, n.kwargs)) for r, n in zip(runs, nodes, strict=True)]
        if first.op == "output":
            return [args[0] for args, _ in loaded]
        if first.op == "call_function" and over_ranks(first.target):
            results = lockstep(first.target, loaded)
        elif first.op == "placeholder":
            results = [next(f) for f in feeds]
        else:
            results = [
                getattr(r, n.op)(n.target, *call) for r, n, call in zip(runs, nodes, loaded, strict=True)
            ]
        for run, node, result in zip(runs, nodes, results, strict=True):
            run.env[node] = result
            _agrees(node, result)
    raise AssertionError("no output")


def _load(run: Interpreter, args: Any) -> Any:
    return torch.fx.node.map_arg(args, lambda n: run.env[n])


def _agrees(node: Node, result: Any) -> None:
    """A node's recorded value has the sizes that come out."""
    val = node.meta.get("val")
    if isinstance(result, Tensor) and isinstance(val, Tensor):
        assert val.dtype == result.dtype, node
        for said, is_ in zip(val.shape, result.shape, strict=True):
            assert not isinstance(said, int) or said == is_, (node, val.shape, result.shape)


def whole_and_cut(
    forward: Callable[..., Tensor],
    x: Tensor,
    dist: DistConfig,
    config: dict[str, Any] | None = None,
    **shapes: tuple[int, ...],
) -> tuple[Tensor, list[Tensor], list[GraphModule], PassInfo]:
    """What the uncut net computes, what each rank does, the ranks' graphs, and the last rank's report."""
    net = Net(forward, **shapes)
    graphs, info, source = [], PassInfo(), exported(net, x)
    for rank in range(dist.world_size):
        gm = copy.deepcopy(source)
        info = cut(gm, dist.at(rank), **(config or {}))
        graphs.append(gm)
    out = together(graphs, x)
    return net(x), [o[0] if isinstance(o, tuple) else o for o in out], graphs, info
