"""What each node costs: FLOPs, bytes moved, and the time a roofline gives on a named device.

A node's cost depends on sizes that a graph leaves open, so they are given as ``symbols``: by friendly name
(:data:`NAMES`) or by the symbol's own name (``s31``). ``context`` is the history a cached attention reads:
tokens a sequence, this step's included. A packed graph needs ``tokens``; unless told otherwise it holds one
sequence, as many pages as ``context`` fills, and gives one row of logits a sequence. An op's own count is
registered in :data:`COSTS`; the rest are taken to read every input and write every output once, at one
operation an element.

The roofline (Williams et al. 2009): seconds = max(FLOPs / peak, bytes / bandwidth), every node alone, no
caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from adkit.graph.snapshot import NodeRecord, Ref, Snapshot

#: Friendly names of open sizes: which placeholder's dimension each one is.
NAMES: dict[str, tuple[str, int]] = {
    "batch": ("input_ids", 0),
    "seq": ("input_ids", 1),
    "tokens": ("input_ids", 1),
    "sequences": ("cache_lens", 0),
    "max_pages": ("page_table", 1),
    "logits": ("logits_indices", 0),
    "pages": ("*_cache", 0),
}
#: Sizes that are no dimension of any tensor.
FREE_NAMES = ("context",)


@dataclass(frozen=True)
class Device:
    """Peaks of one device: ``bandwidth`` bytes/s, ``flops`` FLOP/s by dtype name (``bfloat16``).

    ``memory``: bytes it has, 0 where that is not known.
    """

    name: str
    bandwidth: float
    flops: dict[str, float]
    source: str
    memory: float = 0.0

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s in ``dtype``; float16 counts as bfloat16, anything else unlisted as float32."""
        name = str(dtype).removeprefix("torch.")
        return self.flops.get("bfloat16" if name == "float16" else name, self.flops["float32"])


DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device(
            "H100 SXM",
            3.03e12,
            {"bfloat16": 793e12, "float32": 67e12},
            "measured: device copy, large bfloat16 matmul; float32: NVIDIA H100 datasheet, SXM, without TF32",
            80e9,
        ),
        Device(
            "H200",
            4.3e12,
            {"bfloat16": 790e12, "float32": 67e12},
            "measured: device copy, large bfloat16 matmul; float32: NVIDIA H200 datasheet, without TF32",
            141e9,
        ),
        Device(
            "A100 SXM 80GB",
            2.039e12,
            {"bfloat16": 312e12, "float32": 19.5e12},
            "NVIDIA A100 datasheet, 80GB SXM, dense",
            80e9,
        ),
        Device(
            "2-core CPU",
            2e10,
            {"bfloat16": 5e10, "float32": 1e11},
            "rough: two AVX2 cores at about 3 GHz, two channels of DDR4",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class NodeCost:
    """FLOPs, bytes read and written, roofline seconds, and what bounds them: compute, memory or nothing."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    bound: str = "nothing"

    def __add__(self, other: NodeCost) -> NodeCost:
        """Both, one after the other; bound by what most of the time is."""
        longer = self if self.seconds >= other.seconds else other
        return NodeCost(
            self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds, longer.bound
        )


@dataclass(frozen=True, slots=True)
class TensorSize:
    """A tensor with every size known; ``stored`` elements lie behind it, fewer than ``numel`` if expanded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: int
    contiguous: bool = True

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes to read it once."""
        return self.stored * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Call:
    """One call: arguments by schema name (tensors as :class:`TensorSize`), outputs, sizes given."""

    target: str
    values: dict[str, Any]
    outputs: tuple[TensorSize, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument ``name``, or ``default`` where the call leaves it out."""
        return self.values.get(name, default)

    @property
    def inputs(self) -> list[TensorSize]:
        """Tensors read, those in lists included."""
        return list(_tensors(self.values.values()))

    @property
    def traffic(self) -> float:
        """Bytes of every input read once and every output written once."""
        return float(
            sum(t.bytes for t in self.inputs) + sum(t.numel * t.dtype.itemsize for t in self.outputs)
        )


def _tensors(values: Iterable[Any]) -> Iterator[TensorSize]:
    for v in values:
        if isinstance(v, TensorSize):
            yield v
        elif isinstance(v, (tuple, list)):
            yield from _tensors(v)


CostFn = Callable[[Call], tuple[float, float]]

#: (FLOPs, bytes) of a call by target name, as ``adkit.torch_attention``; ops add theirs when they are
#: defined.
COSTS: dict[str, CostFn] = {}


def counts(*targets: str) -> Callable[[CostFn], CostFn]:
    """Decorator: register a cost function for these target names."""

    def add(fn: CostFn) -> CostFn:
        COSTS.update(dict.fromkeys(targets, fn))
        return fn

    return add


def matmul(call: Call, inner: TensorSize) -> tuple[float, float]:
    """2 M N K for any product whose sum runs over ``inner``'s last dimension."""
    return 2.0 * call.outputs[0].numel * inner.shape[-1], call.traffic


counts("aten.mm", "aten.bmm", "aten.matmul")(lambda c: matmul(c, c["self"]))
counts("aten.linear")(lambda c: matmul(c, c["input"]))
counts("aten.addmm")(lambda c: matmul(c, c["mat1"]))
counts("aten.baddbmm")(lambda c: matmul(c, c["batch1"]))


@counts("aten.embedding", "aten.index_select", "aten.gather", "aten.index.Tensor")
def _rows(call: Call) -> tuple[float, float]:
    """Only the rows asked for are read."""
    table = call.inputs[0]
    rows = sum(t.numel * t.dtype.itemsize for t in call.outputs)
    return 0.0, float(2 * rows + sum(t.bytes for t in call.inputs if t is not table))


@lru_cache(maxsize=256)
def attended_pairs(
    queries: int, past: int = 0, causal: bool = True, window: int | None = None, chunk: int | None = None
) -> int:
    """(query, key) pairs a mask lets through, for ``queries`` tokens after ``past`` earlier ones."""
    if causal and window is None and chunk is None:
        return queries * past + queries * (queries + 1) // 2
    total = past + queries
    pairs = 0
    for i in range(past, total):
        low, high = 0, i + 1 if causal else total
        if window is not None:
            low, high = max(low, i - window + 1), min(high, i + window)
        if chunk is not None:
            low, high = max(low, i // chunk * chunk), min(high, (i // chunk + 1) * chunk)
        pairs += high - low
    return pairs


@counts("aten.scaled_dot_product_attention")
def _sdpa(call: Call) -> tuple[float, float]:
    """2 (H + Hv) a pair and head; a mask tensor is not looked into."""
    q, k, v = call["query"], call["key"], call["value"]
    queries, keys = q.shape[-2], k.shape[-2]
    pairs = attended_pairs(queries) if call.get("is_causal", False) else queries * keys
    return 2.0 * math.prod(q.shape[:-2]) * pairs * (q.shape[-1] + v.shape[-1]), call.traffic


#: ATen ops that move or create elements and compute nothing.
_MOVES = (
    *("clone", "contiguous", "to", "_to_copy", "copy", "copy_", "cat", "stack", "repeat", "flip", "roll"),
    *("index_copy", "index_copy_", "index_put", "index_put_", "scatter", "where", "masked_fill"),
    *("constant_pad_nd", "arange", "full", "zeros", "ones", "empty", "new_ones", "new_zeros"),
)


def _is_view(node: NodeRecord, call: Call) -> bool:
    """A call whose schema returns its own input's memory, unless it had to copy."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return call.target == "operator.getitem" or not call.outputs
    returns = node.target._schema.returns
    aliased = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    if not aliased or not call.inputs:
        return False
    source = call.inputs[0]
    copies = call.target == "aten.contiguous" and not source.contiguous
    return not copies and all(t.dtype == source.dtype for t in call.outputs)


def count(node: NodeRecord, call: Call) -> tuple[float, float]:
    """(FLOPs, bytes) of one call."""
    if call.target in COSTS:
        return COSTS[call.target](call)
    if not call.outputs or _is_view(node, call):
        return 0.0, 0.0
    if call.target.startswith("aten.") and call.target.split(".")[1] in _MOVES:
        return 0.0, call.traffic
    return float(max(t.numel for t in (*call.inputs, *call.outputs))), call.traffic


class Sizes:
    """Turns a graph's open sizes into numbers.

    Raises ValueError for a name that is neither a friendly one nor a symbol of the graph, for two values of
    one symbol, and when asked for a size that was not given.
    """

    def __init__(self, snapshot: Snapshot, symbols: Mapping[str, int]) -> None:
        inputs = {
            n.target: n.val for n in snapshot if n.op == "placeholder" and isinstance(n.val, torch.Tensor)
        }
        self.given = dict(symbols)
        self._known: dict[str, int] = {}
        self._friendly: dict[str, str] = {}
        cache = next((v for n, v in inputs.items() if n.endswith("_cache")), None)
        if cache is not None:
            inputs["*_cache"] = cache
        for name, (placeholder, dim) in NAMES.items():
            if placeholder in inputs and inputs[placeholder].dim() > dim:
                self._friendly[name] = str(inputs[placeholder].shape[dim])
        found = {str(s) for v in inputs.values() for d in v.shape for s in _free_symbols(d)}
        for name, value in symbols.items():
            symbol = self._friendly.get(name, name)
            if name in FREE_NAMES or symbol.isdigit():
                continue
            if name not in NAMES and symbol not in found:
                raise ValueError(f"size {name!r} is not one of this graph's; it has {self._describe(found)}")
            if self._known.setdefault(symbol, value) != value:
                raise ValueError(f"size {symbol} was given twice: {self._known[symbol]} and {name}={value}")
        if "page_table" in inputs:
            self._packed(inputs["*_cache"].shape[1])
        self._evaluated: dict[Any, int] = {}

    def _packed(self, page_size: Any) -> None:
        """Sizes of a packed batch that follow from others where they were not given."""
        sequences = self._known.get(self._friendly["sequences"], 1)
        tokens = self._known.get(self._friendly["tokens"], sequences)
        pages = math.ceil(max(self.given.get("context", 0), tokens / sequences) / int(page_size))
        for name, value in (
            ("batch", 1),
            ("sequences", 1),
            ("logits", sequences),
            ("max_pages", pages),
            ("pages", 1 + sequences * pages),
        ):
            if name in self._friendly:
                self._known.setdefault(self._friendly[name], value)

    def _describe(self, symbols: Iterable[str]) -> str:
        names = {s: [n for n, of in self._friendly.items() if of == s] for s in sorted(symbols)}
        return ", ".join(f"{s} ({' or '.join(n)})" if n else s for s, n in names.items()) or "none open"

    def number(self, size: Any) -> int:
        """The value of an int or symbolic size."""
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._evaluated:
            free = _free_symbols(size)
            missing = [str(s) for s in free if str(s) not in self._known]
            if missing:
                raise ValueError(f"the cost needs sizes that were not given: {self._describe(missing)}")
            self._evaluated[expr] = int(expr.subs({s: self._known[str(s)] for s in free}))
        return self._evaluated[expr]

    def tensor(self, val: torch.Tensor) -> TensorSize:
        """Sizes of a (fake) tensor."""
        shape = tuple(self.number(d) for d in val.shape)
        stored = math.prod(
            d for d, s in zip(shape, val.stride(), strict=True) if not (isinstance(s, int) and s == 0)
        )
        expected = 1
        contiguous = True
        for d, s in zip(reversed(shape), reversed(val.stride()), strict=True):
            contiguous &= d == 1 or self.number(s) == expected
            expected *= d
        return TensorSize(shape, val.dtype, stored, contiguous)

    def value(self, value: Any) -> Any:
        """A node's value with tensors as :class:`TensorSize` and symbolic numbers as ints."""
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, (tuple, list)):
            return tuple(self.value(v) for v in value)
        return self.number(value) if isinstance(value, torch.SymInt) else value


def _free_symbols(size: Any) -> list[Any]:
    return [] if isinstance(size, int) else sorted(size.node.expr.free_symbols, key=str)


def call_of(node: NodeRecord, snapshot: Snapshot, sizes: Sizes) -> Call:
    """A call node with its arguments bound to schema names and every size known."""

    def resolve(value: Any) -> Any:
        if isinstance(value, Ref):
            return sizes.value(snapshot[value.id].val)
        if isinstance(value, (tuple, list)):
            return tuple(resolve(v) for v in value)
        return value

    names: list[str] = []
    if isinstance(node.target, torch._ops.OpOverload):
        names = [a.name for a in node.target._schema.arguments]
    values = {names[i] if i < len(names) else str(i): resolve(a) for i, a in enumerate(node.args)}
    values |= {name: resolve(a) for name, a in node.kwargs.items()}
    outputs = tuple(_tensors((sizes.value(node.val),)))
    return Call(node.target_name, values, outputs, sizes.given)


def device_named(device: Device | str) -> Device:
    """The device meant; raises ValueError naming those known."""
    if isinstance(device, Device):
        return device
    if device not in DEVICES:
        raise ValueError(f"no device is called {device!r}; known: {', '.join(DEVICES)}, or give a Device")
    return DEVICES[device]


def node_costs(
    snapshot: Snapshot, device: Device | str, symbols: Mapping[str, int], only: Container[int] | None = None
) -> dict[int, NodeCost]:
    """The cost of every call node, by node id; of those in ``only`` where it is given."""
    on, sizes = device_named(device), Sizes(snapshot, symbols)
    found: dict[int, NodeCost] = {}
    for node in snapshot:
        if node.op != "call_function" or (only is not None and node.id not in only):
            continue
        call = call_of(node, snapshot, sizes)
        flops, moved = count(node, call)
        # A product is of its weight's dtype, however wide its input's norm or its sum are.
        weights = [w for name in ("weight", "gate_up") if isinstance(w := call.get(name), TensorSize)]
        floats = (t.dtype for t in (*weights, *call.outputs, *call.inputs) if t.dtype.is_floating_point)
        compute, memory = flops / on.peak(next(floats, torch.float32)), moved / on.bandwidth
        bound = "nothing" if not (flops or moved) else "compute" if compute > memory else "memory"
        found[node.id] = NodeCost(flops, moved, max(compute, memory), bound)
    return found


def total_cost(costs: Iterable[NodeCost]) -> NodeCost:
    """All of them one after another; bound by what most of the time is."""
    each = list(costs)
    time = {b: sum(c.seconds for c in each if c.bound == b) for b in ("compute", "memory")}
    seconds = sum(time.values())
    bound = max(time, key=lambda b: time[b]) if seconds else "nothing"
    return NodeCost(sum(c.flops for c in each), sum(c.bytes for c in each), seconds, bound)


def cost_table(snapshot: Snapshot, device: Device | str, symbols: Mapping[str, int]) -> Any:
    """The costs as a pandas DataFrame, one row a call node; in ``.attrs`` the ``total`` (a :class:`NodeCost`) and the
    ``device`` (a :class:`Device`).

    Columns: name, target, layer, module, flops, bytes, seconds, bound; index: node id.
    """
    import pandas as pd

    costs = node_costs(snapshot, device, symbols)
    rows = [
        {
            "id": i,
            "name": snapshot[i].name,
            "target": snapshot[i].target_name,
            "layer": snapshot[i].layer,
            "module": snapshot[i].module_path,
            "flops": c.flops,
            "bytes": c.bytes,
            "seconds": c.seconds,
            "bound": c.bound,
        }
        for i, c in costs.items()
    ]
    columns = ["id", "name", "target", "layer", "module", "flops", "bytes", "seconds", "bound"]
    table = pd.DataFrame(rows, columns=columns).set_index("id")
    table["layer"] = table["layer"].astype("Int64")
    table.attrs |= {"total": total_cost(costs.values()), "device": device_named(device)}
    return table


def weight_bytes(snapshot: Snapshot) -> int:
    """Bytes of the parameters and buffers the graph reads, each once."""
    read = {i for n in snapshot for i in n.inputs()}
    tensors = {n.target: n.val for n in snapshot if n.op == "get_attr" and n.id in read}
    return sum(t.numel() * t.dtype.itemsize for t in tensors.values() if isinstance(t, torch.Tensor))
