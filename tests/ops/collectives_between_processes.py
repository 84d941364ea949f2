"""Collective kernels in triton's interpreter: a process a rank, inboxes in memory that they share.

``test_collectives.py`` runs it apart, since the interpreter must be chosen before triton is imported.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from adkit.ops.norm import normalised
from adkit.ops.triton import collectives
from adkit.ops.triton.collectives import Inboxes

assert os.environ.get("TRITON_INTERPRET") == "1", "run through test_collectives.py"
WIDTH, PROGRAMS = 24, 4  # words: 96
CAPACITY = WIDTH * PROGRAMS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: The interpreter cuts bfloat16 off where a device rounds to the nearest.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-5, torch.float16: 2**-10}
#: Words in a message: whole and broken rows, one program and all, several calls over the same inboxes.
SIZES = (48, 12, 84, 4, 48, 48, 72)


def inputs(world: int, index: int, dtype: torch.dtype, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * index + size)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(world)]


def eighths(world: int, index: int, dtype: torch.dtype, size: int) -> list[Tensor]:
    """Numbers whose sum over ranks needs no rounding."""
    generator = torch.Generator().manual_seed(index)
    return [torch.randint(-16, 17, (size,), generator=generator).div(8).to(dtype) for _ in range(world)]


def inboxes(rank: int, shared: list[Tensor], flags: list[Tensor], width: int) -> Inboxes:
    def addresses(tensors: list[Tensor]) -> Tensor:
        return torch.tensor([t.data_ptr() for t in tensors])

    return Inboxes(
        rank, len(shared), addresses(shared), torch.zeros(PROGRAMS, dtype=torch.int32), PROGRAMS, width,
        flags=addresses(flags), patience=20_000,
    )  # fmt: skip


def close(got: Tensor, want: Tensor) -> bool:
    limit = TOLERANCE[got.dtype] * want.abs().max()
    return bool((got.double() - want.double()).abs().max() <= limit)


def nearest(got: Tensor, want: Tensor) -> bool:
    """Half a step of float16 at most, and what float32 adds: each number was rounded once."""
    return bool(((got.double() - want).abs() <= (2**-11 + 2**-20) * want.abs() + 2**-25).all())


def work(rank: int, world: int, memory: dict[str, list[Tensor]], results: Any) -> None:
    """All calls of one rank; puts what is wrong, and the sums' bits."""
    torch.set_num_threads(1)
    wrong: list[str] = []
    bits: list[list[int]] = []
    oneshot = inboxes(rank, memory["oneshot"], memory["flags"], WIDTH)
    rows = inboxes(rank, memory["rows"], memory["flags"], WIDTH)
    twoshot = inboxes(rank, memory["twoshot"], memory["flags"], WIDTH)

    def check(what: str, got: Tensor, want: Tensor) -> None:
        bits.append(got.view(-1).view(torch.int16).tolist())
        if got.shape != want.shape or not close(got, want):
            wrong.append(f"rank {rank} of {world}: {what} {got.dtype} {list(got.shape)}")

    def exactly(what: str, got: Tensor, want: Tensor) -> None:
        bits.append(got.view(-1).view(torch.int16).tolist())
        if got.dtype != want.dtype or not torch.equal(got, want):
            wrong.append(f"rank {rank} of {world}: {what} {got.dtype} {list(got.shape)}")

    for index, size in enumerate(SIZES):
        for dtype in DTYPES:
            xs = inputs(world, index, dtype, size * 4 // dtype.itemsize)
            total = torch.stack(xs).double().sum(0)
            check("one shot", collectives.oneshot_all_reduce(xs[rank], oneshot), total)
            if not collectives.refused(xs[rank], CAPACITY, shares=world):
                check("two shots", collectives.twoshot_all_reduce(xs[rank], twoshot), total)
            check("gather", collectives.oneshot_all_gather(xs[rank], oneshot), torch.stack(xs).double())
    for index, dtype in enumerate(DTYPES):
        numbers = WIDTH * 4 // dtype.itemsize
        for offset, in_float, weighted in ((0.0, False, True), (1.0, True, True), (0.0, False, False)):
            xs = [x.view(3, numbers) for x in inputs(world, index, dtype, 3 * numbers)]
            residual = inputs(1, 50 + index, dtype, 3 * numbers)[0].view(3, numbers)
            weight = inputs(1, 80 + index, dtype, numbers)[0] if weighted else None
            normed, total = collectives.oneshot_all_reduce_residual_rmsnorm(
                xs[rank], residual, weight, 1e-5, offset, in_float, rows
            )
            sums = torch.stack(xs).double().sum(0) + residual.double()
            check("sum", total, sums)
            want = normalised(total, total.float().square().mean(-1, True), weight, 1e-5, offset, in_float)
            check("norm", normed, want)
    for index, dtype in enumerate((torch.bfloat16, torch.float16)):  # a residual in float32
        made = eighths if dtype == torch.bfloat16 else inputs
        numbers = 2 * WIDTH
        for offset, in_float, kind in (
            (0.0, False, dtype),
            (1.0, True, dtype),
            (1.0, False, torch.float32),
            (0.0, False, None),
        ):
            xs = [x.view(3, numbers) for x in made(world, index, dtype, 3 * numbers)]
            residual = inputs(1, 60 + index, torch.float32, 3 * numbers)[0].view(3, numbers)
            weight = None if kind is None else inputs(1, 90 + index, kind, numbers)[0]
            normed, total = collectives.oneshot_all_reduce_residual_rmsnorm(
                xs[rank], residual, weight, 1e-5, offset, in_float, rows
            )
            sums = torch.stack(xs).double().sum(0).to(dtype) + residual
            exactly("wide sum", total, sums)
            want = sums.double() * torch.rsqrt(sums.double().square().mean(-1, True) + 1e-5)
            if weight is not None:
                want = want * (weight.double() + offset)
            check("norm of a wide sum", normed, want)
            if dtype == torch.float16 and not nearest(normed, want):
                wrong.append(f"rank {rank} of {world}: a norm of a wide sum is rounded more than once")
            exactly(
                "wide sum without a norm", collectives.oneshot_all_reduce(xs[rank], oneshot, residual), sums
            )
    results.put((rank, wrong, bits))


def main() -> int:
    """Worlds of two and three."""
    bad: list[str] = []
    for world in (2, 3):
        context = mp.get_context("spawn")
        results = context.Queue()
        shared = {
            "oneshot": collectives.oneshot_bytes(world, PROGRAMS, WIDTH),
            "rows": collectives.oneshot_bytes(world, PROGRAMS, WIDTH),
            "twoshot": collectives.twoshot_bytes(PROGRAMS, WIDTH),
            "flags": 4 * world * PROGRAMS,
        }
        memory = {
            name: [torch.zeros(size // 4, dtype=torch.int32).share_memory_() for _ in range(world)]
            for name, size in shared.items()
        }
        ranks = [context.Process(target=work, args=(rank, world, memory, results)) for rank in range(world)]
        for process in ranks:
            process.start()
        found = [results.get(timeout=600) for _ in ranks]
        for process in ranks:
            process.join(600)
        bad += [text for _, wrong, _ in found for text in wrong]
        bad += [f"{world} ranks: different bits" for _, _, bits in found if bits != found[0][2]]
    print("\n".join(bad) or "passed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
