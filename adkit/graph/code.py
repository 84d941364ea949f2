"""A snapshot as a program that a person reads: inputs, statements, layers as one loop, return.

Statements are data first (:class:`Line`, with the ids each stands for), text last. Parameters are written
where they are used (``layer.self_attn.q_proj.weight``); a module's result carries the module's name, so that
replacing what is inside a module leaves the lines around it as they were. Trailing comments give shape and
dtype. The text is valid Python to look at, not meant to be run.
"""

from __future__ import annotations

import builtins
import keyword
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from adkit.graph.folding import LEAVES, Block, Folding, Segment, layers_text
from adkit.graph.provenance import layer_of, without_layer
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot

_END = 2**63 - 1
_INFIX = {
    "aten.add.Tensor": "+", "aten.sub.Tensor": "-", "aten.mul.Tensor": "*", "aten.div.Tensor": "/",
    "aten.add.Scalar": "+", "aten.sub.Scalar": "-", "aten.mul.Scalar": "*", "aten.div.Scalar": "/",
    "operator.add": "+", "operator.sub": "-", "operator.mul": "*", "operator.floordiv": "//",
    "operator.truediv": "/",
    "aten.add_.Tensor": "+=", "aten.lt.Scalar": "<", "aten.ge.Scalar": ">=", "aten.eq.Scalar": "==",
    "aten.pow.Tensor_Scalar": "**", "aten.matmul": "@",
}  # fmt: skip
_DTYPES = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16",
           "int64": "i64", "int32": "i32",
           "int8": "i8", "uint8": "u8", "bool": "bool", "complex64": "c64",
           "float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2"}  # fmt: skip
_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its text, its indentation depth, its trailing comment, and the node ids it stands for."""

    text: str
    depth: int = 0
    comment: str = ""
    ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        body = "    " * self.depth + self.text
        if not self.comment:
            return body.rstrip()
        return f"{body}  # {self.comment}" if self.text else f"{body}# {self.comment}"


def render(snapshot: Snapshot, fold: bool = True, layer: int | None = None, types: bool = True) -> str:
    """The program as text. ``layer=3`` shows that layer alone, unfolded; KeyError when there is none."""
    from adkit.graph.step import Text

    return Text("\n".join(str(line) for line in lines(snapshot, fold=fold, layer=layer, types=types)))


def lines(
    snapshot: Snapshot, *, fold: bool = True, layer: int | None = None, types: bool = True
) -> list[Line]:
    """The program as data; every call, input and output is on exactly one line (modulo folding)."""
    return _Writer(snapshot, types).write(fold, layer)


class Symbols:
    """Readable names of dynamic dimensions.

    B, S (T once packed), L for gathered rows, R for sequences, P for pages, M for pages of one sequence.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.names: dict[str, str] = {}
        for n in snapshot:
            if n.op == "placeholder" and n.shape is not None:
                self._input(n)
        self._taken = set(self.names.values())

    def _input(self, n: NodeRecord) -> None:
        shape = n.shape or ()
        for k, d in enumerate(shape):
            if isinstance(d, int) or d in self.names or not _WORD.fullmatch(d):
                continue
            if n.target_name in ("input_ids", "position_ids", "inputs_embeds"):
                packed = len(shape) == 1 or shape[0] == 1
                want = "T" if packed and k == len(shape[:2]) - 1 else "BS"[k] if k < 2 else "D"
            elif "indices" in n.target_name and len(shape) == 1:
                want = "L"
            elif n.target_name in ("cache_lens", "page_table"):
                want = "RM"[k]
            elif "cache" in n.target_name and k == 0:
                want = "P"
            else:
                want = "N"
            self.names[d] = self._free(want)

    def _free(self, want: str) -> str:
        taken, name, k = set(self.names.values()), want, 1
        while name in taken:
            k += 1
            name = f"{want}{k}"
        return name

    def dim(self, d: Any) -> str:
        """One dimension as text."""
        if isinstance(d, int):
            return str(d)

        def name(found: re.Match[str]) -> str:
            word = found.group(0)
            if re.fullmatch(r"[su]\d+", word) and word not in self.names:
                self.names[word] = self._free("N")
            return self.names.get(word, word)

        return _WORD.sub(name, str(d))

    def value(self, val: Any) -> str:
        """Shape and dtype of a value or record: ``[B, S, 4096] bf16``, ``(..., ...)``; else empty."""
        if isinstance(val, NodeRecord):
            if val.shape is None:
                return self.value(val.val)
            return f"[{', '.join(map(self.dim, val.shape))}] {dtype_text(val.dtype)}"
        if isinstance(val, torch.Tensor):
            return f"[{', '.join(map(self.dim, val.shape))}] {dtype_text(val.dtype)}"
        if isinstance(val, (tuple, list)):
            return f"({', '.join(self.value(v) or '-' for v in val)})"
        return ""


