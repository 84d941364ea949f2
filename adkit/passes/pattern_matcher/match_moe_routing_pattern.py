"""``match_moe_routing_pattern``: scores, choice and weights of a router as one op."""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import dtype_of, shape_of
from adkit.graph.provenance import source_of
from adkit.graph.shape_only import EvaluationError, ShapeOnly
from adkit.graph.step import PassInfo
from adkit.ops.registry import info_of
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.pattern_matcher.masks import NotUnderstood
from adkit.passes.pattern_matcher.scores import SOFTMAXES, readers, with_asserts
from adkit.passes.registry import register

aten = torch.ops.aten
MOE = torch.ops.adkit.torch_moe.default
TOPK = torch.ops.adkit.torch_moe_topk.default
_PRODUCTS = frozenset({aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default})
_PROOF_SIZE = (3, 16)  # batch, sequence
_SMALL = 1e-3  # an eps is below it


@dataclass(frozen=True)
class _Router:
    """From ``logits`` [..., E], and perhaps a ``bias`` [E], to ``weights`` and ``ids`` [..., k] of experts."""

    logits: Node
    bias: Node | None
    weights: Node
    ids: Node
    models: tuple[Node, ...]  # only their dtype is looked at
    nodes: list[Node]  # between, in order, ``weights`` and ``ids`` included

    @property
    def given(self) -> list[Node]:
        """What it computes from."""
        return [self.logits] if self.bias is None else [self.logits, self.bias]

    @property
    def ends(self) -> list[Node]:
        """Where it begins."""
        return [*self.given, *self.models]

    @property
    def experts(self) -> int:
        """E."""
        return int((shape_of(self.logits) or (0,))[-1])

    @property
    def k(self) -> int:
        """Experts a token."""
        return int((shape_of(self.ids) or (0,))[-1])


