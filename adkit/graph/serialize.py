"""Snapshots as JSON and back: graph text without weights, without pickle, without code.

Targets are stored by name and resolved only among torch's operators and a few builtin functions; symbolic
sizes are stored as text and parsed by a small arithmetic reader, never evaluated.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._sympy import functions as symfun

from adkit.graph.snapshot import NodeRecord, Ref, Snapshot

FORMAT = 1
_FUNCTIONS = {
    "FloorDiv",
    "Mod",
    "PythonMod",
    "Max",
    "Min",
    "CeilDiv",
    "CleanDiv",
    "IntTrueDiv",
    "ToFloat",
    "FloorToInt",
}
_MODULES = {"operator": operator, "_operator": operator, "math": math}
#: Builtin functions that stand in exported graphs: arithmetic on sizes, nothing that calls or looks up by
#: name.
_BUILTINS = {
    "add",
    "sub",
    "mul",
    "floordiv",
    "truediv",
    "mod",
    "pow",
    "neg",
    "pos",
    "abs",
    "getitem",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "and_",
    "or_",
    "not_",
    "xor",
    "lshift",
    "rshift",
    "ceil",
    "floor",
    "trunc",
    "sqrt",
    "log",
    "log2",
    "exp",
}


_PATH = re.compile(r"(?<![\w./~:])/(?:[^\s/:'\",()]+/)+([^\s/:'\",()]+)")


def portable(text: str) -> str:
    """Text without this machine's layout: of an absolute path only the last name stays."""
    return _PATH.sub(r"\1", text)


class SnapshotWriter:
    """Turns snapshots into JSON values; texts that many nodes share are stored once."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}
        self.rows: dict[int, int] = {}  # id(record) -> index
        self.records: list[dict[str, Any]] = []
        self._keep: list[NodeRecord] = []

    def add(self, snapshot: Snapshot) -> list[int]:
        """Indices (in :attr:`records`) of the snapshot's rows; rows shared between snapshots are stored
        once."""
        return [self._row(n) for n in snapshot]

    def _row(self, n: NodeRecord) -> int:
        if id(n) not in self.rows:
            self.rows[id(n)] = len(self.records)
            self._keep.append(n)
            self.records.append(
                {
                    "id": n.id,
                    "name": n.name,
                    "op": n.op,
                    "target": encode_target(n.target),
                    "args": encode(n.args),
                    "kwargs": encode(n.kwargs),
                    "val": encode_value(n.val),
                    "path": self._text(n.module_path),
                    "type": self._text(n.module_type),
                    "trace": self._text(_public_trace(n.stack_trace)),
                    "origins": list(n.origins),
                }
            )
        return self.rows[id(n)]

    def _text(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))

    def payload(self) -> dict[str, Any]:
        """Everything the snapshots added share."""
        return {"format": FORMAT, "texts": list(self.texts), "records": self.records}


def _public_trace(trace: str | None) -> str:
    """The innermost modelling frame alone, its file as a path below its package: no machine's layout is
    stored."""
    from adkit.graph.provenance import source_of

    source = source_of(trace)
    if source is None:
        return ""
    return f'File "{source.file}", line {source.line}, in {source.function}\n    {source.code}'


class SnapshotReader:
    """Turns what :class:`SnapshotWriter` wrote back into snapshots, with fake values over fresh symbols."""

    def __init__(self, payload: dict[str, Any]) -> None:
        if payload.get("format") != FORMAT:
            raise ValueError(f"graph data has format {payload.get('format')!r}; this version reads {FORMAT}")
        self.shape_env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shape_env, allow_non_fake_inputs=True)
        self._symbols: dict[str, sympy.Symbol] = {}
        self._hints: dict[sympy.Symbol, int] = {}
        texts = payload["texts"]
        self._rows = [self._record(r, texts) for r in payload["records"]]

    def snapshot(self, rows: list[int]) -> Snapshot:
        """The snapshot of these row indices."""
        return Snapshot(tuple(self._rows[i] for i in rows))

    def _record(self, r: dict[str, Any], texts: list[str]) -> NodeRecord:
        val = self._value(r["val"])
        path, kind, trace = texts[r["path"]], texts[r["type"]], texts[r["trace"]] or None
        meta: dict[str, Any] = {"val": val}
        if trace:
            meta["stack_trace"] = trace
        if path or kind:
            meta["nn_module_stack"] = {path: (path, kind)}
        return NodeRecord(
            id=r["id"],
            name=r["name"],
            op=r["op"],
            target=decode_target(r["op"], r["target"]),
            args=tuple(decode(r["args"])),
            kwargs=decode(r["kwargs"]),
            val=val,
            module_path=path,
            module_type=kind,
            stack_trace=trace,
            origins=tuple(r["origins"]),
            key=(None,) * 5,
            meta=meta,
        )

    def _value(self, v: Any) -> Any:
        if isinstance(v, dict) and "shape" in v:
            sizes = [self._size(d) for d in v["shape"]]
            strides = [self._size(d) for d in v["stride"]]
            with self.mode:
                return torch.empty_strided(
                    sizes, strides, dtype=getattr(torch, v["dtype"]), device=v["device"]
                )
        if isinstance(v, dict) and "sym" in v:
            return self._size(v["sym"])
        if isinstance(v, dict) and "tuple" in v:
            return tuple(self._value(x) for x in v["tuple"])
        return v

    def _size(self, d: int | str) -> Any:
        if isinstance(d, int):
            return d
        expr = parse_expr(d, self._symbol)
        if expr.is_Integer:
            return int(expr)
        return self.shape_env.create_symintnode(expr, hint=int(expr.subs(self._hints)))

    def _symbol(self, name: str) -> sympy.Symbol:
        if name not in self._symbols:
            from torch._dynamo.source import LocalSource

            hint = 5 + 2 * len(self._symbols)
            made = self.shape_env.create_symbol(hint, LocalSource(name), dynamic_dim=DimDynamic.DYNAMIC)
            self._symbols[name], self._hints[made] = made, hint
        return self._symbols[name]


def parse_expr(text: str, symbol: Any) -> sympy.Expr:
    """A size expression such as ``2*s0 + FloorDiv(s1, 4)``; ``symbol(name)`` gives each name's symbol."""

    def read(node: ast.expr) -> sympy.Expr:
        match node:
            case ast.Constant(value=int(v)):
                return sympy.Integer(v)
            case ast.Name(id=name):
                return symbol(name)
            case ast.UnaryOp(op=ast.USub(), operand=x):
                return -read(x)
            case ast.BinOp(left=a, op=ast.Add(), right=b):
                return read(a) + read(b)
            case ast.BinOp(left=a, op=ast.Sub(), right=b):
                return read(a) - read(b)
            case ast.BinOp(left=a, op=ast.Mult(), right=b):
                return read(a) * read(b)
            case ast.BinOp(left=a, op=ast.Pow(), right=b):
                return read(a) ** read(b)
            case ast.BinOp(left=a, op=ast.FloorDiv(), right=b):
                return symfun.FloorDiv(read(a), read(b))
            case ast.BinOp(left=a, op=ast.Div(), right=b):
                return read(a) / read(b)
            case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
                return getattr(symfun, name)(*(read(x) for x in args))
        raise ValueError(f"size expression {text!r} holds something that is not arithmetic on sizes")

    try:
        return read(ast.parse(text, mode="eval").body)
    except SyntaxError:
        raise ValueError(f"size expression {text!r} cannot be read") from None