def dtype_text(dtype: Any) -> str:
    """A dtype in short: ``bf16``, ``i64``."""
    name = str(dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def op_text(n: NodeRecord) -> str:
    """A call's short name: ``aten.to.dtype`` -> ``to``, ``adkit.torch_rmsnorm`` -> ``torch_rmsnorm``."""
    parts = n.target_name.split(".")
    if n.op != "call_function" or len(parts) == 1:
        return n.target_name
    return parts[1] if parts[0] in ("aten", "adkit", "operator", "prims") else ".".join(parts[:2])


def symbols(snapshot: Snapshot) -> Symbols:
    """The readable dimension names of a snapshot."""
    return Symbols(snapshot)


class _Writer:
    def __init__(self, snapshot: Snapshot, types: bool) -> None:
        self.snapshot = snapshot
        self.types = types
        self.symbols = Symbols(snapshot)
        self.users = snapshot.users()
        self.names: dict[int, str] = {}
        self.used: set[str] = {"self", "i", "layer"}
        self.functions = {op_text(n) for n in snapshot if n.op == "call_function"}
        self.out: list[Line] = []
        self.module = ""

    def write(self, fold_layers: bool, layer: int | None) -> list[Line]:
        folding = self.snapshot.folding if fold_layers or layer is not None else _plain(self.snapshot)
        if layer is not None:
            return self.one_layer(folding, layer)
        self.inputs(folding)
        for s in folding:
            if s.variants:
                self.loop(s)
            else:
                self.statements([self.snapshot[i] for i in s.nodes], 1)
        return self.out

    # ---- pieces ------------------------------------------------------------------------------------

    def inputs(self, folding: Folding) -> None:
        rows: list[tuple[str, str, tuple[int, ...]]] = []
        placeholders = [n for n in self.snapshot if n.op == "placeholder"]
        for n in placeholders:
            if folding.representative[n.id] != n.id:
                continue
            ids = folding.same[n.id]
            if len(ids) > 1:
                name = self.free(re.sub(r"_*\d+", "", n.target_name) or n.name)
                layers = [b.layer for s in folding for b in s.blocks if set(b.leaves) & set(ids)]
                for i in ids:
                    self.names[i] = f"{name}[{layers[ids.index(i)]}]"
                self.names[n.id] = f"{name}[i]"
                rows.append((name, f"{len(ids)} x {self.symbols.value(n)}", ids))
            else:
                self.names[n.id] = self.free(n.target_name)
                rows.append((self.names[n.id], self.symbols.value(n), ids))
        self.out.append(Line("def forward("))
        self.out.append(Line("self,", 1))
        for name, text, ids in rows:
            self.out.append(Line(f"{name},", 1, text if self.types else "", ids))
        self.out.append(Line("):"))

    def loop(self, s: Segment) -> None:
        blocks = s.blocks
        if len(blocks) == 1:
            b = blocks[0]
            self.blank()
            self.out.append(Line("", 1, f"layer {b.layer}"))
            self.module = ""
            self.statements([self.snapshot[i] for i in b.nodes], 1)
            self.blank()
            return
        carried = self.carry(s)
        self.blank()
        numbers = [b.layer for b in blocks]
        over = _range(numbers)
        self.out.append(Line(f"for i in {over}:", 1, f"{len(blocks)} layers"))
        scope = set(self.used)
        for k, v in enumerate(s.variants):
            depth = 2
            if len(s.variants) > 1:
                depth = 3
                last = k == len(s.variants) - 1
                test = "else:" if last else f"{'if' if k == 0 else 'elif'} i in {_members(v.layers)}:"
                self.out.append(Line(test, 2, f"{layers_text(v.layers)}"))
            self.block(v.blocks, s, carried, depth)
            self.used = scope | {f"{n}" for n in carried}
        ends = blocks[-1]
        for v in s.variants:
            for b in v.blocks:
                for rep, i in zip(v.first.nodes, b.nodes, strict=True):
                    name = self.names.get(rep, "")
                    # read from outside, a value of a layer that is not the last needs its index
                    self.names[i] = name if b is ends or b is v.first else f"{name}[{b.layer}]"
        for v in s.variants:
            if v.first is not ends:
                for i in v.first.nodes:
                    self.names[i] = f"{self.names[i]}[{v.first.layer}]"
        for n in range(len(s.carries)):
            for i in ends.nodes:
                if self.wired.get((ends.layer, i)) == n:
                    self.names[i] = carried[n]
        self.used |= {self.names[i] for i in ends.nodes}
        self.blank()

    def carry(self, s: Segment) -> list[str]:
        """Names of the loop-carried values; writes the statements that give them their first value."""
        carried = []
        self.wired: dict[tuple[int, int], int] = {}
        blocks = s.blocks
        for n, reads in enumerate(s.carries):
            first = self.names[reads[0]]
            name = first if first in ("hidden", "residual") else self.free("hidden" if n == 0 else "residual")
            if first != name:
                self.out.append(Line(f"{name} = {first}", 1))
            carried.append(name)
            for k in range(1, len(blocks)):
                self.wired.setdefault((blocks[k - 1].layer, reads[k]), n)
        # the last layer's outputs: where its variant's other layers, or else its structure, have theirs
        outputs: dict[int, dict[int, int]] = {}
        for v_at, v in enumerate(s.variants):
            for b in v.blocks:
                for p, i in enumerate(b.nodes):
                    if (b.layer, i) in self.wired:
                        outputs.setdefault(v_at, {})[p] = self.wired[b.layer, i]
            for b in v.blocks:
                for p, n in outputs.get(v_at, {}).items():
                    self.wired.setdefault((b.layer, b.nodes[p]), n)
        return carried

    def block(self, blocks: tuple[Block, ...], s: Segment, carried: list[str], depth: int) -> None:
        first = blocks[0]
        nodes = [self.snapshot[i] for i in first.nodes]
        at = [b.layer for b in s.blocks].index(first.layer)
        outer = {reads[at]: carried[n] for n, reads in enumerate(s.carries)}
        hide = {i: self.names.get(i) for i in outer}
        self.names.update(outer)
        for leaf in first.leaves:
            n = self.snapshot[leaf]
            if n.op == "get_attr":
                self.names[leaf] = _attribute_in_loop(n)
        prefixes = {
            self.names[leaf].split(".layer.", 1)[0] for leaf in first.leaves if ".layer." in self.names[leaf]
        }
        if len(prefixes) == 1:
            self.out.append(Line(f"layer = {prefixes.pop()}[i]", depth))
            for leaf in first.leaves:
                self.names[leaf] = re.sub(r"^.*\.layer\.", "layer.", self.names[leaf])
        last_read = {i: max((p for p, n in enumerate(nodes) if i in n.inputs()), default=-1) for i in outer}
        of_carry = {carried.index(name): i for i, name in outer.items()}
        rename: dict[int, str] = {}
        alias: list[tuple[str, int]] = []
        for p, n in enumerate(nodes):
            k = self.wired.get((first.layer, n.id))
            if k is None:
                continue
            if last_read.get(of_carry.get(k, -1), -1) <= p:
                rename[n.id] = carried[k]
            else:
                alias.append((carried[k], n.id))
        self.module = ""
        columns = list(zip(*(b.nodes for b in blocks), strict=True))
        self.statements(nodes, depth, rename, {c[0]: c for c in columns})
        for name, i in alias:
            self.out.append(Line(f"{name} = {self.names[i]}", depth))
        for i, old in hide.items():
            if old is not None:
                self.names[i] = old

    def one_layer(self, folding: Folding, layer: int) -> list[Line]:
        if layer not in folding.layers:
            known = sorted(folding.layers)
            has = f"layers {known[0]} to {known[-1]}" if known else "no layers"
            raise KeyError(f"no layer {layer} in this graph, which has {has}")
        nodes = [self.snapshot[i] for i in folding.layers[layer].nodes]
        inside = {n.id for n in nodes}
        reads = dict.fromkeys(i for n in nodes for i in n.inputs() if i not in inside)
        outside = [self.snapshot[i] for i in reads if self.snapshot[i].op != "get_attr"]
        for n in outside:
            self.names[n.id] = self.free(self.plain_name(n))
        self.out.append(Line(f"def layer_{layer}("))
        self.out.append(Line("self,", 1))
        for n in outside:
            self.out.append(Line(f"{self.names[n.id]},", 1, self.symbols.value(n) if self.types else ""))
        self.out.append(Line("):"))
        self.statements(nodes, 1)
        results = [self.names[n.id] for n in nodes if any(u not in inside for u in self.users[n.id])]
        self.out.append(Line(f"return {', '.join(results)}", 1))
        return self.out

    # ---- statements ---------------------------------------------------------------------------------

    def statements(
        self,
        nodes: list[NodeRecord],
        depth: int,
        rename: dict[int, str] | None = None,
        same: dict[int, tuple[int, ...]] | None = None,
    ) -> None:
        results = self.results(nodes)
        groups = [_group(n) for n in nodes]
        for k, n in enumerate(nodes):
            if n.op == "placeholder":
                continue
            ids = (same or {}).get(n.id, (n.id,))
            if n.op == "get_attr":
                if not self.users[n.id]:
                    self.out.append(Line(self.attribute(n), depth, "not read", ids))
                continue
            if groups[k] != self.module:
                self.module = groups[k]
                if groups[k] and k + 1 < len(nodes) and groups[k + 1] == groups[k]:
                    self.out.append(Line("", depth, groups[k]))
            if n.op == "output":
                self.out.append(Line(f"return {self.expr(n.args[0])}", depth, "", ids))
                continue
            name = (rename or {}).get(n.id) or self.free(results.get(n.id) or self.plain_name(n))
            text = self.call(n)
            self.names[n.id] = name
            comment = self.symbols.value(n) if self.types else ""
            if not self.users[n.id]:
                self.out.append(Line(text, depth, comment, ids))
            else:
                self.out.append(Line(f"{name} = {text}", depth, comment, ids))

    def results(self, nodes: list[NodeRecord]) -> dict[int, str]:
        """Modules' names for their results, where a module has one and no other of its name is near."""
        inside: dict[str, list[NodeRecord]] = {}
        for n in nodes:
            if n.op == "call_function" and n.module_path:
                inside.setdefault(n.module_path, []).append(n)
        found: dict[int, str] = {}
        for path, members in inside.items():
            leaf = path.rsplit(".", 1)[-1]
            if leaf.isdigit() or not leaf.isidentifier():
                continue
            read = [n for n in members if any(not _within(self.snapshot[u], path) for u in self.users[n.id])]
            read = [n for n in read if isinstance(n.val, torch.Tensor)]
            if len(read) > 1:  # a cast at the entrance (a norm's) is not the module's result
                read = [
                    n for n in read if not (n.target_name.startswith("aten.to.") and self.enters(n, path))
                ]
            if len(read) == 1 and read[0].target_name != "aten.sym_size.int":
                found[read[0].id] = leaf
        names = list(found.values())
        return {i: name for i, name in found.items() if names.count(name) == 1}

    def enters(self, n: NodeRecord, path: str) -> bool:
        return not any(
            _within(self.snapshot[i], path) for i in n.inputs() if self.snapshot[i].op not in LEAVES
        )

    def plain_name(self, n: NodeRecord) -> str:
        if n.op in LEAVES:
            return re.sub(r"\W", "_", n.target_name)
        if isinstance(n.val, torch.SymInt):
            name = self.symbols.dim(str(n.val))
            if name.isidentifier() and name not in self.used:
                return name
        return re.sub(r"_default(?=_\d+$|$)", "", n.name)

    def free(self, want: str) -> str:
        if want in self.functions or keyword.iskeyword(want) or hasattr(builtins, want):
            want = f"{want}_0"  # FX counts view, view_1, ...; so a function's own name stays the function's
        name, k = want, 1
        while name in self.used:
            k += 1
            name = f"{want}_{k}"
        self.used.add(name)
        return name

    def call(self, n: NodeRecord) -> str:
        infix = _INFIX.get(n.target_name)
        if infix and infix != "+=" and len(n.args) == 2 and not n.kwargs:
            left, right = (self.expr(a) for a in n.args)
            return f"{left} {infix} {right}"
        if n.target_name == "operator.getitem":
            return f"{self.expr(n.args[0])}[{self.expr(n.args[1])}]"
        if n.target_name == "aten.slice.Tensor" and not n.kwargs and n.shape is not None:
            return self.slice(n)
        parts = [self.expr(a) for a in n.args]
        parts += [f"{k}={self.expr(v)}" for k, v in n.kwargs.items()]
        return f"{op_text(n)}({', '.join(parts)})"

    def slice(self, n: NodeRecord) -> str:
        args = [*n.args, *[None] * (5 - len(n.args))]
        dim, start, stop, step = int(args[1] or 0), args[2], args[3], args[4]
        rank = len(n.shape or ())
        dim %= rank
        low = "" if start in (None, 0) else self.expr(start)
        high = "" if stop is None or stop == _END else self.expr(stop)
        part = f"{low}:{high}" + (f":{self.expr(step)}" if step not in (None, 1) else "")
        lead = "..., " if dim == rank - 1 and rank > 1 else ":, " * dim
        return f"{self.expr(args[0])}[{lead}{part}]"

    def attribute(self, n: NodeRecord) -> str:
        return "self." + re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", n.target_name)

    def expr(self, value: Any) -> str:
        if isinstance(value, Ref):
            n = self.snapshot[value.id]
            if value.id in self.names:
                return self.names[value.id]
            return self.attribute(n) if n.op == "get_attr" else n.name
        if isinstance(value, tuple):
            return f"({', '.join(map(self.expr, value))}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.expr, value))}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{k!r}: {self.expr(v)}' for k, v in value.items())}}}"
        if isinstance(value, slice):
            parts = [value.start, value.stop, *([value.step] if value.step is not None else [])]
            return ":".join("" if p is None else self.expr(p) for p in parts)
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
            return repr(str(value).removeprefix("torch."))
        if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
            return f"float('{value}')"
        return "END" if value == _END and isinstance(value, int) else _literal(value)

    def blank(self) -> None:
        if self.out and str(self.out[-1]):
            self.out.append(Line(""))
        self.module = ""


def _literal(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str, complex)):
        return repr(value)
    if value is Ellipsis:
        return "..."
    return re.sub(r"\W+", "_", str(getattr(value, "__name__", type(value).__name__)))