@register
class MatchMoERouting(Pass):
    """Replace what stands between a router's logits and its experts by one ``torch_moe_topk``.

    A router is five to twenty small operations on [T, E], each a launch of its own that computes next to
    nothing. They are not compared with known texts: whatever leads from the router's product to the experts'
    ids and weights is run on random logits, in its own dtypes, and must give what the op gives with one of
    its options. A router that gives something else stays as it is, and the step says so.

        before: p = softmax(logits.float()); w, ids = topk(p, 8); w = (w / w.sum(-1, True)).to(bf16)
        after:  w, ids = torch_moe_topk(logits, 8, normalize=True, dtype=bf16)
    """

    key = "match_moe_routing_pattern"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Look above the experts of every layer."""
        experts = [n for n in gm.graph.nodes if n.target is MOE and not _is_routed(n)]
        if not experts:
            return PassInfo()
        reader = _Reader(ShapeOnly(gm, buffers=False))
        refused: Counter[str] = Counter()
        count = 0
        for moe in experts:
            try:
                found = reader.read(moe)
                options = reader.options(found)
            except (NotUnderstood, EvaluationError) as error:
                refused[f"{source_of(moe.args[1].meta.get('stack_trace')) or moe.name}: {error}"] += 1
                continue
            last = max(found.weights, found.ids)
            with self.site(gm, with_asserts(found.nodes), label="router", before=last) as s:
                args = (found.logits, found.k) if found.bias is None else (found.logits, found.k, found.bias)
                both = s.call(TOPK, args, options)
                for i, old in enumerate((found.weights, found.ids)):
                    s.replace(old, s.call(operator.getitem, (both, i), like=old))
            count += 1
        return PassInfo(num_matches=count, details={"not matched": dict(refused)} if refused else {})


def _is_routed(moe: Node) -> bool:
    source = moe.args[1].args[0] if isinstance(moe.args[1], Node) and moe.args[1].args else None
    return isinstance(source, Node) and source.target is TOPK


class _Reader:
    """Finds routers, and the options of each distinct way of writing one."""

    def __init__(self, shapes: ShapeOnly) -> None:
        self.shapes = shapes
        self._known: dict[Any, dict[str, Any] | None] = {}

    def read(self, moe: Node) -> _Router:
        """The router above the experts; NotUnderstood says what is not as it should be."""
        ids, weights = moe.args[1], moe.args[2]
        if not isinstance(ids, Node) or not isinstance(weights, Node):
            raise NotUnderstood("ids and weights are not computed")
        inside, sources = _above(ids, weights)
        logits = [n for n in sources if n.op != "get_attr"]
        if len(logits) != 1 or not isinstance((shape_of(logits[0]) or (None,))[-1], int):
            raise NotUnderstood(f"it reads {len(logits)} products")
        asked = {n.args[1] for n in inside if n.target is aten.type_as.default}
        models = tuple(sorted(n for n in asked - inside if isinstance(n, Node)))
        # What is computed from constants alone (a bias that is reshaped) is given as well.
        varying = _depending(inside, logits[0])
        fixed = {a for n in varying for a in n.all_input_nodes} - varying - {logits[0], *models}
        constants = [n for n in fixed if isinstance(n.meta.get("val"), Tensor) and n not in self.shapes]
        if len(constants) > 1:
            raise NotUnderstood(f"it reads {len(constants)} constants")
        bias = constants[0] if constants else None
        experts = (shape_of(logits[0]) or ())[-1]
        if bias is not None and shape_of(bias) != (experts,):
            raise NotUnderstood(f"its constant is not one number for each of {experts} experts")
        ends = {n for n in (logits[0], bias, *models) if n is not None}
        region = {*self.shapes.closure(weights, ends), *self.shapes.closure(ids, ends)} - ends
        nodes = sorted(region)
        last = max(weights, ids)
        for n in nodes:
            outside = [u for u in readers(n) if u not in region]
            if outside and not _is_size(n) and (n not in (weights, ids) or min(outside) < last):
                raise NotUnderstood("something else reads a value inside the router")
        return _Router(logits[0], bias, weights, ids, models, [n for n in nodes if not _is_size(n)])

    def options(self, found: _Router) -> dict[str, Any]:
        """Keyword arguments of ``torch_moe_topk``, defaults left out; NotUnderstood where there are none."""
        key = (
            self.shapes.fingerprint(found.weights, found.ends),
            self.shapes.fingerprint(found.ids, found.ends),
            *((shape_of(n) or ())[-1] for n in found.given),
            *(dtype_of(n) for n in (*found.ends, found.weights)),
        )
        if key not in self._known:
            self._known[key] = self._by_value(found)
        options = self._known[key]
        if options is None:
            raise NotUnderstood("it is no known router")
        return options

    def _by_value(self, found: _Router) -> dict[str, Any] | None:
        """Options with which the op gives what the nodes give, to the bit where there are such."""
        dtypes = [dtype_of(n) or torch.float32 for n in (*found.given, found.weights)]
        numbers = _numbers(found.nodes)
        logits = _logits(self.shapes.shape(found.logits, *_PROOF_SIZE), numbers).to(dtypes[0])
        values = {found.logits: logits}
        generator = torch.Generator().manual_seed(1)
        if found.bias is not None:
            values[found.bias] = (torch.randn(found.experts, generator=generator) * 0.3).to(dtypes[1])
        want = _dense(*self._run(found, values), logits)
        close = None
        for options in _candidates(found, numbers):
            if dtypes[-1] != torch.promote_types(dtypes[0], torch.float32):
                options["dtype"] = dtypes[-1]
            mine, ids = TOPK(logits, found.k, values.get(found.bias) if found.bias else None, **options)
            got = _dense(mine, ids, logits)
            if got.dtype != want.dtype:
                continue
            if torch.equal(got, want):
                return options
            # In float32 the order of sums may differ; 16 bits show where a value was rounded.
            if (
                close is None
                and want.dtype == torch.float32
                and torch.allclose(got, want, rtol=2e-6, atol=0.0)
            ):
                close = options
        return close

    def _run(self, found: _Router, given: dict[Node, Tensor]) -> tuple[Tensor, Tensor]:
        """Weights and ids that the nodes compute, on the CPU."""
        values: dict[Node, Any] = {n: t.clone() for n, t in given.items()}

        def value(n: Node) -> Any:
            if n not in values and _is_size(n):
                values[n] = self.shapes.size(n.meta["val"], *_PROOF_SIZE)
            elif n not in values:  # only its shape is looked at
                values[n] = torch.empty(self.shapes.shape(n, *_PROOF_SIZE), dtype=dtype_of(n))
            return values[n]

        for n in found.nodes:
            if n.op != "call_function":
                raise NotUnderstood(f"it reads {n.target}")
            args, kwargs = map_arg(map_aggregate((n.args, n.kwargs), _on_cpu), value)
            with torch.no_grad():
                values[n] = n.target(*args, **kwargs)  # type: ignore[operator]
        return values[found.weights], values[found.ids]


def _above(*outputs: Node) -> tuple[set[Node], list[Node]]:
    """The nodes above, up to products, adkit's ops and inputs of the graph, and these."""
    inside: set[Node] = set()
    sources: dict[Node, None] = {}
    stack = list(outputs)
    while stack:
        n = stack.pop()
        if n in inside or n in sources:
            continue
        if n.op != "call_function" or n.target in _PRODUCTS or info_of(n.target) is not None:
            sources[n] = None
        elif not _is_size(n):
            inside.add(n)
            stack.extend(n.all_input_nodes[:1] if n.target is aten.type_as.default else n.all_input_nodes)
    return inside, list(sources)


