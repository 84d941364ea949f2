"""``compile_model``: the graph as something the engine can call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.fx import GraphModule

from adkit.contract import CachePool, CompiledModel, PassError, SequenceBatch
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.registry import register


class CompileModelConfig(PassConfig):
    """How the graph is run."""

    backend: Literal["eager", "torch-compile"] = Field("eager", description="eager: as is; torch-compile: Inductor")


@register
class CompileModel(Pass):
    """Make the graph callable by the engine.

    ``eager`` runs the generated Python of the graph; ``torch-compile`` hands it to Inductor with dynamic shapes.
    The graph itself does not change.

        before: a GraphModule
        after:  a CompiledModel: packed batch in, logits of the asked-for tokens out
    """

    key = "compile_model"
    stage = Stage.COMPILE
    Config: ClassVar[type[PassConfig]] = CompileModelConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Wrap; the graph stays."""
        inputs = tuple(n.target for n in gm.graph.nodes if n.op == "placeholder")
        if ctx.caches is None:
            return PassInfo(skipped=True, reason="the graph has no cache, so the engine cannot run it")
        known = set(SequenceBatch.names()) | {s.name for s in ctx.caches.specs}
        strange = [n for n in inputs if n not in known]
        if strange:
            raise PassError(f"the graph has inputs the engine cannot feed: {', '.join(strange)}; known: {', '.join(sorted(known))}")
        gm.recompile()
        run: Callable[..., Any] = gm if self.config.backend == "eager" else torch.compile(gm, dynamic=True)
        output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
        logits = output.args[0][0]
        ctx.compiled = CompiledModel(
            forward=lambda **feed: run(**feed)[0],
            inputs=inputs,
            caches=ctx.caches,
            vocab_size=int(logits.meta["val"].shape[-1]),
            device=ctx.device,
            eos_token_ids=tuple(ctx.factory.eos_token_ids),
        )
        return PassInfo(num_matches=1, details={"backend": self.config.backend, "inputs": len(inputs)})


def warmup_batch(ctx: Context, pool: CachePool) -> SequenceBatch:
    """One step of ``max_num_tokens`` tokens in sequences of at most ``max_seq_len``, all writing to page 0."""
    total, longest = ctx.engine.max_num_tokens, ctx.engine.max_seq_len
    lengths = [longest] * (total // longest) + [total % longest] * (total % longest > 0)
    t = sum(lengths)
    dev = ctx.device
    position = torch.cat([torch.arange(n) for n in lengths]).to(dev)
    pages = math.ceil(ctx.engine.max_seq_len / pool.page_size)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return SequenceBatch(
        input_ids=torch.zeros(1, t, dtype=torch.long, device=dev),
        position_ids=position[None],
        rope_lengths=torch.full((1, t), lengths[0], device=dev),
        cu_seqlens=ends.to(dev, torch.int32),
        cache_lens=torch.zeros(len(lengths), dtype=torch.int32, device=dev),
        page_table=torch.zeros(len(lengths), pages, dtype=torch.int32, device=dev),
        slot_mapping=torch.arange(t, device=dev) % pool.page_size,
        logits_indices=(ends[1:] - 1).to(dev),
    )
