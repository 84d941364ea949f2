"""``fuse_gemms``: linear layers that read the same input, as one."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import arg, args_of, aten
from adkit.graph.snapshot import attribute
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register

_LINEARS = {torch.ops.adkit.torch_linear_simple.default, aten.linear.default}


@register
class FuseGemms(Pass):
    """Multiply an input by the weights of all linear layers that read it at once: Q with K and V, gate with
    up.

    One large matrix product keeps the device busier than three small ones and reads the input once. Weights
    are concatenated group by group and the old ones freed before the next, so memory peaks one group above
    the model. Weights shared with another reader (tied ones) are left alone. ``gm.meta["adkit_weights"]``
    says, for each new parameter, which ones it holds, one after another on dimension 0.

        before: q = linear(x, Wq); k = linear(x, Wk); v = linear(x, Wv)
        after:  q, k, v = split_with_sizes(linear(x, qkv_proj_fused.weight), [Q, K, V], -1)
    """

    key = "fuse_gemms"
    stage = Stage.POST_LOAD_FUSION

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Fuse every group of two or more."""
        readers = Counter(n.target for n in gm.graph.nodes if n.op == "get_attr")
        owners = Counter(id(t) for t in [*_tensors(gm.named_parameters), *_tensors(gm.named_buffers)])
        groups: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            key = _group_key(gm, node, readers, owners)
            if key is not None:
                groups[key].append(node)
        values: dict[Any, Any] = {}
        found = [nodes for nodes in groups.values() if len(nodes) > 1]
        for i, nodes in enumerate(found):
            self._fuse(gm, _gate_first(nodes), values)
            ctx.progress(i + 1, len(found), "fused")
        return PassInfo(num_matches=len(found))

    def _fuse(self, gm: GraphModule, nodes: list[Node], values: dict[Any, Any]) -> None:
        """``values`` keeps (fused value, its pieces) by shape: layers are alike, symbolic sizes slow."""
        x, anchor = nodes[0].args[0], min(nodes)  # FX nodes compare by their place in the graph
        weights = [arg(n, 1, "weight") for n in nodes]
        biases = [arg(n, 2, "bias") for n in nodes]
        sizes = [w.meta["val"].shape[0] for w in weights]
        path = _fused_path([str(w.target) for w in weights])
        reads = [*weights, *(b for b in biases if b is not None)]
        with self.site(gm, (*reads, *nodes), label="gemms", before=anchor) as s:
            operands: list[Any] = [x]
            for leaf, parts in (("weight", weights), ("bias", biases)):
                if parts[0] is not None:
                    name = f"{path}.{leaf}"
                    _concatenate(gm, name, [str(p.target) for p in parts])
                    old = parts[0].meta["val"]
                    operands.append(s.get_attr(name, val=old.new_empty((sum(sizes), *old.shape[1:]))))
            old = anchor.meta["val"]
            fused = s.call(torch.ops.adkit.torch_linear_simple.default, tuple(operands), like=anchor)
            pieces = s.call(aten.split_with_sizes.default, (fused, sizes, -1), like=anchor)
            key = (str(old.shape[:-1]), old.dtype, *sizes)
            if key not in values:
                whole = old.new_empty((*old.shape[:-1], sum(sizes)))
                values[key] = whole, whole.split(sizes, -1)
            fused.meta["val"], pieces.meta["val"] = values[key]
            for i, node in enumerate(nodes):
                piece = s.call(operator.getitem, (pieces, i), like=node)
                piece.meta["val"] = pieces.meta["val"][i]
                s.replace(node, piece)


def _tensors(named: Any) -> list[torch.Tensor]:
    return [t for _, t in named(remove_duplicate=False)]


def _group_key(
    gm: GraphModule, node: Node, readers: Counter[Any], owners: Counter[int]
) -> tuple[Any, ...] | None:
    """Equal for linears to be fused: same input, weights of one dtype in one module, all with or without
    bias.

    None for what is no linear, or reads a weight that someone else reads too.
    """
    if node.target not in _LINEARS:
        return None
    x, weight, bias = node.args[0], arg(node, 1, "weight"), arg(node, 2, "bias")
    for read in (weight, bias):
        if read is None:
            continue
        if (
            not isinstance(read, Node)
            or read.op != "get_attr"
            or len(read.users) > 1
            or readers[read.target] > 1
        ):
            return None
        if owners[id(attribute(gm, str(read.target)))] > 1:
            return None
    tensor = attribute(gm, str(weight.target))
    module = str(weight.target).rpartition(".")[0]
    if tensor.ndim != 2 or not module:
        return None
    parent = module.rpartition(".")[0]
    return x, parent, bias is None, tensor.dtype, tensor.device


def _gate_first(nodes: list[Node]) -> list[Node]:
    """The two inputs of one gated activation, gate first (``fuse_swiglu`` then needs no split); else as they
    are."""
    readers = {user for n in nodes for user in n.users}
    if len(nodes) == 2 and len(readers) == 1:
        (reader,) = readers
        if reader.target is torch.ops.adkit.torch_swiglu.default and set(args_of(reader)[:2]) == set(nodes):
            return list(args_of(reader)[:2])
    return nodes


def _fused_path(names: list[str]) -> str:
    """Module path of the fused weight: q_proj, k_proj, v_proj -> qkv_proj_fused; gate_proj, up_proj ->
    gate_up_proj_fused."""
    paths = [name.rpartition(".")[0] for name in names]
    parent = paths[0].rpartition(".")[0]
    leaves = [path.rpartition(".")[2] for path in paths]
    if all(leaf.endswith("_proj") for leaf in leaves):
        stems = [leaf.removesuffix("_proj") for leaf in leaves]
        joined = ("" if all(len(stem) == 1 for stem in stems) else "_").join(stems) + "_proj_fused"
    else:
        joined = "_".join(leaves) + "_fused"
    return f"{parent}.{joined}" if parent else joined


def _concatenate(gm: GraphModule, name: str, parts: list[str]) -> None:
    """Make parameter ``name`` of ``parts`` on dimension 0, and free them."""
    fused = torch.cat([attribute(gm, part).detach() for part in parts])
    for part in parts:
        path, _, leaf = part.rpartition(".")
        delattr(gm.get_submodule(path), leaf)
    path, _, leaf = name.rpartition(".")
    owner: nn.Module = gm
    for step in path.split("."):
        if step not in owner._modules:
            owner.add_module(step, nn.Module())
        owner = owner.get_submodule(step)
    owner.register_parameter(leaf, nn.Parameter(fused, requires_grad=False))
    recipes: dict[str, tuple[str, ...]] = gm.meta.setdefault("adkit_weights", {})
    recipes[name] = tuple(old for part in parts for old in recipes.pop(part, (part,)))