def _depending(nodes: set[Node], source: Node) -> set[Node]:
    """Those of the nodes that are computed from ``source``."""
    found = {source}
    for n in sorted(nodes):
        if any(a in found for a in n.all_input_nodes):
            found.add(n)
    return found - {source}


def _candidates(found: _Router, numbers: list[float]) -> Iterator[dict[str, Any]]:
    """Options to try, those with the router's own constants first."""
    sums: list[dict[str, Any]] = [
        *({"normalize": True, "eps": x} for x in numbers if 0 < x < _SMALL),
        *({"normalize": True, "floor": x} for x in numbers if 0 < x < _SMALL),
        {},
        {"normalize": True},
    ]
    scales: list[dict[str, Any]] = [{}, *({"scale": x} for x in numbers if x >= _SMALL and x != 1.0)]
    whole = [int(x) for x in numbers if x == int(x) and 0 < x < found.experts]
    groups: list[dict[str, Any]] = [{}]
    if sum(n.target is aten.topk.default for n in found.nodes) > 1:
        groups += [
            {"groups": g, "top_groups": t}
            for g, t in itertools.product(whole, whole)
            if found.experts % g == 0 and t < g and t * (found.experts // g) >= found.k
        ]
    softmaxed = {(shape_of(n) or (0,))[-1] for n in found.nodes if n.target in SOFTMAXES}
    scores: list[dict[str, Any]] = [
        *([{}] if found.experts in softmaxed else []),
        *([{"score": "topk_softmax"}] if found.k in softmaxed else []),
        *([{"score": "sigmoid"}] if any(n.target is aten.sigmoid.default for n in found.nodes) else []),
    ]
    for score, group, total, scale in itertools.product(scores, groups, sums, scales):
        yield {**score, **group, **total, **scale}


def _numbers(nodes: list[Node]) -> list[float]:
    """The finite positive literals among the arguments, ascending."""
    found: set[float] = set()

    def note(a: Any) -> Any:
        if isinstance(a, int | float) and not isinstance(a, bool) and math.isfinite(a) and a > 0:
            found.add(float(a))
        return a

    for n in nodes:
        map_aggregate((n.args, n.kwargs), note)
    return sorted(found)


def _logits(shape: tuple[int, ...], numbers: list[float]) -> Tensor:
    """Random logits, no two of a row the same in 16 bits; in some rows so low that a sigmoid is about an eps."""
    generator = torch.Generator().manual_seed(0)
    *rows, experts = shape
    count = math.prod(rows)
    ranks = torch.stack([torch.randperm(max(512, experts), generator=generator) for _ in range(count)])
    logits = (ranks[:, :experts] - 256) / 32
    for i, low in enumerate(x for x in numbers if x < _SMALL):
        logits[i] = round(math.log(low)) - logits[i].argsort().argsort() / 4
    return logits.view(shape)


def _dense(weights: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
    """Weights by expert: routers may name their experts in any order."""
    if weights.shape != ids.shape or weights.shape[:-1] != logits.shape[:-1]:
        raise NotUnderstood("ids and weights are not one row a token")
    return torch.zeros_like(logits, dtype=weights.dtype).scatter(-1, ids, weights)


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | int)
