"""Sums and gathers over ranks that see each other's memory (NVLink), launched here; the kernels are beside.

- one shot: every rank sends its tensor to all others and adds up by itself: one way over the link, for small messages.
  A residual sum and an RMSNorm ride along.
- two shots: every rank adds up a share and sends it around: less to send for many ranks, one way more.

Memory comes from the caller (:class:`Inboxes`): the runtime maps it between processes. All ranks must make the
same calls in the same order on the same inboxes, one after another (on one stream). Calls
may be captured in CUDA graphs, and keep the rules of ``pdl``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton import pdl
from adkit.ops.triton.collective_kernels import oneshot_kernel, twoshot_kernel

#: Words that a program of a plain one-shot sum has.
WIDTH = 512
#: Programs of a two-shot sum, and the words that each takes at once.
PROGRAMS, BLOCK = 128, 4096
#: Looks into an inbox before a rank counts as lost and the kernel ends with an error: some minutes.
PATIENCE = 1 << 29
_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Inboxes:
    """Memory of ``world`` ranks that each can write, as rank ``rank`` sees it; all zero before the first call.

    ``addresses`` [world] int64: where each rank's inbox begins. A message has at most ``programs * width`` words; a
    one-shot sum splits it in rows of ``width``. ``flags`` [world] int64: where each rank's flags begin,
    int32 [world, programs]; two-shot sums alone need them. ``counts`` [programs] int32 is this rank's own.
    """

    rank: int
    world: int
    addresses: Tensor
    counts: Tensor
    programs: int
    width: int
    flags: Tensor | None = None
    patience: int = PATIENCE

    @property
    def capacity(self) -> int:
        """Words of the longest message."""
        return self.programs * self.width


def oneshot_bytes(world: int, programs: int, width: int) -> int:
    """Bytes of a rank's inbox for one-shot calls."""
    return 2 * world * programs * width * 8


def twoshot_bytes(programs: int, width: int) -> int:
    """Bytes of a rank's inbox for two-shot calls of at most ``programs * width`` words."""
    return 2 * programs * width * 4


def refused(x: Tensor, capacity: int, shares: int = 1) -> str:
    """Why a message cannot travel: ``capacity`` words are too few, or it does not fall into ``shares`` of whole
    16 bytes; empty when it can."""
    if x.dtype not in _KINDS:
        return f"{x.dtype} is not one of float32, bfloat16, float16"
    if x.nbytes % (16 * shares):
        return f"{x.nbytes} bytes are not {shares} times a multiple of 16"
    if x.nbytes > 4 * capacity:
        return f"{x.nbytes} bytes are more than the {4 * capacity} that fit"
    return ""


def _words(x: Tensor, each: torch.dtype = torch.int32) -> Tensor:
    x = x.contiguous()
    if x.data_ptr() % 16:  # a view that begins somewhere
        x = x.clone()
    return x.view(-1).view(each)


def _kind(x: Tensor) -> dict[str, Any]:
    return {"KIND": _KINDS[x.dtype], "PAIRED": int(x.element_size() == 2)}


def _traps() -> bool:
    return not triton.knobs.runtime.interpret


def _oneshot(
    x: Tensor,
    inboxes: Inboxes,
    out: Tensor,
    residual: Tensor | None = None,
    normed: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    in_float: bool = False,
    gather: bool = False,
) -> None:
    words = _words(x)
    count, width = words.numel(), inboxes.width
    if not count:
        return
    wide = residual is not None and residual.dtype != x.dtype
    beside = torch.int64 if wide else torch.int32  # what holds as many numbers as a word of the message
    sums = out.view(-1).view(beside)
    block = triton.next_power_of_2(width)
    oneshot_kernel[(triton.cdiv(count, width),)](
        words,
        sums,
        words if residual is None else _words(residual, beside),
        words if weight is None else weight,
        sums if normed is None else normed.view(-1).view(torch.int32),
        inboxes.addresses,
        inboxes.counts,
        count // 4,
        width,
        inboxes.capacity,
        eps,
        offset,
        inboxes.patience,
        RANK=inboxes.rank,
        WORLD=inboxes.world,
        GATHER=gather,
        HAS_RESIDUAL=residual is not None,
        WIDE=wide,
        NORM=normed is not None,
        HAS_WEIGHT=weight is not None,
        IN_FLOAT=in_float,
        BLOCK=block,
        TRAPS=_traps(),
        num_warps=min(32, max(1, block // 64)),  # two words a thread: 16 bytes on their way
        **_kind(x),
        **pdl.launch(),
    )


def oneshot_all_reduce(x: Tensor, inboxes: Inboxes, residual: Tensor | None = None) -> Tensor:
    """The sum over ranks of ``x`` [...] -> [...], added in float32 in order of rank and rounded once.

    A ``residual``, which every rank has, is added to that: of x's dtype, or float32, and so is the result.
    """
    dtype = x.dtype if residual is None else residual.dtype
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    _oneshot(x, inboxes, out, residual)
    return out


def oneshot_all_gather(x: Tensor, inboxes: Inboxes) -> Tensor:
    """Every rank's ``x`` [...] in order of rank -> [world, ...]."""
    out = x.new_empty((inboxes.world, *x.shape))
    _oneshot(x, inboxes, out, gather=True)
    return out


def oneshot_all_reduce_residual_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    in_float: bool,
    inboxes: Inboxes,
) -> tuple[Tensor, Tensor]:
    """``torch_fused_add_rmsnorm`` of the sum over ranks: x and residual [..., D] -> normed and sum [..., D].

    Rounds where the two ops do. ``inboxes.width`` is D in words of x. The normed rows have x's dtype; the residual
    and the sum have that too, or are float32.
    """
    total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    _oneshot(x, inboxes, total, residual, normed, weight, eps, offset, in_float)
    return normed, total


def twoshot_all_reduce(x: Tensor, inboxes: Inboxes) -> Tensor:
    """The sum over ranks of ``x`` [...] -> [...], added in float32 in order of rank and rounded once."""
    assert inboxes.flags is not None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    words = _words(x)
    if not words.numel():
        return out
    twoshot_kernel[(inboxes.programs,)](
        words,
        out.view(-1).view(torch.int32),
        inboxes.addresses,
        inboxes.flags,
        inboxes.counts,
        words.numel() // (4 * inboxes.world),
        inboxes.capacity // inboxes.world,
        inboxes.patience,
        RANK=inboxes.rank,
        WORLD=inboxes.world,
        BLOCK=BLOCK,
        TRAPS=_traps(),
        num_warps=8,
        **_kind(x),
        **pdl.launch(),
    )
    return out