def encode_value(v: Any) -> Any:
    """A fake tensor or size as JSON."""
    if isinstance(v, torch.Tensor):
        return {
            "shape": [_size(d) for d in v.shape],
            "stride": [_size(d) for d in v.stride()],
            "dtype": str(v.dtype).removeprefix("torch."),
            "device": str(v.device),
        }
    if isinstance(v, torch.SymInt):
        return {"sym": _size(v)}
    if isinstance(v, (tuple, list)):
        return {"tuple": [encode_value(x) for x in v]}
    return v if isinstance(v, (int, float, str, bool)) else None


def _size(d: Any) -> int | str:
    return d if isinstance(d, int) else str(d.node.expr)


def encode(v: Any) -> Any:
    """A node argument as JSON."""
    match v:
        case Ref(id=i):
            return {"ref": i}
        case None | bool() | int() | str():
            return v
        case float():
            return v if math.isfinite(v) else {"float": str(v)}
        case tuple():
            return {"tuple": [encode(x) for x in v]}
        case list():
            return [encode(x) for x in v]
        case dict():
            return {"dict": [[k, encode(x)] for k, x in v.items()]}
        case slice():
            return {"slice": [encode(v.start), encode(v.stop), encode(v.step)]}
        case torch.dtype() | torch.memory_format() | torch.layout():
            return {"torch": str(v).removeprefix("torch.")}
        case torch.device():
            return {"device": str(v)}
        case torch.SymInt():
            raise TypeError(
                f"a bare symbolic size {v} stands in a node's arguments; sizes must come from nodes"
            )
    raise TypeError(f"cannot store an argument of type {type(v).__name__} ({v!r}) of a graph node")


def decode(v: Any) -> Any:
    """The argument that :func:`encode` wrote."""
    if isinstance(v, list):
        return [decode(x) for x in v]
    if not isinstance(v, dict):
        return v
    ((kind, x),) = v.items()
    match kind:
        case "ref":
            return Ref(x)
        case "float":
            return float(x)
        case "tuple":
            return tuple(decode(y) for y in x)
        case "dict":
            return {k: decode(y) for k, y in x}
        case "slice":
            return slice(*(decode(y) for y in x))
        case "torch" if isinstance(
            found := getattr(torch, x, None), (torch.dtype, torch.memory_format, torch.layout)
        ):
            return found
        case "device":
            return torch.device(x)
    raise ValueError(f"graph data holds an unknown kind of argument {kind!r}")


def encode_target(target: Any) -> str:
    """A node target as text."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}::{target._schema.name.split('::')[1]}.{target._overloadname}"
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if module in _MODULES and name in _BUILTINS:
        return f"py::{module}.{name}"
    if name.startswith("sym_") and getattr(torch, name, None) is target:
        return f"py::torch.{name}"
    raise TypeError(
        f"cannot store call target {target!r}: only torch operators and builtin arithmetic can be read back"
    )


def decode_target(op: str, text: str) -> Any:
    """The target that :func:`encode_target` wrote; raises ValueError for one that is not known here."""
    if op != "call_function":
        return text
    namespace, _, rest = text.partition("::")
    name, _, overload = rest.rpartition(".")
    try:
        if namespace == "py":
            if name == "torch" and overload.startswith("sym_"):
                return getattr(torch, overload)
            if overload in _BUILTINS:
                return getattr(_MODULES[name], overload)
        else:
            found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
            if isinstance(found, torch._ops.OpOverload):
                return found
        raise KeyError(text)
    except (AttributeError, KeyError, RuntimeError):
        raise ValueError(
            f"graph data names the operator {text!r}, which this installation does not have"
        ) from None
