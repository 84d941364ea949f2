"""``match_rmsnorm_pattern``: root-mean-square norms as one op."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import (
    Match,
    Pat,
    args_of,
    aten,
    dtype_of,
    find,
    mean,
    named,
    pattern,
    rsqrt,
    same_shape,
    shape_of,
    sqrt,
    square,
    term_of,
    uncast,
)
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register


def _normed(x: Pat, eps: Pat) -> Pat:
    return named("normed", x * rsqrt(named("mean", mean(square(x))) + eps))


@pattern
def rmsnorm_offset(x: Pat, weight: Pat, offset: Pat, eps: Pat) -> Pat:
    """Gemma: weights stored as w, used as 1 + w."""
    return named("scaled", _normed(x, eps) * (weight + offset))


@pattern
def rmsnorm(x: Pat, weight: Pat, eps: Pat) -> Pat:
    """Llama and most others."""
    return named("scaled", _normed(x, eps) * weight)


@pattern
def rmsnorm_by_division(x: Pat, weight: Pat, eps: Pat) -> Pat:
    """x / sqrt(...) in place of x * rsqrt(...)."""
    return named("scaled", named("normed", x / sqrt(named("mean", mean(square(x))) + eps)) * weight)


@pattern
def rmsnorm_scale_free(x: Pat, eps: Pat) -> Pat:
    """No weight at all."""
    return _normed(x, eps)


@register
class MatchRMSNorm(Pass):
    """Replace each root-mean-square norm by one ``torch_rmsnorm``.

    Seven nodes (cast, square, mean, + eps, rsqrt, scale, weight) become one that a fused kernel can take: the
    block reads its input once instead of five times. Weights as w or 1 + w, before or after the cast back, or
    none. Layer norms, and norms that do not accumulate in float32, are left alone.

        before: h = x.float(); w * (h * rsqrt(h.pow(2).mean(-1, True) + 1e-6)).to(x.dtype)
        after:  torch_rmsnorm(x, w, 1e-6)
    """

    key = "match_rmsnorm_pattern"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every match."""
        count = 0
        for match in find(gm, rmsnorm_offset, rmsnorm, rmsnorm_by_division, rmsnorm_scale_free):
            args = _arguments(match)
            if args is None:
                continue
            with self.site(gm, match.nodes, label="rmsnorm", before=match.root) as s:
                s.replace(match.root, s.call(torch.ops.adkit.torch_rmsnorm.default, args, like=match.root))
            count += 1
        for node in [n for n in gm.graph.nodes if n.target is aten.rms_norm.default]:
            args = _builtin_arguments(node)
            if args is not None:
                with self.site(gm, [node], label="rmsnorm", before=node) as s:
                    s.replace(node, s.call(torch.ops.adkit.torch_rmsnorm.default, args, like=node))
                count += 1
        return PassInfo(num_matches=count)


def _arguments(match: Match) -> tuple[Any, ...] | None:
    """Arguments of the op that rounds exactly as the match does; None when there are none."""
    out = dtype_of(match.root)
    eps, bound = match["eps"], match.bound
    x = uncast(match["x"], out) if out is not None else None
    if x is None or not isinstance(eps, float) or not same_shape(x, match.root) or _is_centred(x):
        return None
    if dtype_of(match["normed"]) != torch.float32 or dtype_of(match["mean"]) != torch.float32:
        return None
    if "weight" not in bound:
        return x, None, eps
    scaled, offset = match["scaled"], bound.get("offset", 0.0)
    used = next((a for a in scaled.args if isinstance(a, Node) and uncast(a) is match["normed"]), None)
    wide = dtype_of(used) == torch.float32
    if not isinstance(match["weight"], Node) or not isinstance(offset, (int, float)):
        return None
    weight = uncast(match["weight"]) if wide else match["weight"]
    if len(shape_of(weight) or ()) != 1:
        return None
    if offset and wide and dtype_of(match["weight"]) != torch.float32:
        return None  # 1 + w was rounded before it was cast
    if not wide and (dtype_of(used) != out or dtype_of(scaled) != out):
        return None
    if wide and (out != torch.float32 or dtype_of(weight) != torch.float32):
        return x, weight, eps, float(offset), True
    return (x, weight, eps, float(offset)) if offset else (x, weight, eps)


def _is_centred(x: Node) -> bool:
    """True for x - mean(x): the block is a layer norm written out."""
    term = term_of(x)
    if term is None or term.op != "sub":
        return False
    inner = term_of(uncast(term.args[1])) if isinstance(term.args[1], Node) else None
    return inner is not None and inner.op == "mean"


def _builtin_arguments(node: Node) -> tuple[Any, ...] | None:
    """Arguments for ``aten.rms_norm`` over the last dimension (its default eps is the dtype's epsilon)."""
    x, shape, weight, eps = (*args_of(node), None, None)[:4]
    dtype = dtype_of(x)
    if len(shape) != 1 or dtype is None:
        return None
    eps = torch.finfo(dtype).eps if eps is None else eps
    return (x, weight, eps) if weight is None or dtype == torch.float32 else (x, weight, eps, 0.0, True)
