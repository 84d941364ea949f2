"""Rules for ops that compute: element by element, along a dimension, norms, attention, products."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.fx import Node

from adkit.graph.matching import arg, same_size
from adkit.ops.registry import info_of
from adkit.passes.sharding.layout_rules import within
from adkit.passes.sharding.op_kinds import (
    ATTENTION,
    EINSUM,
    IN_PLACE,
    RMSNORM,
    adkit_ops,
    aten,
    einsum_letters,
    elementwise,
    name_of,
)
from adkit.passes.sharding.spread import TERM, Share, Spread, rank_of, shape_of

if TYPE_CHECKING:
    from adkit.passes.sharding.rules import Walk


def _broadcast(w: Walk, node: Node, operands: Iterable[Any], out_rank: int) -> Spread:
    """Operands laid over each other from the right; all pieces on one dimension, whole ones sliced where they have
    it."""
    tensors = [a for a in operands if isinstance(a, Node) and shape_of(a)]
    lead: Spread | None = None
    size: Any = None
    for a in tensors:
        s = w.found.of(a)
        if s.kind != "cut":
            continue
        here = s.at(s.dim + out_rank - rank_of(a))
        if lead is None:
            lead, size = here, shape_of(a)[s.dim]
        elif here.dim != lead.dim or not same_size(size, shape_of(a)[s.dim]):
            raise w.unaccounted(node, f"operands are cut on dimensions {lead.dim} and {here.dim}")
        else:
            w.join(node, lead, here)
    assert lead is not None
    for a in tensors:
        if w.found.of(a).kind == "cut":
            continue
        dim = lead.dim - out_rank + rank_of(a)
        if dim < 0 or shape_of(a)[dim] == 1:
            continue
        if not same_size(shape_of(a)[dim], size):
            raise w.unaccounted(node, f"{a.name} does not have the size of what is cut")
        w.slice(node, a, dim, lead)
    return lead


def _elementwise_rule(w: Walk, node: Node) -> Spread:
    if node.target in IN_PLACE:
        kept = w.found.of(node.args[0])
        others = [a for a in node.args[1:] if isinstance(a, Node) and w.found.of(a).kind == "cut"]
        if kept.kind != "cut" and others:
            raise w.unaccounted(node, "writes pieces into a value that is whole")
    return _broadcast(w, node, node.all_input_nodes, rank_of(node))


def _along(w: Walk, node: Node) -> Spread:
    """Reductions, softmax, sorting: fine along dimensions that are not cut."""
    x = node.args[0]
    if any(w.found.of(a).kind == "cut" for a in node.all_input_nodes if a is not x):
        raise w.unaccounted(node, "more than its input is cut")
    s, rank = w.found.of(x), rank_of(x)
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    name = "dim" if "dim" in schema else "dims"
    dims = arg(node, schema.index(name), name) if name in schema else None
    if dims is None or dims == []:
        raise w.unaccounted(node, f"{name_of(node.target)} goes over every dimension")
    along = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if s.dim in along and name_of(node.target) == "sum" and s.stacked:
        return TERM  # each rank adds up its part; heads and features are not summed so: nobody expects that exchange
    if s.dim in along:
        raise w.unaccounted(node, f"{name_of(node.target)} goes over the dimension that is cut")
    val = node.meta["val"]
    out = val[0].dim() if isinstance(val, (tuple, list)) else val.dim()
    s = s if out == rank else s.at(s.dim - sum(d < s.dim for d in along))
    return (s,) * len(val) if isinstance(val, (tuple, list)) else s  # type: ignore[return-value]


def _rmsnorm(w: Walk, node: Node) -> Spread:
    x, weight = node.args[0], arg(node, 1, "weight")
    s, rank = w.found.of(x), rank_of(x)
    if s.kind != "cut":
        raise w.unaccounted(node, "its weight is cut, but not what it normalises")
    if s.dim == rank - 1:
        if s.share is None:
            raise w.unaccounted(node, "normalises over several blocks that are cut")
        w.found.norms.add(node)
    if isinstance(weight, Node) and rank_of(weight) >= rank - s.dim:
        return _broadcast(w, node, (x, weight), rank)
    return s


def _last_dim_rule(w: Walk, node: Node) -> Spread:
    s, rank = w.found.of(node.args[0]), rank_of(node.args[0])
    width = len(node.args[1]) if node.target is aten.layer_norm.default else 1  # type: ignore[arg-type]
    if s.kind != "cut" or s.dim >= rank - width:
        raise w.unaccounted(node, "normalises over the dimension that is cut")
    return s


def _rope(w: Walk, node: Node) -> tuple[Spread, Spread]:
    q, k = node.args[0], node.args[1]
    if any(w.found.of(a).kind == "cut" for a in node.args[2:]):
        raise w.unaccounted(node, "its angles are cut")
    for x in (q, k):
        s = w.found.of(x)
        if s.kind == "cut" and s.dim == rank_of(x) - 1:
            raise w.unaccounted(node, "rotates along the dimension that is cut", x)
    return w.found.of(q), w.found.of(k)


def _packed(w: Walk, node: Node) -> Spread:
    s = w.found.of(node.args[0])
    if s.dim != rank_of(node) - 1:
        return s
    part = [within(s, 0, s.blocks[0][0]), within(s, s.blocks[0][0], 2 * s.blocks[0][0])] if s.blocks else []
    if len(s.blocks) != 2 or part[0] is None or part[1] is None:
        raise w.unaccounted(node, "its two halves are not cut alike")
    w.join(node, part[0], part[1])
    return part[0]


def _attention(w: Walk, node: Node) -> Spread:
    q, k, v = node.args[:3]
    if w.attention_dp:
        raise w.unaccounted(node, "every rank attends to sequences of its own")
    layout = node.kwargs.get("layout", "bsnd")
    at = 2 if layout == "bsnd" else 1
    spread = w.found.of(q)
    if spread.kind != "cut" or spread.dim != at or spread.share is None:
        raise w.unaccounted(node, "its queries are not cut by heads, but something else is cut")
    heads, kv_heads = int(shape_of(q)[at]), int(shape_of(k)[at])
    spread.share.whole_pieces(heads)
    spread.share.need(exact=True, heads="query heads")
    for name, x in (("keys", k), ("values", v)):
        s = w.found.of(x)
        if s.kind == "cut":
            if kv_heads == 1 and s.dim == rank_of(x) - 1 and s.share is not None and not s.share.exact:
                s = s.at(at)  # one head for all queries: every rank holds it as a whole
            if s.dim != at or s.share is None:
                raise w.unaccounted(node, f"its {name} are not cut by heads", x)
            s.share.whole_pieces(kv_heads)
            s.share.need(exact=s.share.pieces != kv_heads, heads="key/value heads")
        elif kv_heads > 1:
            share = Share(kv_heads)
            share.need(heads="key/value heads")
            w.slice(node, x, at, Spread("cut", at, share))  # type: ignore[arg-type]
    by_head = Spread("cut", 0, spread.share)
    for position, name, dim in ((3, "attn_bias", -3), (4, "sinks", 0), (5, "alibi_slopes", 0)):
        extra = arg(node, position, name)
        if not isinstance(extra, Node):
            continue
        s, size = w.found.of(extra), shape_of(extra)
        dim = dim % len(size) if len(size) >= -dim else None  # type: ignore[assignment]
        if s.kind == "cut" and s.dim != dim:
            raise w.unaccounted(node, f"its {name} are not cut by heads")
        if s.kind != "cut" and dim is not None and size[dim] == heads and heads > 1:
            w.slice(node, extra, dim, by_head)
    return spread


def _matmul(w: Walk, node: Node) -> Spread:
    a, b = node.args[0], node.args[1]
    ra, rb, out = rank_of(a), rank_of(b), rank_of(node)
    sa, sb = w.found.of(a), w.found.of(b)
    inner_a, inner_b = sa.kind == "cut" and sa.dim == ra - 1, sb.kind == "cut" and sb.dim == max(rb - 2, 0)
    if inner_a and inner_b and sa.share is not None and sb.share is not None:
        sa.share.join(sb.share)
        sa.share.need(exact=True)
        return TERM
    if inner_a != inner_b and min(ra, rb) > 1 and (sa if inner_a else sb).stacked:
        other, dim, lead = (b, rb - 2, sa) if inner_a else (a, ra - 1, sb)
        if w.found.of(other).kind != "cut":  # weights of experts, say: a rank takes those of its own
            w.slice(node, other, dim, lead)  # type: ignore[arg-type]
            return TERM
    if inner_a or inner_b or min(ra, rb) < 2:
        raise w.unaccounted(node, "sums over a dimension of which only one side is cut")
    if sa.kind == "cut" and sa.dim == ra - 2 and sb.kind != "cut":
        return sa.at(out - 2)
    if sb.kind == "cut" and sb.dim == rb - 1 and sa.kind != "cut":
        return sb.at(out - 1)
    if any(s.kind == "cut" and s.dim >= r - 2 for s, r in ((sa, ra), (sb, rb))):
        raise w.unaccounted(node, "its sides are cut on different dimensions")
    return _broadcast(w, node, (a, b), out)


def _baddbmm(w: Walk, node: Node) -> Spread:
    out = rank_of(node)
    for a in node.all_input_nodes:
        s = w.found.of(a)
        if s.kind == "cut" and s.dim + out - rank_of(a) != 0:
            raise w.unaccounted(node, "its matrices are cut, not their batch")
    return _broadcast(w, node, node.args[:3], out)


def _einsum(w: Walk, node: Node) -> Spread:
    """By letters: one that is cut is cut in every operand that has it; one that is summed leaves a term."""
    found = einsum_letters(node)
    if found is None:
        raise w.unaccounted(node, "its equation leaves letters open")
    inputs, output = found
    operands = list(zip(cast(Any, node.args[1]), inputs, strict=True))
    spreads = [(w.found.of(a), letters) for a, letters in operands if w.found.of(a).kind == "cut"]
    lead, first = spreads[0]
    letter = first[lead.dim]
    if any(letters[s.dim] != letter for s, letters in spreads):
        raise w.unaccounted(node, "its operands are cut on different letters")
    whole = [
        (a, letters.index(letter))
        for a, letters in operands
        if letter in letters and w.found.of(a).kind != "cut"
    ]
    if letter not in output and (lead.share is None or (whole and not lead.stacked)):
        raise w.unaccounted(node, "sums over a dimension of which only one side is cut")
    for s, _ in spreads[1:]:
        w.join(node, lead, s)
    for a, dim in whole:
        w.slice(node, a, dim, lead)
    if letter in output:
        return lead.at(output.index(letter))
    for share in lead.shares:
        share.need(exact=True)
    return TERM


#: The rule of each op.
COMPUTE_RULES: dict[Any, Callable[[Walk, Node], Any]] = {
    RMSNORM: _rmsnorm,
    **dict.fromkeys((adkit_ops.torch_l2norm.default, aten.layer_norm.default), _last_dim_rule),
    adkit_ops.torch_rope_with_explicit_cos_sin.default: _rope,
    adkit_ops.torch_rope_with_qk_interleaving.default: _rope,
    adkit_ops.torch_rope_with_complex_freqs.default: _rope,
    adkit_ops.torch_swiglu_packed.default: _packed,
    ATTENTION: _attention,
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _matmul),
    aten.baddbmm.default: _baddbmm,
    EINSUM: _einsum,
}
_ALONG_NAMES = {
    "sum", "mean", "amax", "amin", "argmax", "argmin", "softmax", "_softmax", "log_softmax", "cumsum", "cumprod",
    "sort", "topk", "var", "std", "linalg_vector_norm", "logsumexp", "flip", "any", "all",
}  # fmt: skip


def rule_by_name(target: Any) -> Callable[[Walk, Node], Any] | None:
    """The rule of a family of ops: elementwise, or along dimensions that they name."""
    if elementwise(target):
        return _elementwise_rule
    if info_of(target) is not None or not isinstance(target, torch._ops.OpOverload):
        return None
    return _along if name_of(target) in _ALONG_NAMES else None
