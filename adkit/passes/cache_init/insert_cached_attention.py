"""``insert_cached_attention``: the batch packed, attention over a paged cache."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.fx import GraphModule, Node

from adkit.contract import CachePool, CacheSpec, ExportError, MixerDescriptor
from adkit.graph.inputs import Dim, GraphInputs
from adkit.graph.step import PassInfo
from adkit.ops.mixers import MIXERS
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.cache_init.refusals import in_the_way, nothing_to_cache
from adkit.passes.cache_init.token_local import mixing_nodes
from adkit.passes.registry import register

#: Shapes and dtypes of the batch inputs a cached op may ask for; sizes of one name are one symbol.
_METADATA: dict[str, tuple[tuple[Dim, ...], torch.dtype]] = {
    "cu_seqlens": (("sequences + 1",), torch.int32),
    "cache_lens": (("sequences",), torch.int32),
    "page_table": (("sequences", "max_pages"), torch.int32),
    "slot_mapping": (("tokens",), torch.int64),
}


class InsertCachedAttentionConfig(PassConfig):
    """Which cached attention to insert."""

    backend: Literal["auto", "torch", "triton"] = Field(
        "auto", description="Cached op; auto: triton on CUDA, else torch"
    )
    cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Cache dtype; auto: the dtype of the keys"
    )


@register
class InsertCachedAttention(Pass):
    """Give every token mixer its cache: from here the graph runs packed batches step by step.

    Each canonical attention becomes the cached op of the chosen backend, through its descriptor; its keys and
    values live in pages that a page table finds. Before anything changes, every other op is proved
    token-local (its output at a token depends only on that token), because a packed batch puts tokens of
    different sequences side by side; an op that is not proved is an error naming the line of modelling
    code.

        before: o = torch_attention(q, k, v, scale=...)                         # q [B, S, N, H]
        after:  o = torch_attention_with_paged_cache(q, k, v, cu_seqlens, cache_lens, page_table,
                        slot_mapping, layer0_k_cache, layer0_v_cache, scale=...)  # q [1, T, N, H]
    """

    key = "insert_cached_attention"
    stage = Stage.CACHE_INIT
    Config: ClassVar[type[PassConfig]] = InsertCachedAttentionConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Replace every mixer that has a descriptor."""
        mixers = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in MIXERS]
        if not mixers:
            raise ExportError(nothing_to_cache(gm, mixing_nodes(gm)))
        self._refuse(gm, mixers)
        specs: list[CacheSpec] = []
        backend = self.config.backend
        if backend == "auto":
            backend = "triton" if ctx.device.type == "cuda" else "torch"
        wanted = dict.fromkeys(m for n in mixers for m in MIXERS[n.target].metadata)
        with self.site(gm, [], label="batch inputs", before=mixers[0]) as s:
            inputs = GraphInputs(gm)
            inputs.share("tokens", "input_ids", 1)
            metadata = {name: inputs.add(name, *_METADATA[name]) for name in wanted}
            s.adopt(*metadata.values())
        for index, node in enumerate(mixers):
            specs += self._insert(
                gm, node, MIXERS[node.target], f"layer{index}", backend, metadata, inputs, ctx
            )
        ctx.caches = CachePool(tuple(specs), ctx.engine.page_size)
        return PassInfo(
            num_matches=len(mixers),
            details={
                "backend": backend,
                "caches": len(specs),
                "cache bytes a token": int(ctx.caches.bytes_per_token),
            },
        )

    def _refuse(self, gm: GraphModule, mixers: list[Node]) -> None:
        reasons = ((n, MIXERS[n.target].refuse(bound_values(n))) for n in mixers)
        problems = [(n, why) for n, why in reasons if why] + mixing_nodes(gm)
        if problems:
            raise ExportError(in_the_way(problems))

    def _insert(
        self,
        gm: GraphModule,
        node: Node,
        descriptor: MixerDescriptor,
        prefix: str,
        backend: str,
        metadata: dict[str, Node],
        inputs: GraphInputs,
        ctx: Context,
    ) -> tuple[CacheSpec, ...]:
        values = bound_values(node)
        bound = bound_arguments(node)
        dtype = (
            values["key"].dtype
            if self.config.cache_dtype == "auto"
            else getattr(torch, self.config.cache_dtype)
        )
        specs = descriptor.cache_specs(values, ctx.engine.page_size, dtype, prefix)
        caches = [inputs.add(s.name, ("pages", *s.page_shape), s.dtype) for s in specs]
        op = descriptor.cached_ops.get(backend, descriptor.cached_ops["torch"])
        args = [bound[name] for name in descriptor.tensor_args]
        args += [metadata[name] for name in descriptor.metadata] + caches
        with self.site(gm, [node], label=descriptor.name) as s:
            new = s.call(op, tuple(args), descriptor.constants(values), like=node)
            s.replace(node, new)
            s.adopt(*caches)
        return specs


def bound_arguments(node: Node) -> dict[str, Any]:
    """A call's arguments by schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {}
    for i, arg in enumerate(schema.arguments):
        if not arg.kwarg_only and i < len(node.args):
            bound[arg.name] = node.args[i]
        else:
            bound[arg.name] = node.kwargs.get(arg.name, arg.default_value)
    return bound


def bound_values(node: Node) -> dict[str, Any]:
    """Like :func:`bound_arguments`, with nodes replaced by their fake values."""
    return {k: v.meta.get("val") if isinstance(v, Node) else v for k, v in bound_arguments(node).items()}
