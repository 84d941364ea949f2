"""``initialize_cache`` and what sizes the cache."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.fx import GraphModule

from adkit.contract import CachePool, MemoryLimitError
from adkit.graph.step import PassInfo
from adkit.models import memory
from adkit.ops import dist
from adkit.passes.base import Context, Pass, PassConfig, Stage
from adkit.passes.registry import register

_SMALLER_CACHE = "lower free_gpu_memory_fraction, max_batch_size or max_seq_len"


def wanted_pages(ctx: Context) -> int:
    """Pages for ``max_batch_size`` sequences of ``max_seq_len`` tokens, and page 0, which takes padding; for its share
    of these sequences where a rank has sequences of its own."""
    sequences = ctx.engine.share(ctx.dist.pools).max_batch_size
    return sequences * math.ceil(ctx.engine.max_seq_len / ctx.engine.page_size) + 1


def pages_for_one(ctx: Context) -> int:
    """The fewest pages that serve anything: one sequence of ``max_seq_len``, and page 0."""
    return math.ceil(ctx.engine.max_seq_len / ctx.engine.page_size) + 1


def free_bytes(device: torch.device) -> int | None:
    """Bytes free on the device; None where that means nothing (meta)."""
    return memory.free_bytes(device) if device.type in ("cuda", "cpu") else None


def agreed_pages(pages: int, ctx: Context) -> int:
    """The fewest that any rank has room for: all run the same batches, so every cache has as many pages."""
    if ctx.dist.world_size == 1 or ctx.weights == "none" or not dist.connected():
        return pages
    found = torch.tensor([pages], device=ctx.device)
    return int(dist.communicator().all_gather(found, 0, "AUTO").min())


def fitting_pages(pool: CachePool, ctx: Context, free: int | None) -> int:
    """Pages to allocate: what is wanted, cut to what fits; MemoryLimitError when not one sequence fits."""
    pages = wanted_pages(ctx)
    if free is None:
        return pages
    room = int(free * ctx.engine.free_gpu_memory_fraction) // pool.bytes_per_page
    if room < min(pages, pages_for_one(ctx)):
        need = pages_for_one(ctx) * pool.bytes_per_page
        raise MemoryLimitError(
            f"the cache of one sequence of max_seq_len={ctx.engine.max_seq_len} tokens takes "
            f"{memory.human(need)} and "
            f"{memory.human(max(free, 0) * ctx.engine.free_gpu_memory_fraction)} may be used on {ctx.device} "
            f"(free_gpu_memory_fraction={ctx.engine.free_gpu_memory_fraction}); lower max_seq_len"
        )
    return min(pages, room)


class InitializeCacheConfig(PassConfig):
    """Nothing of its own."""


@register
class InitializeCache(Pass):
    """Allocate the paged caches.

    As many pages as ``max_batch_size`` sequences of ``max_seq_len`` take, cut to what is free. On a GPU only
    one sequence's worth is taken here: ``resize_kv_cache`` measures what a full step needs, then sizes the
    rest. Without weights the caches live on meta: shapes to the end.

        before: layer0_k_cache: an input of shape [P, page_size, K, H]
        after:  the same input, backed by memory on the device
    """

    key = "initialize_cache"
    stage = Stage.CACHE_INIT
    Config = InitializeCacheConfig

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Allocate."""
        if ctx.caches is None:
            return PassInfo(skipped=True, reason="no cached op in the graph")
        pool = dataclasses.replace(ctx.caches, tensors={})
        device = torch.device("meta") if ctx.weights == "none" else ctx.device
        if device.type == "cuda":
            fitting_pages(pool, ctx, free_bytes(device))
            pages = min(pages_for_one(ctx), wanted_pages(ctx))
        else:
            pages = agreed_pages(fitting_pages(pool, ctx, free_bytes(device)), ctx)
        with memory.limited("for the cache", device, _SMALLER_CACHE):
            pool.allocate(pages, device)
        ctx.caches = pool
        return PassInfo(
            num_matches=len(pool.specs),
            details={
                "pages": pages,
                "tokens": (pages - 1) * pool.page_size,
                "bytes": pages * pool.bytes_per_page,
            },
        )


@register
class ResizeKVCache(Pass):
    """Size the cache from the memory a full step leaves free (GPU).

    Runs one step of ``max_num_tokens`` to see its peak, then takes ``free_gpu_memory_fraction`` of what is
    left, at most what ``max_batch_size`` sequences of ``max_seq_len`` need. Skipped where memory is not
    measured so.

        before: pages for one sequence
        after:  pages for as many as fit
    """

    key = "resize_kv_cache"
    stage = Stage.CACHE_INIT

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Measure and reallocate."""
        pool = ctx.caches
        if pool is None or not pool.tensors:
            return PassInfo(skipped=True, reason="no cache to resize")
        if ctx.device.type != "cuda" or ctx.weights == "none":
            return PassInfo(
                skipped=True, reason=f"the cache on {ctx.device.type} is already at its final size"
            )
        from adkit.passes.compile.compile_model import warmup_batch

        gm.recompile()
        torch.cuda.synchronize(ctx.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ctx.device)
        before = torch.cuda.memory_allocated(ctx.device)
        names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
        step = f"for a step of max_num_tokens={ctx.engine.max_num_tokens}"
        with torch.inference_mode(), memory.limited(step, ctx.device, "lower max_num_tokens"):
            batch = warmup_batch(ctx, pool)
            gm(**{n: pool.tensors[n] if n in pool.tensors else getattr(batch, n) for n in names})
        torch.cuda.synchronize(ctx.device)
        activations = torch.cuda.max_memory_allocated(ctx.device) - before
        torch.cuda.empty_cache()
        new = dataclasses.replace(pool, tensors={})
        here = pool.num_pages * pool.bytes_per_page
        pages = agreed_pages(fitting_pages(new, ctx, (free_bytes(ctx.device) or 0) + here - activations), ctx)
        pool.tensors = {}  # the small cache makes room; going back to it allocates it anew
        torch.cuda.empty_cache()
        try:
            with memory.limited("for the cache", ctx.device, _SMALLER_CACHE):
                new.allocate(pages, ctx.device)
        except BaseException:
            new.tensors = {}
            pool.allocate(pool.num_pages, ctx.device)
            raise
        ctx.caches = new
        return PassInfo(
            num_matches=len(new.specs),
            details={
                "pages": pages,
                "tokens": (pages - 1) * new.page_size,
                "bytes": pages * new.bytes_per_page,
                "activation bytes": activations,
            },
        )
