"""``compile_model``: the graph as something the engine can call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.fx import GraphModule, Node

from adkit.contract import CachePool, CompiledModel, PassError, SequenceBatch, ShardingError
from adkit.graph.step import PassInfo
from adkit.models.memory import limited
from adkit.ops import dist
from adkit.ops.registry import OPS, info_of
from adkit.ops.sampling import compile_draws
from adkit.ops.triton.ops import fallen_back
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.compile.cuda_graphs import (
    StepGraphs,
    decode_layouts,
    ladder,
    prompt_ladder,
    prompt_layouts,
)
from adkit.passes.compile.in_place import accumulating
from adkit.passes.registry import register


class CompileModelConfig(PassConfig):
    """How the graph is run."""

    backend: Literal["auto", "eager", "torch-compile", "torch-cudagraph"] = Field(
        "auto",
        description="eager: as is; torch-compile: Inductor; torch-cudagraph: steps replayed from CUDA graphs; "
        "auto: torch-cudagraph on CUDA, else eager",
    )
    cuda_graph_batch_sizes: list[int] | None = Field(
        None,
        description="Batch sizes of decode steps to capture; null: powers of two to 8, multiples of 8 to 64, then in "
        "steps that grow with the size, to max_batch_size or 1024. Larger batches run eagerly",
    )
    cuda_graph_num_tokens: list[int] | None = Field(
        None,
        description="Token counts of steps with prompts to capture; null: from 128 in steps that grow with the size, "
        "to max_num_tokens or 1024. Larger steps run eagerly; all do where the list is empty",
    )


@register
class CompileModel(Pass):
    """Make the graph callable by the engine.

    ``eager`` runs the generated Python of the graph; ``torch-compile`` hands it to Inductor with dynamic
    shapes; ``torch-cudagraph`` captures decode steps for a ladder of batch sizes, and steps with prompts for one
    of token counts, and replays them, padded, because launching hundreds of small kernels takes longer than
    running them. Without Inductor, residual sums are made in the residual's own memory where nobody reads it
    afterwards. The graph itself does not change.

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
            raise PassError(
                f"the graph has inputs the engine cannot feed: {', '.join(strange)}; known: "
                f"{', '.join(sorted(known))}"
            )
        if ctx.dist.pools > 1 and "logits_indices" not in inputs:
            raise ShardingError(
                "with attention data parallelism each rank picks the rows that are sampled from, but this graph has "
                "logits of every token: gather_logits_before_lm_head found no linear layer that makes them, or is off"
            )
        gm.recompile()
        backend, why = self._backend(gm, ctx)
        if why:
            ctx.report(why)
        run: Callable[..., Any]
        sums = 0
        if backend == "torch-compile":
            run = torch.compile(gm, dynamic=True)
        else:
            run, sums = accumulating(gm)
        forward: Callable[..., Any] = lambda **feed: run(**feed)[0]  # noqa: E731
        details: dict[str, Any] = {"backend": backend, "inputs": len(inputs)}
        if sums:
            details["sums in place"] = sums
        replay = None
        if backend == "torch-cudagraph":
            replay, why = self._capture(gm, forward, inputs, ctx)
            if replay is None:
                details["backend"] = "eager"
                ctx.report(why)
            else:
                prompts = {x.tokens for x in replay.layouts if x.tokens != x.sequences}
                details |= {
                    "batch sizes": [x.sequences for x in replay.layouts if x.tokens == x.sequences],
                    "token counts": sorted(prompts),
                    "capture seconds": round(replay.seconds, 2),
                    "capture bytes": replay.bytes,
                }
        output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
        logits = output.args[0][0].meta["val"]
        if ctx.device.type == "cuda" and ctx.weights != "none":
            ctx.progress(0, 1, "compiling sampling")
            compile_draws(int(logits.shape[-1]), logits.dtype, ctx.device)
            ctx.progress(1, 1, "compiling sampling")
        ctx.compiled = CompiledModel(
            forward=forward,
            inputs=inputs,
            caches=ctx.caches,
            vocab_size=int(logits.shape[-1]),
            device=ctx.device,
            eos_token_ids=tuple(ctx.factory.eos_token_ids),
            max_positions=learned_positions(gm),
            made_for=ctx.factory.positions,
            replay=replay,
            pools=ctx.dist.pools,
        )
        return PassInfo(num_matches=1, details=details)

    def _backend(self, gm: GraphModule, ctx: Context) -> tuple[str, str]:
        """The backend to use, and why it is not the one wished for."""
        wish = self.config.backend
        if wish not in ("auto", "torch-cudagraph"):
            return wish, ""
        if ctx.device.type != "cuda" or ctx.weights == "none":
            return (
                "eager",
                ""
                if wish == "auto"
                else f"CUDA graphs need weights on a GPU, not {ctx.device}: eager instead",
            )
        why = _uncapturable(gm)
        return ("eager", f"{why}: eager instead") if why else ("torch-cudagraph", "")

    def _capture(
        self, gm: GraphModule, forward: Callable[..., Any], inputs: tuple[str, ...], ctx: Context
    ) -> tuple[StepGraphs | None, str]:
        """Captured steps; None, and why, where warming up shows that they cannot be captured."""
        assert ctx.caches is not None
        share = ctx.engine.share(ctx.dist.pools)
        most = share.max_batch_size
        sizes = sorted(self.config.cuda_graph_batch_sizes or ladder(most))
        tokens = self.config.cuda_graph_num_tokens
        tokens = prompt_ladder(share.max_num_tokens) if tokens is None else tokens
        pages = math.ceil(ctx.engine.max_seq_len / ctx.caches.page_size)
        for_graphs = f"to capture CUDA graphs for batch sizes up to {sizes[-1]}"
        advice = "lower free_gpu_memory_fraction or max_batch_size, or set compile_model.backend to eager"
        with limited(for_graphs, ctx.device, advice):
            layouts = decode_layouts(sizes, pages) + prompt_layouts(tokens, pages, most)
            flying = ctx.engine.max_batch_size
            graphs = StepGraphs(forward, inputs, ctx.caches, layouts, flying, ctx.device)
            if ctx.dist.world_size > 1:  # ranks may differ in a logit's last bit, and must not in a token
                graphs.agree = dist.communicator().broadcast
            graphs.warm_up(ctx.progress)
            why = _uncapturable(gm)
            if why:
                return None, f"{why}: eager instead"
            graphs.capture(ctx.progress)
        return graphs, ""


