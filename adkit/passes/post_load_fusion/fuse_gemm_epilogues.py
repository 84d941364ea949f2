"""``fuse_gemm_epilogues``: linear layers take in the norm before them and the gate or the residual sum after them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from adkit.graph.edit import Site
from adkit.graph.matching import arg, aten, dtype_of, same_shape
from adkit.graph.step import PassInfo
from adkit.ops.backends import pick
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.post_load_fusion._fused import BackendConfig, every
from adkit.passes.post_load_fusion.fuse_add_rms_norm import promoted
from adkit.passes.registry import register


@dataclass(eq=False)
class _Layer:
    """A linear layer and the neighbours that it takes in; ``add`` may be a plain sum or a sum with its norm."""

    linear: Node
    norm: Node | None = None
    gather: Node | None = None
    act: Node | None = None
    add: Node | None = None

    @property
    def product(self) -> Node:
        """What the layer gives before a residual is added."""
        return self.act or self.linear

    @property
    def nodes(self) -> list[Node]:
        """Everything that goes, with the results of ops that have two."""
        own = [n for n in (self.norm, self.gather, self.linear, self.act, self.add) if n is not None]
        return [
            *own,
            *(r for n in (self.norm, self.add) if n is not None for r in _results(n) if r is not None),
        ]


@register
class FuseGemmEpilogues(Pass):
    """Give linear layers the work around them: the RMS norm they read, the gate or the residual sum they
    feed.

    A decode step of few tokens takes as long as reading the weights, and every small kernel between two layers
    adds a start, an end and a pause. One kernel can do a layer with its surroundings: the norm is one number a token,
    found while the product is summed, and gate and sum work on values that are still in registers. For many
    tokens the op runs the parts one after another, with the library's product. A norm that anything
    else than linear layers reads (routers with their experts) is left.

        before: y, h = fused_add_rmsnorm(linear(a, Wo), r, w, eps); x = swiglu_packed(linear(y, Wgu))
        after:  h = fused_linear(a, Wo, residual=r); x = fused_linear(h, Wgu, norm_weight=w, eps=eps, act="silu")
    """

    key = "fuse_gemm_epilogues"
    stage = Stage.POST_LOAD_FUSION
    Config: ClassVar[type[PassConfig]] = BackendConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every linear layer."""
        reference = pick("fused_linear", "torch")
        target = pick("fused_linear", self.config.backend, ctx.device)
        if self.config.backend == "auto" and target is reference:
            return PassInfo(skipped=True, reason=f"it pays with kernels only, and {ctx.device} runs none")
        layers = _layers(gm)
        for group in _groups(layers):
            sums: dict[Node, Node] = {}
            nodes = [n for layer in group for n in layer.nodes]
            with self.site(gm, nodes, label=_label(group)) as s:
                for layer in group:
                    _rewrite(s, layer, target, sums)
        return PassInfo(num_matches=len(layers))


def _layers(gm: GraphModule) -> list[_Layer]:
    """Every linear layer with what it takes in, in the order of the graph."""
    linears, gates = every("linear_simple"), every("swiglu_packed")
    norms, sums_with_norm = every("rmsnorm"), every("fused_add_rmsnorm")
    layers = {n: _Layer(n) for n in gm.graph.nodes if n.target in linears}
    products: dict[Node, _Layer] = {}
    for layer in layers.values():
        if len(layer.linear.users) == 1 and (user := next(iter(layer.linear.users))).target in gates:
            layer.act = user
        products[layer.product] = layer
    for node in gm.graph.nodes:
        if node.target in norms:
            for reader, gather in _readers(node, layers):
                reader.norm, reader.gather = node, gather
        elif node.target in sums_with_norm:
            summing, normed = _summing(node, products), _results(node)[0]
            readers = _readers(normed, layers) if normed is not None else []
            if summing is not None and readers:
                summing.add = node
                for reader, gather in readers:
                    reader.norm, reader.gather = node, gather
        elif node.target is aten.add.Tensor and not node.kwargs:
            summing = _summing(node, products)
            if summing is not None:
                summing.add = node
    return list(layers.values())


