"""``fuse_rope_kv_cache``: norm of heads, RoPE and cache write as one op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from adkit.graph.matching import dtype_of, shape_of
from adkit.graph.step import PassInfo
from adkit.ops.backends import pick
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.cache_init.insert_cached_attention import bound_arguments
from adkit.passes.post_load_fusion._fused import BackendConfig, every
from adkit.passes.registry import register


@register
class FuseRopeKVCache(Pass):
    """Rotate queries and keys and write the cache in one op.

    A decode step moves a few kilobytes a layer between projection and attention; as norm of q, norm of k, RoPE
    and cache write that costs four launches. The fused op reads q, k and v where the projection left them;
    attention then finds this step's keys and values in its cache, and its slot_mapping becomes None. Norms are
    taken in where they work on single heads and nobody else reads them; layers without RoPE keep their own
    write. On ``auto`` only where the device is CUDA.

        before: q, k = rope(rmsnorm(q, wq), rmsnorm(k, wk), cos, sin, 2)
                o = attention_with_paged_cache(q, k, v, ..., slot_mapping, k_cache, v_cache)
        after:  q, k = rope_kv_cache(q, k, v, wq, wk, cos, sin, slot_mapping, k_cache, v_cache)
                o = attention_with_paged_cache(q, k, v, ..., None, k_cache, v_cache)
    """

    key = "fuse_rope_kv_cache"
    stage = Stage.CACHE_INIT
    Config: ClassVar[type[PassConfig]] = BackendConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every cached attention whose query and key one RoPE gives."""
        if self.config.backend == "auto" and ctx.device.type != "cuda":
            return PassInfo(
                skipped=True, reason=f"on {ctx.device.type} nothing is gained: launches cost little there"
            )
        attention = every("attention_with_paged_cache")
        target = pick("rope_kv_cache", self.config.backend, ctx.device)
        norms_taken = count = 0
        for node in [n for n in gm.graph.nodes if n.target in attention]:
            found = _rotated(node)
            if found is None:
                continue
            self._fuse(gm, found, target)
            norms_taken += len(found.norms)
            count += 1
        return PassInfo(num_matches=count, details={"norms": norms_taken})

    def _fuse(self, gm: GraphModule, found: _Rotated, target: Any) -> None:
        node, bound = found.attention, bound_arguments(found.attention)
        with self.site(gm, found.nodes, label="rope + cache write", before=node) as s:
            inputs: list[Any] = [found.query, found.key, bound["value"], found.q_weight, found.k_weight]
            inputs += [found.cos, found.sin, bound["slot_mapping"], bound["k_cache"], bound["v_cache"]]
            both = s.call(target, tuple(inputs), found.constants, like=found.rope)
            for i, old in enumerate((bound["query"], bound["key"])):
                s.replace(old, s.call(operator.getitem, (both, i), like=old))
            op: Any = node.target
            at = [a.name for a in op._schema.arguments].index("slot_mapping")
            args = (*node.args[:at], None, *node.args[at + 1 :])
            s.replace(node, s.call(op, args, dict(node.kwargs), like=node))


@dataclass(frozen=True)
class _Rotated:
    """One attention, the RoPE before it, and the norms before that which the fused op takes in."""

    attention: Node
    rope: Node
    query: Node
    key: Node
    q_weight: Node | None
    k_weight: Node | None
    cos: Node
    sin: Node
    constants: dict[str, Any]
    norms: tuple[Node, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that is rewritten."""
        bound = bound_arguments(self.attention)
        return (*self.norms, self.rope, bound["query"], bound["key"], self.attention)


def _rotated(attention: Node) -> _Rotated | None:
    """What stands before an attention that still writes its cache; None where that is not one RoPE."""
    bound = bound_arguments(attention)
    query, key = bound["query"], bound["key"]
    if bound["slot_mapping"] is None or not _is_item(query, 0) or not _is_item(key, 1):
        return None
    rope = query.args[0]
    half, interleaved = every("rope_with_explicit_cos_sin"), every("rope_with_qk_interleaving")
    if key.args[0] is not rope or rope.target not in half | interleaved:
        return None
    given = bound_arguments(rope)
    if given["unsqueeze_dim"] not in (2, -2) or any(u < attention for n in (query, key) for u in n.users):
        return None  # heads do not follow tokens, or someone reads what would be made only later
    constants: dict[str, Any] = {"interleaved": rope.target in interleaved}
    inputs: dict[str, Node] = {"q": given["q"], "k": given["k"]}
    weights: dict[str, Node | None] = {"q": None, "k": None}
    norms: list[Node] = []
    for side, x in tuple(inputs.items()):
        norm = _norm_of_heads(x)
        if norm is None:
            continue
        flags = {name: norm[name] for name in ("weight_offset", "weight_in_float")}
        if norms and any(constants[name] != value for name, value in flags.items()):
            continue  # one pair of flags serves both
        constants |= {f"{side}_eps": norm["eps"], **flags}
        inputs[side], weights[side] = norm["input"], norm["weight"]
        norms.append(x)
    return _Rotated(
        attention, rope, inputs["q"], inputs["k"], weights["q"], weights["k"], given["cos"], given["sin"],
        constants, tuple(norms),
    )  # fmt: skip


def _is_item(node: Any, index: int) -> bool:
    return isinstance(node, Node) and node.target is operator.getitem and node.args[1:] == (index,)


def _norm_of_heads(node: Any) -> dict[str, Any] | None:
    """Arguments of the RMS norm that ``node`` is, when it works on [1, T, heads, H] and only one reads it."""
    if not isinstance(node, Node) or node.target not in every("rmsnorm") or len(node.users) != 1:
        return None
    bound = bound_arguments(node)
    shape = shape_of(bound["input"])
    if shape is None or len(shape) != 4 or dtype_of(node) != dtype_of(bound["input"]):
        return None  # a weight of a wider dtype widens what it multiplies, the rotation included
    return bound