def _uncapturable(gm: GraphModule) -> str:
    """Why a CUDA graph cannot hold this graph as it runs: an op reads values on the host, or has fallen back to a
    reference that does. Empty where it can."""
    ran, fallen = (info_of(n.target) for n in gm.graph.nodes), fallen_back()
    syncing = set()
    for info in ran:
        if info is None:
            continue
        if info.syncs:
            syncing.add(info.name)
        elif info.name in fallen and OPS[info.name.replace("triton_", "torch_", 1)].syncs:
            syncing.add(f"{info.name} (its kernel did not compile)")
    if not syncing:
        return ""
    return f"{', '.join(sorted(syncing))} reads values on the host, which a CUDA graph cannot hold"


def learned_positions(gm: GraphModule) -> int | None:
    """How many positions the graph's learned table has (OPT's offset taken off); None without such a table.

    The index of a lookup is followed back through sums with constants and layout to ``position_ids``.
    """
    limits = []
    for node in gm.graph.nodes:
        if node.target is not torch.ops.aten.embedding.default:
            continue
        table, at = node.args[:2]
        offset = 0
        while isinstance(at, Node) and at.op == "call_function":
            if at.target is torch.ops.aten.add.Tensor:
                constants = [a for a in at.args if isinstance(a, int)]
                if len(constants) != 1:
                    break
                offset += constants[0]
            elif len(at.all_input_nodes) != 1:
                break
            at = at.all_input_nodes[0]
        if isinstance(at, Node) and at.op == "placeholder" and at.target == "position_ids":
            limits.append(int(table.meta["val"].shape[0]) - offset)
    return min(limits, default=None)


def warmup_batch(ctx: Context, pool: CachePool) -> SequenceBatch:
    """One step of ``max_num_tokens`` tokens in sequences of at most ``max_seq_len``, all written to page 0."""
    total, longest = ctx.engine.share(ctx.dist.pools).max_num_tokens, ctx.engine.max_seq_len
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
