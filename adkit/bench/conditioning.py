"""Random weights that round like trained ones: residual branches that do not outgrow the stream.

Hugging Face draws every matrix from normal(0, 0.02). At a real width each residual branch then adds many times what
the embedding put into the stream, layer upon layer, and a deep stack amplifies rounding as no trained model does:
Llama-3.1-8B's own bf16 run is off by 6%. Training needs the opposite, a perturbation that passes through any depth
without growing, and initialisations made for depth give it: output projections of residual branches scaled by
1/sqrt(number of branches) beside a stream of unit size (GPT-2; arXiv 1901.09321, 2002.10444, 2310.02244). What a branch
puts out is measured and set (arXiv 1511.06422) rather than derived from widths, so that attention, MLP and experts
weigh the same in the logits and a mistake in any of them shows.

Experts need one thing more. A router of random weights gives scores so close that the last chosen expert weighs as much
as the first, and which of two is the last is decided by rounding: a coin toss that swaps an eighth of a branch, in
Hugging Face's own bf16 run of Qwen3-30B-A3B too (0.055 with branches scaled, of 4 layers). A router that has learnt
tells its experts apart. So scores that go through a softmax are spread until the choice at the margin matters little;
scores that go through a sigmoid weigh the same however far they are spread and stay as they are.

Branches are found in the graph: the terms of the sum that the last norm reads. Routers are, too. Factors are powers of
two, so that the scaled weights are the same numbers in bfloat16 and float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.contract import AdkitError
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot

aten, ops = torch.ops.aten, torch.ops.adkit
#: Standard deviation of a token's routing scores over the experts: of 128, the best then weighs 60 times as much as the
#: eighth.
ROUTER_SPREAD = 4.0
_SUMS = {aten.add.Tensor, aten.add_.Tensor}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar}
#: Ops that pass their first input on as it is, other than in shape or dtype.
_PASSED = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim,
    aten.transpose.int, aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default,
    aten.dropout.default, aten.alias.default,
}  # fmt: skip
_NORMS = {ops.torch_rmsnorm.default, aten.layer_norm.default, aten.native_layer_norm.default}
#: Op -> where its output's weight and bias stand among its arguments; the output is proportional to them.
_WEIGHTS: dict[Any, tuple[int, int]] = {
    ops.torch_linear_simple.default: (1, 2),
    ops.torch_moe.default: (4, 6),
}


class NoStream(AdkitError):
    """The graph's residual stream is not a sum that this module knows how to scale."""