def _plain(snapshot: Snapshot) -> Folding:
    return Folding((Segment(nodes=tuple(n.id for n in snapshot)),))


def _group(n: NodeRecord) -> str:
    """The module a statement is filed under: first step below the layer, else the whole path."""
    if n.op == "output":
        return ""
    path = n.module_path if n.module_path.replace(".", "").replace("_", "").isalnum() else ""
    if path.startswith("_"):
        return ""
    if layer_of(path) is None:
        return path
    return without_layer(path).split("*", 1)[1].lstrip(".").split(".", 1)[0]


def _within(n: NodeRecord, path: str) -> bool:
    return n.module_path == path or n.module_path.startswith(f"{path}.")


def _attribute_in_loop(n: NodeRecord) -> str:
    """A parameter of its own layer: ``self.model.layers.layer.mlp.weight`` (``.layer.`` marks the index)."""
    if layer_of(n.target_name) is not None:
        return "self." + re.sub(
            r"\.(\d+)(?=\.|$)", r"[\1]", without_layer(n.target_name).replace("*", "layer", 1)
        )
    return "self." + re.sub(r"_*\d+", "[i]", n.target_name, count=1)


def _range(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"range({numbers[-1] + 1})" if numbers[0] == 0 else f"range({numbers[0]}, {numbers[-1] + 1})"
    return _members(tuple(numbers))


def _members(layers: tuple[int, ...]) -> str:
    """Layer indices as Python: a tuple, or a range where they are evenly spaced."""
    step = layers[1] - layers[0] if len(layers) > 1 else 0
    if len(layers) > 2 and all(b - a == step for a, b in pairwise(layers)):
        tail = f", {step}" if step != 1 else ""
        return f"range({layers[0]}, {layers[-1] + 1}{tail})"
    return f"({', '.join(map(str, layers))}{',' if len(layers) == 1 else ''})"


__all__ = ["Line", "Symbols", "dtype_text", "lines", "op_text", "render", "symbols"]
