"""What a model must read and compute, whatever runs it, and the least time a machine needs for that.

Counted on the graph as it stands after pattern matching, before anything is fused, so that the figures do not
depend on the kernels. Bytes: every weight once a step, a table that is only looked up (the embedding) left out, a
tied lm_head included; of E experts those that T tokens are expected to hit, E (1 - (1 - k/E)^T), which is k of E for
one token. FLOPs: two a weight and token in linears and the k experts of a token, lm_head only for rows of logits
asked for, and 2 (H + Hv) a head and each (query, key) pair that the mask lets through (a causal half, so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adkit.bench.machine import Ceilings
from adkit.graph.cost import Sizes, attended_pairs, call_of, count
from adkit.graph.snapshot import NodeRecord, Snapshot
from adkit.ops.registry import info_of
from adkit.workbench import Workbench

_TOKENS = 64  # any number of tokens at which linears are counted; divided out again
_MATMULS = ("aten.mm", "aten.bmm", "aten.matmul", "aten.linear", "aten.addmm", "aten.baddbmm")


@dataclass(frozen=True)
class Attention:
    """One layer's attention: FLOPs a (query, key) pair, cache bytes a token, tokens a query sees at most."""

    pair_flops: float
    token_bytes: int
    reach: int | None


@dataclass(frozen=True)
class Work:
    """What a model needs.

    ``dense_bytes`` of weights a step, ``expert_bytes`` of all experts, of which a token uses the share ``active``;
    ``token_flops`` a token without lm_head, ``row_flops`` a row of logits.
    """

    dense_bytes: int
    expert_bytes: int
    active: float
    token_flops: float
    row_flops: float
    attention: tuple[Attention, ...]

    def weight_bytes(self, tokens: int = 1) -> float:
        """Weight bytes a step of so many tokens reads."""
        return self.dense_bytes + self.expert_bytes * (1 - (1 - self.active) ** tokens)

    @property
    def cache_token_bytes(self) -> int:
        """Bytes of keys and values of one token, all layers."""
        return sum(a.token_bytes for a in self.attention)

    def cache_bytes(self, contexts: np.ndarray) -> float:
        """Bytes of keys and values that a decode token reads in each sequence, contexts int [R], in all."""
        total = 0.0
        for reach in {a.reach for a in self.attention}:
            seen = contexts if reach is None else np.minimum(contexts, reach)
            total += float(seen.sum()) * sum(a.token_bytes for a in self.attention if a.reach == reach)
        return total

    def attention_flops(self, tokens: int) -> float:
        """FLOPs of attention within one prompt of so many tokens."""
        return sum(a.pair_flops * attended_pairs(tokens, window=a.reach) for a in self.attention)

    def prefill_flops(self, tokens: int) -> float:
        """FLOPs of one prompt, to its first token: the model's own, causal half of attention counted."""
        return self.token_flops * tokens + self.row_flops + self.attention_flops(tokens)


def work_of(wb: Workbench) -> Work:
    """The work of a Workbench's model, which must be past pattern matching."""
    done = [s for s in wb.steps if s.stage == "pattern_matcher" and len(s.after)]
    return work_of_graph(done[-1].after)