@dataclass(frozen=True)
class Branch:
    """One term of the residual sum: the tensors that it is proportional to, and what it is multiplied by after."""

    names: tuple[str, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class Stream:
    """The residual stream: the embeddings that it begins with, and the branches added to it, in the graph's order.

    ``routers``: the linear layers whose softmax chooses and weighs the experts of branches.
    """

    embeddings: tuple[Branch, ...]
    branches: tuple[Branch, ...]
    routers: tuple[Branch, ...] = ()


def residual_stream(graph: Snapshot) -> Stream:
    """The terms of the sum that the last norm reads, in a graph after pattern matching.

    Raises NoStream where a term is neither an embedding, nor a linear layer or experts times a number (a norm after
    each branch, say).
    """
    nodes = {n.id: n for n in graph}
    terms: dict[int, tuple[NodeRecord, float]] = {}
    _expand(nodes, _stream_end(graph, nodes), 1.0, terms)
    embeddings, branches = [], []
    order = {i: at for at, i in enumerate(nodes)}
    for node, factor in sorted(terms.values(), key=lambda t: order[t[0].id]):
        if node.target is aten.embedding.default:
            embeddings.append(Branch(_names(nodes, node, (0,)), factor))
        elif node.target in _WEIGHTS:
            branches.append(Branch(_names(nodes, node, _WEIGHTS[node.target]), factor))
        else:
            raise NoStream(
                f"a term of the residual stream is {node!r}, neither an embedding nor the output of a linear layer or "
                "of experts: there is no weight to scale it by"
            )
    if not embeddings or not branches:
        raise NoStream(
            f"the last norm reads a sum of {len(embeddings)} embeddings and {len(branches)} branches, so there is no "
            "residual stream"
        )
    return Stream(tuple(embeddings), tuple(branches), tuple(_routers(nodes)))


@torch.no_grad()
def factors(
    model: nn.Module, stream: Stream, tokens: Tensor, tied: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Powers of two, by name, that bring the embeddings' rms to about 1, each branch's to about 1/sqrt(branches) and
    the spread of routing scores to about ``ROUTER_SPREAD``.

    ``model`` is the Hugging Face model in float32 with its weights, which stay as they are; ``tokens`` [S] is what
    branches are measured on, in the order in which they run, each with those before it scaled. ``tied``: name -> name
    of the same tensor; a factor is given under all of its tensor's names.
    """
    state = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, float] = {}

    def put(term: Branch, wanted: float, size: float) -> float:
        size *= abs(term.factor)
        by = 2.0 ** round(math.log2(wanted / size)) if size > 0 and math.isfinite(size) else 1.0
        canonical = {(tied or {}).get(n, n) for n in term.names}
        found.update({n: by for n in state if (tied or {}).get(n, n) in canonical})
        return by

    def scaled(term: Branch, wanted: float) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            y = out[0] if isinstance(out, tuple) else out
            by = put(term, wanted, _rms(y))
            return (y * by, *out[1:]) if isinstance(out, tuple) else y * by

        return hook

    def spread(term: Branch) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            scores = nn.functional.linear(inputs[0], *(state[n] for n in term.names))
            by = put(term, ROUTER_SPREAD, _rms(scores - scores.mean(-1, keepdim=True)))
            scale(state, dict.fromkeys(term.names, by))
            before.update(dict.fromkeys(term.names, by))

        return hook

    for term in stream.embeddings:
        put(term, 1.0, _rms(state[term.names[0]]))
    before = dict(found)  # what is scaled while measuring
    hooks = []
    for term in stream.routers:
        owner = model.get_submodule(term.names[0].rpartition(".")[0])
        hooks.append(owner.register_forward_pre_hook(spread(term)))
    for term in stream.branches:
        owner = model.get_submodule(term.names[0].rpartition(".")[0])
        hooks.append(owner.register_forward_hook(scaled(term, 1 / math.sqrt(len(stream.branches)))))
    scale(state, before)
    try:
        model(tokens[None].to(next(model.parameters()).device), use_cache=False)
    finally:
        scale(state, {n: 1 / by for n, by in before.items()})  # exact: powers of two
        for hook in hooks:
            hook.remove()
    return found


@torch.inference_mode()
def scale(tensors: Mapping[str, Tensor], by: Mapping[str, float]) -> None:
    """Multiply tensors in place, each memory once, under whichever of its names."""
    done: set[int] = set()
    for name, tensor in tensors.items():
        if name in by and tensor.data_ptr() not in done:
            done.add(tensor.data_ptr())
            tensor.mul_(by[name])


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def _stream_end(graph: Snapshot, nodes: dict[int, NodeRecord]) -> int:
    """What the last norm reads: back from the logits to their linear layer, and through the norm before it."""
    at = next(n for n in graph if n.op == "output").inputs()[0]
    while nodes[at].op == "call_function" and nodes[at].target not in _WEIGHTS:
        at = nodes[at].inputs()[0]  # a softcap, a cast
    if nodes[at].op != "call_function":
        raise NoStream("the logits do not come from a linear layer")
    at = nodes[at].inputs()[0]
    while nodes[at].target in _PASSED:
        at = nodes[at].inputs()[0]
    return nodes[at].inputs()[0] if nodes[at].target in _NORMS else at


def _expand(
    nodes: dict[int, NodeRecord], at: int, factor: float, terms: dict[int, tuple[NodeRecord, float]]
) -> None:
    """Collect the terms of a sum, each with the number that it is multiplied by."""
    pending = [(at, factor)]
    while pending:
        at, factor = pending.pop()
        node = nodes[at]
        refs = node.inputs()
        if node.target in _SUMS and len(refs) == 2:
            pending += [(r, factor) for r in refs]
        elif node.target in _PASSED:
            pending.append((refs[0], factor))
        elif node.target in _PRODUCTS and len(refs) == 1 and isinstance(node.args[1], (int, float)):
            by = node.args[1]
            pending.append((refs[0], factor * by if "mul" in node.target_name else factor / by))
        else:
            terms[at] = (node, factor)


def _routers(nodes: dict[int, NodeRecord]) -> Iterator[Branch]:
    """The linear layers whose outputs are routing scores that go through a softmax."""
    for node in nodes.values():
        if node.target is not ops.torch_moe_topk.default or node.kwargs.get("score") == "sigmoid":
            continue
        at = nodes[node.inputs()[0]]
        while at.target in _PASSED:
            at = nodes[at.inputs()[0]]
        if at.target is ops.torch_linear_simple.default:
            yield Branch(_names(nodes, at, _WEIGHTS[at.target]))


def _names(nodes: dict[int, NodeRecord], node: NodeRecord, places: tuple[int, ...]) -> tuple[str, ...]:
    found = []
    for place in places:
        given = node.args[place] if place < len(node.args) else None
        if given is None:
            continue
        read = nodes[given.id] if isinstance(given, Ref) else node
        if read.target is aten.t.default:  # stored the other way around
            read = nodes[read.inputs()[0]]
        if read.op != "get_attr":
            raise NoStream(f"the weight of {node!r} is computed, not a parameter")
        found.append(str(read.target))
    return tuple(found)


__all__ = ["Branch", "NoStream", "Stream", "factors", "residual_stream", "scale"]