def _results(node: Node) -> tuple[Node | None, Node | None]:
    """The normed value and the sum of an op that gives both, where they are read; of any other, nothing."""
    found = {n.args[1]: n for n in node.users if n.target is operator.getitem}
    return found.get(0), found.get(1)


def _readers(normed: Node, layers: dict[Node, _Layer]) -> list[tuple[_Layer, Node | None]]:
    """The layers that read a norm's result, and the gather of tokens between; none if anything else reads
    it."""
    found: list[tuple[_Layer, Node | None]] = []
    dtype = dtype_of(normed)
    for user in normed.users:
        gather = user if user.target is aten.index_select.default and user.args[1] == 1 else None
        for reader in [user] if gather is None else gather.users:
            if reader not in layers or reader.args[0] is not (gather or normed):
                return []
            # The fused layer rounds its input to the weight's dtype.
            if dtype_of(reader.args[1]) != dtype:
                return []
            found.append((layers[reader], gather))
    return found


def _summing(add: Node, products: dict[Node, _Layer]) -> _Layer | None:
    """The layer whose product is added to something like it, and read by nobody else."""
    a, b = add.args[:2]
    if not isinstance(a, Node) or not isinstance(b, Node) or a is b:
        return None
    if not same_shape(a, b):
        return None
    for product, other in ((a, b), (b, a)):
        layer = products.get(product)
        fits = promoted(a, b) == dtype_of(other)  # the sum has the residual's dtype
        if layer is not None and layer.add is None and len(product.users) == 1 and fits:
            return layer
    return None


def _groups(layers: list[_Layer]) -> list[list[_Layer]]:
    """Layers that share a node, as those on both sides of a norm, belong to one site."""
    group_of: dict[Node, list[_Layer]] = {}
    for layer in layers:
        merged = [layer]
        for known in {id(g): g for n in layer.nodes if (g := group_of.get(n))}.values():
            merged = [*known, *merged]
        group_of.update({n: merged for member in merged for n in member.nodes})
    groups = {id(g): g for g in (group_of[layer.linear] for layer in layers)}
    return [sorted(group, key=lambda layer: layer.linear) for group in groups.values()]


def _label(group: list[_Layer]) -> str:
    """What kinds of neighbours a group has."""
    kinds = {
        "norm": any(layer.norm for layer in group),
        "gate": any(layer.act for layer in group),
        "sum": any(layer.add for layer in group),
    }
    return " + ".join(["linear", *(kind for kind, there in kinds.items() if there)])


def _rewrite(s: Site, layer: _Layer, target: Any, sums: dict[Node, Node]) -> None:
    """Put the fused layer where its last part stood; ``sums`` keeps what stands for the sum of an add and
    norm."""
    linear, norm, gather, add = layer.linear, layer.norm, layer.gather, layer.add
    s.anchor = linear  # whose module and line of code the new nodes get
    x: Any = linear.args[0]
    kwargs: dict[str, Any] = {}
    if norm is not None:
        first = 2 if norm in sums else 1
        for i, name in enumerate(("norm_weight", "eps", "weight_offset", "weight_in_float")):
            value = arg(norm, first + i, name.removeprefix("norm_"))
            if value is not None:
                kwargs[name] = value
        x = sums.get(norm, norm.args[0])
        if gather is not None:
            x = s.call(gather.target, (x, *gather.args[1:]))  # type: ignore[arg-type]
    if layer.act is not None:
        kwargs["act"] = arg(layer.act, 1, "act", "silu")
    if add is not None:
        a, b = add.args[:2]
        kwargs["residual"] = b if a is layer.product else a
    operands = (x, *linear.args[1:])
    fused = s.call(target, operands, {**linear.kwargs, **kwargs}, before=add or layer.product)
    if add is None or add.target is aten.add.Tensor:
        s.replace(add or layer.product, fused)
    else:
        sums[add] = fused
        total = _results(add)[1]
        if total is not None:
            s.replace(total, fused)