def work_of_graph(graph: Snapshot) -> Work:
    """The work of an uncached graph of canonical ops, see the module's docstring."""
    sizes = Sizes(graph, {"batch": 1, "seq": _TOKENS, "logits": _TOKENS} if _gathers(graph) else
                  {"batch": 1, "seq": _TOKENS})  # fmt: skip
    head = _lm_head(graph)
    dense: dict[str, int] = {}
    experts: dict[str, int] = {}
    active, token_flops, row_flops = 1.0, 0.0, 0.0
    attention = []
    for n in graph:
        if n.op != "call_function":
            continue
        info = info_of(n.target)
        kind = info.category if info is not None else "linear" if n.target_name in _MATMULS else ""
        call = call_of(n, graph, sizes) if kind in ("linear", "moe", "attention") else None
        if kind == "moe" and call is not None and "topk_ids" not in call.values:
            kind, call = "routing", None  # small, and every token reads it whole
        weights = {graph[i].target: graph[i].val for i in n.inputs() if graph[i].op == "get_attr"}
        if n.target_name != "aten.embedding":
            for name, val in weights.items():
                where = experts if kind == "moe" else dense
                where[name] = val.numel() * val.dtype.itemsize
        if call is None:
            continue
        if kind == "attention":
            attention.append(_attention(call))
            continue
        if kind == "moe":
            active = call["topk_ids"].shape[-1] / call["gate_up"].shape[0]
        flops = count(n, call)[0] / _TOKENS
        if n is head:
            row_flops += flops
        else:
            token_flops += flops
    experts = {name: size for name, size in experts.items() if name not in dense}
    return Work(sum(dense.values()), sum(experts.values()), active, token_flops, row_flops, tuple(attention))


def _gathers(graph: Snapshot) -> bool:
    return any(n.op == "placeholder" and n.target == "logits_indices" for n in graph)


def _lm_head(graph: Snapshot) -> NodeRecord | None:
    """The last matmul before the output."""
    ahead = [i for n in graph if n.op == "output" for i in n.inputs()]
    while ahead:
        n = graph[ahead.pop(0)]
        info = info_of(n.target)
        if n.target_name in _MATMULS or (info is not None and info.category == "linear"):
            return n
        ahead += n.inputs()
    return None


def _attention(call: Any) -> Attention:
    q, k, v = call["query"], call["key"], call["value"]
    heads = 2 if call.get("layout", "bsnd") == "bsnd" else 1
    each = k.shape[heads] * (k.shape[-1] * k.dtype.itemsize + v.shape[-1] * v.dtype.itemsize)
    return Attention(
        2.0 * q.shape[heads] * (q.shape[-1] + v.shape[-1]),
        each,
        call.get("window") or call.get("chunk"),
    )


def least_seconds(
    work: Work, ceilings: Ceilings, prompts: Sequence[int], news: Sequence[int], cache_tokens: int
) -> float:
    """Seconds that requests of these lengths, all there at once, take at the machine's measured rates.

    A simulation of an engine without overheads: requests are admitted in order as soon as ``cache_tokens``
    hold them whole. A step takes max(weight bytes / memory rate, linear FLOPs / matmul) for the linears of all its
    tokens (prompts newly admitted and one token a running request), plus attention FLOPs of those prompts /
    matmul, plus cache bytes that its decoding requests read / memory rate. Raises nothing; a request larger than
    the cache is let in when it is alone.
    """
    prompt, new = np.asarray(prompts, dtype=np.int64), np.asarray(news, dtype=np.int64)
    made = np.zeros_like(new)
    admitted, seconds = 0, 0.0
    running = np.zeros(len(new), dtype=bool)
    while True:
        used = int((prompt + new)[running].sum())
        first = admitted
        while admitted < len(new) and (used + prompt[admitted] + new[admitted] <= cache_tokens or used == 0):
            used += int(prompt[admitted] + new[admitted])
            admitted += 1
        decoding = np.flatnonzero(running)
        if not len(decoding) and first == admitted:
            return seconds
        fresh = prompt[first:admitted]
        tokens = int(fresh.sum()) + len(decoding)
        rows = len(decoding) + len(fresh)
        flops = work.token_flops * tokens + work.row_flops * rows
        seconds += max(work.weight_bytes(tokens) / ceilings.memory, flops / ceilings.matmul)
        seconds += sum(map(work.attention_flops, fresh.tolist())) / ceilings.matmul
        seconds += work.cache_bytes((prompt + made)[decoding]) / ceilings.memory
        running[first:admitted] = True
        made[running] += 1
        running &= made < new


__all__ = ["Attention", "Work", "least_seconds", "work_of", "work_of_graph"]
