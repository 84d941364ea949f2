"""What a rank of these tests is built from: the hash model of the runtime's tests, its logits a sum over ranks."""

from __future__ import annotations

import os
import signal
import time

import torch

from adkit.contract import CompiledModel, DistConfig, EngineConfig, ShardingError
from adkit.ops import dist as over_ranks
from adkit.passes.compile.cuda_graphs import StepGraphs, decode_layouts, ladder, prompt_layouts
from tests.runtime.conftest import INPUTS
from tests.runtime.split import Share

PAGE_SIZE = 4


def exchanges(*, dist: DistConfig, device: str, progress) -> CompiledModel:
    """Raises unless every exchange gives what it says, computed here from what every rank has."""
    here = over_ranks.communicator()
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        parts = [torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(r)) for r in range(here.size)]
        parts = [(8 * p).round().to(dtype) for p in parts]  # whole numbers, whose sums are exact
        mine = parts[here.rank]
        total = torch.stack(parts).sum(0)
        assert torch.equal(here.all_reduce(mine.clone(), "AUTO"), total)
        assert torch.equal(here.all_reduce(mine.clone().transpose(0, 2), "NCCL"), total.transpose(0, 2))
        assert torch.equal(here.broadcast(mine.clone()), parts[0])
        for dim in range(3):
            assert torch.equal(here.all_gather(mine, dim, "AUTO"), torch.cat(parts, dim))
            share = here.reduce_scatter(mine, dim, "AUTO")
            assert torch.equal(share, total.chunk(here.size, dim)[here.rank])
    return build(dist=dist, device=device, progress=progress)


def build(
    *,
    dist: DistConfig,
    device: str,
    progress,
    pages: int = 64,
    replay: bool = False,
    drift: bool = False,
    poison: int | None = None,
    fault: tuple[int, str, int] | None = None,
) -> CompiledModel:
    """With attention data parallelism each rank has sequences of its own, and their logits are joined.

    ``fault``: (rank, what happens, in which step; 0: while building). ``drift``: ranks but 0 see other logits.
    """
    here = over_ranks.communicator()
    assert (here.rank, here.size) == (dist.rank, dist.world_size)
    model = Share(pages, PAGE_SIZE)
    model.poison = poison
    steps = 0
    print(f"rank {dist.rank} says hello")

    def trouble(what: str) -> None:
        if what == "raise":
            raise ValueError("bad luck")
        if what == "refuse":
            raise ShardingError("3 heads cannot be cut over 2 ranks")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "sleep":
            time.sleep(600)

    def forward(**inputs: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if fault is not None and fault[0] == dist.rank and fault[2] == steps:
            trouble(fault[1])
        logits = model.forward(**inputs)
        if dist.pools > 1:
            joined = here.all_gather(logits, 0, "AUTO")
            return joined.roll(1, -1) if drift and dist.rank else joined
        # Each row is whole on one rank and nothing on the others.
        mine = torch.arange(logits.shape[1]) % here.size == here.rank
        whole = here.all_reduce(torch.where(mine[:, None], logits, 0), "AUTO")
        return whole.roll(1, -1) if drift and dist.rank else whole

    if fault is not None and fault[0] == dist.rank and fault[2] == 0:
        trouble(fault[1])
    for n in range(3):
        progress(n + 1, 3, "building")
    compiled = CompiledModel(forward, INPUTS, model.pool, 31, torch.device(device), (0,), pools=dist.pools)
    compiled.details["pid"] = os.getpid()
    if replay:
        settings = EngineConfig()
        most = settings.share(dist.pools).max_batch_size
        layouts = decode_layouts(ladder(most), 16) + prompt_layouts([8, 16, 32], 16, most)
        compiled.replay = StepGraphs(
            forward,
            INPUTS,
            model.pool,
            layouts,
            settings.max_batch_size,
            torch.device(device),
            here.broadcast,
        )
    return compiled
