"""The sum over ranks with a residual and a norm, on as many GPUs as there are; ``test_collectives.py`` runs it apart.

    python tests/ops/collectives_on_gpus.py

Prints what is wrong and fails where the kernel and the ops that it stands for differ.
"""

from __future__ import annotations

import os
import socket
import sys
from itertools import product

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adkit.ops.norm import normalised
from adkit.runtime.ranks.strategies import Site, Strategies

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Message and residual.
DTYPES = ((BF16, BF16), (F16, F16), (F32, F32), (BF16, F32), (F16, F32))
#: Rows and their numbers.
SHAPES = ((1, 4096), (7, 5120), (64, 2048), (3, 8192))
#: Weight, its offset, whether it is multiplied before rounding.
NORMS = ((True, 0.0, False), (True, 1.0, True), (False, 0.0, False))


def work(rank: int, world: int, port: int) -> None:
    """One rank."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl", rank=rank, world_size=world, device_id=device)
    group = dist.group.WORLD
    assert group is not None
    strategies = Strategies(Site(group, rank, world, device))
    wrong = []
    for (dtype, wide), shape, (weighted, offset, in_float) in product(DTYPES, SHAPES, NORMS):
        mine, all_have = (torch.Generator(device).manual_seed(n) for n in (rank, world))
        x = torch.randn(shape, generator=mine, device=device).to(dtype)
        residual = torch.randn(shape, generator=all_have, device=device).mul(30).to(wide)
        weight = torch.randn(shape[-1], generator=all_have, device=device).to(dtype) if weighted else None
        found = strategies.all_reduce_residual_rmsnorm(
            x, residual, weight, 1e-5, offset, in_float, dtype, "ONESHOT"
        )
        case = f"{dtype} + {wide} {list(shape)} {weighted, offset, in_float}"
        if found is None:
            wrong.append(f"{case}: no kernel ({strategies.fallen})")
            continue
        normed, total = found
        sums = strategies.all_reduce(x, "ONESHOT") + residual
        if total.dtype != wide or not torch.equal(total, sums):
            wrong.append(f"{case}: the sum is another")
        mean = sums.double().square().mean(-1, True).float()
        want = normalised(sums, mean, weight, 1e-5, offset, in_float, dtype)
        # mean and root may be a step of float32 off, which sends a few numbers to their neighbour
        bits = torch.int32 if dtype == F32 else torch.int16
        off = (normed.view(bits).long() - want.view(bits).long()).abs()
        if normed.dtype != dtype or int(off.max()) > (8 if dtype == F32 else 2):
            wrong.append(f"{case}: the norm is another, by {int(off.max())} steps")
        elif dtype != F32 and float((off > 0).float().mean()) > 0.01:
            wrong.append(f"{case}: the norm is rounded elsewhere")
        copies = [torch.empty_like(normed) for _ in range(world)]
        dist.all_gather(copies, normed)
        if not all(torch.equal(c, normed) for c in copies):
            wrong.append(f"{case}: ranks have different bits")
    every: list[list[str]] = [[] for _ in range(world)]
    dist.all_gather_object(every, wrong)
    if rank == 0:
        print("\n".join(sorted({line for lines in every for line in lines})) or "passed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if any(every):
        sys.exit(1)


def main() -> None:
    """A process a GPU."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = torch.cuda.device_count()
    mp.spawn(work, (world, port), world)


if __name__ == "__main__":
    main()
