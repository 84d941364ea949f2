"""Subgraphs that depend on sizes only, and what they compute.

Masks, ALiBi biases and derived positions are spelled out in an exported graph as arithmetic on sizes:
aranges, ones, comparisons, cumulative sums, perhaps on ``position_ids`` or a constant buffer, never on what
the tokens are. :class:`ShapeOnly` finds these nodes and evaluates them on small real tensors on the CPU, so
that a pass can look at what a node *means* instead of how it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from adkit.graph.snapshot import attribute

aten = torch.ops.aten

# What these return depends on the shape of their tensor argument, not on its values.
_LIKE = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
_HALF = (torch.float16, torch.bfloat16)


class EvaluationError(RuntimeError):
    """A size-only node cannot be evaluated at the sizes asked for (the message says why)."""


class ShapeOnly:
    """The size-only nodes of a graph, and their values at chosen sizes.

    ``inputs``: placeholders that count as known, fed with 0, 1, 2, ... in every row. ``constants``: real
    tensors for ``get_attr`` nodes, by dotted name; buffers of ``gm`` that have data count as well unless
    ``buffers`` is False; so do tensors that export lifted out of the forward. Parameters never count.
    """

    def __init__(
        self,
        gm: GraphModule,
        *,
        inputs: Iterable[str] = ("position_ids",),
        constants: Mapping[str, Tensor] | None = None,
        buffers: bool = True,
    ) -> None:
        self.gm = gm
        self._inputs = frozenset(inputs)
        self._constants = dict(constants or {})
        if buffers:
            for name in {n.target for n in gm.graph.nodes if n.op == "get_attr"} - self._constants.keys():
                tensor = attribute(gm, name)
                if (
                    isinstance(tensor, Tensor)
                    and not isinstance(tensor, torch.nn.Parameter)
                    and not tensor.is_meta
                ):
                    self._constants[name] = tensor
        self._symbols = _input_symbols(gm)
        self._sizes: dict[tuple[Any, int, int], int | float | bool] = {}
        self.nodes: set[Node] = set()
        self._mutators: dict[Node, list[Node]] = {}
        self._prints: dict[Node, int] = {}
        self._interned: dict[Any, int] = {}
        self._find()

    def __contains__(self, node: object) -> bool:
        return node in self.nodes

    # --- which nodes

    def _find(self) -> None:
        banned: set[Node] = set()
        while True:
            self.nodes = set()
            self._mutators = {}
            spoiled: set[Node] = set()
            for node in self.gm.graph.nodes:
                known = node not in banned and self._knows(node)
                if known:
                    self.nodes.add(node)
                written = _written(node)
                if written is not None:
                    self._mutators.setdefault(written, []).append(node)
                    if written in self.nodes and not known:
                        spoiled.add(written)
            if not spoiled:
                return
            banned |= spoiled

    def _knows(self, node: Node) -> bool:
        if node.op == "placeholder":
            return node.target in self._inputs
        if node.op == "get_attr":
            return node.target in self._constants
        if node.op != "call_function":
            return False
        val = node.meta.get("val")
        if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self._symbolic(val)
        if isinstance(val, (int, float, bool)):
            return True
        if node.target in _LIKE:
            rest = (a for a in node.all_input_nodes[1:])
            return isinstance(node.args[0], Node) and all(a in self.nodes for a in rest)
        if isinstance(node.target, torch._ops.OpOverload) and (
            torch.Tag.nondeterministic_seeded in node.target.tags or not node.target._schema.returns
        ):
            return False
        return all(a in self.nodes for a in node.all_input_nodes)

    def _symbolic(self, value: Any) -> bool:
        return set(value.node.expr.free_symbols) <= set(self._symbols)

    # --- sizes

    def size(self, value: Any, batch: int, seq: int) -> Any:
        """A (symbolic) number at B = ``batch``, S = ``seq``; EvaluationError if they do not fix it."""
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value
        expr = value.node.expr
        key = (expr, batch, seq)
        if key not in self._sizes:
            at = {s: batch if which == 0 else seq for s, which in self._symbols.items()}
            found = expr.subs(at)
            if found.free_symbols:
                raise EvaluationError(f"size {expr} does not follow from batch and sequence length")
            kind = (
                int
                if isinstance(value, torch.SymInt)
                else float
                if isinstance(value, torch.SymFloat)
                else bool
            )
            self._sizes[key] = kind(found)
        return self._sizes[key]

    def shape(self, node: Node, batch: int, seq: int) -> tuple[int, ...]:
        """Shape of a node's tensor value at B = ``batch``, S = ``seq``."""
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            raise EvaluationError(f"{node.name} has no tensor value")
        return tuple(self.size(d, batch, seq) for d in val.shape)

    # --- values

    def closure(self, node: Node, stop: Iterable[Node] = ()) -> list[Node]:
        """``node`` and what it is computed from, in execution order, not looking behind ``stop``."""
        found: set[Node] = set()
        stack = [node]
        ends = set(stop)
        while stack:
            n = stack.pop()
            if n in found:
                continue
            found.add(n)
            if n in ends or self._is_size(n):
                continue
            inputs = n.all_input_nodes[1:] if n.target in _LIKE else n.all_input_nodes
            stack.extend(inputs)
            stack.extend(m for m in self._mutators.get(n, ()) if m < node)
        return sorted(found)

    @staticmethod
    def _is_size(node: Node) -> bool:
        return isinstance(
            node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
        )

    def value(self, node: Node, batch: int, seq: int, given: Mapping[Node, Any] | None = None) -> Any:
        """What ``node`` computes at B = ``batch``, S = ``seq``, on the CPU, half precision widened to
        float32.

        ``given`` supplies values of nodes that are not size-only. Raises EvaluationError when an operation
        fails or depends on something unknown.
        """
        given = dict(given or {})
        order = self.closure(node, given)
        left: dict[Node, int] = {}
        for n in order:
            for a in n.all_input_nodes:
                left[a] = left.get(a, 0) + 1
        values: dict[Node, Any] = {}
        for n in order:
            values[n] = given[n] if n in given else self._run(n, values, batch, seq)
            for a in n.all_input_nodes:
                left[a] -= 1
                if not left[a] and a is not node:
                    values.pop(a, None)
        return values[node]

    def _run(self, n: Node, values: dict[Node, Any], batch: int, seq: int) -> Any:
        if self._is_size(n):
            return self.size(n.meta["val"], batch, seq)
        if n.op == "placeholder" and n.target in self._inputs:
            return torch.arange(seq).expand(batch, seq).clone()
        if n.op == "get_attr" and n.target in self._constants:
            tensor = self._constants[n.target].detach().cpu()
            return tensor.float() if tensor.dtype in _HALF else tensor
        if n.op != "call_function":
            raise EvaluationError(f"{n.name} ({n.op} {n.target}) is not computed from sizes")

        def lookup(a: Node) -> Any:
            if a in values:
                return values[a]
            if n.target in _LIKE:
                val = a.meta["val"]
                return torch.empty(self.shape(a, batch, seq), dtype=_widened(val.dtype))
            raise EvaluationError(f"{a.name} is not known while evaluating {n.name}")

        args = map_aggregate(map_arg(n.args, lookup), _on_cpu)
        kwargs = map_aggregate(map_arg(n.kwargs, lookup), _on_cpu)
        target: Callable[..., Any] = n.target  # type: ignore[assignment]
        try:
            with torch.no_grad():
                return target(*args, **kwargs)
        except Exception as error:
            raise EvaluationError(f"{n.name} fails at batch {batch}, length {seq}: {error}") from error

    def fingerprint(self, node: Node, given: Iterable[Node] = ()) -> int:
        """Equal for two nodes of this graph that are computed in the same way from equal constants.

        ``given`` nodes stand for themselves, told apart only by their order.
        """
        ends = list(given)
        done = {n: -1 - i for i, n in enumerate(ends)} if ends else self._prints
        if node in done:
            return done[node]
        for n in self.closure(node, ends):
            if n in done:
                continue
            if self._is_size(n):
                key: Any = ("size", str(n.meta["val"]))
            elif n in self.nodes and ends:
                done[n] = self.fingerprint(n)
                continue
            elif n.op == "get_attr" and n.target in self._constants:
                data = self._constants[str(n.target)].detach().cpu().contiguous()
                content = hash(data.reshape(-1).view(torch.uint8).numpy().tobytes())
                key = ("constant", str(data.dtype), tuple(data.shape), content)
            else:
                key = (n.op, str(n.target), str(map_arg((n.args, n.kwargs), lambda a: f"#{done.get(a, a)}")))
            done[n] = self._interned.setdefault(key, len(self._interned))
        return done[node]

    def landmarks(self, node: Node) -> list[int]:
        """Integers where ``node``'s value may change: literals and sizes of constants, ascending."""
        found: set[int] = set()

        def note(a: Any) -> Any:
            if isinstance(a, int) and not isinstance(a, bool):
                found.add(abs(a))
            return a

        for n in self.closure(node):
            if n.op == "get_attr":
                found.update(self._constants[str(n.target)].shape)
            elif n.op == "call_function":
                map_aggregate(n.args, note)
        return sorted(f for f in found if 2 <= f < 2**31)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, torch.dtype):
        return _widened(value)
    return value


def _input_symbols(gm: GraphModule) -> dict[Any, int]:
    """The symbols of the inputs' batch (0) and sequence (1) dimensions."""
    found: dict[Any, int] = {}
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        val = node.meta.get("val")
        if node.target in ("input_ids", "position_ids") and isinstance(val, Tensor) and val.ndim == 2:
            for which, d in enumerate(val.shape):
                if isinstance(d, torch.SymInt):
                    for symbol in d.node.expr.free_symbols:
                        found.setdefault(symbol, which)
    return found


def _written(node: Node) -> Node | None:
    """The tensor argument that an in-place operation changes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not node.target._schema.is_mutable or node.target in (aten.detach_.default,):
        return None
    for i, arg in enumerate(node.target._schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(arg.name)
            return value if isinstance(value, Node) else None
    return None
