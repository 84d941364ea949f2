"""Memory that the ranks of one host see of each other, for the kernels that exchange in it.

``torch.distributed._symmetric_memory`` maps it (over NVLink, or PCIe where the driver allows peer access). What is
asked for here is asked for by all ranks at once, and either all get it or none.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

if TYPE_CHECKING:
    from adkit.ops.triton.collectives import Inboxes
    from adkit.runtime.ranks.strategies import Site

#: The kernels are unrolled over the ranks.
MOST_RANKS = 8
_kept: list[Tensor] = []  # CUDA graphs hold addresses only


class Unavailable(Exception):
    """A strategy cannot be had here; says why."""


def check(site: Site) -> None:
    """Raise Unavailable, on all ranks for the same reason, where they cannot see each other's memory."""
    if site.device.type != "cuda":
        raise Unavailable("ranks see each other's memory on CUDA devices only")
    if not 2 <= site.size <= MOST_RANKS:
        raise Unavailable(f"it is for 2 to {MOST_RANKS} ranks, not {site.size}")
    if torch.cuda.is_current_stream_capturing():
        raise Unavailable("it was first asked for inside of a CUDA graph")
    why = "" if importlib.util.find_spec("triton") else "triton is not installed"
    found = _everybody(site, (_host(), why))
    for rank, (host, why) in enumerate(found):
        if why:
            raise Unavailable(f"rank {rank}: {why}")
        if host != found[0][0]:
            raise Unavailable("the ranks are on several hosts")


def inboxes(site: Site, programs: int, width: int, two_shots: bool = False) -> Inboxes:
    """Memory for messages of at most ``programs * width`` words; zeroed, and ready on all ranks.

    Raises Unavailable, on all ranks, where one of them could not map the others'.
    """
    from adkit.ops.triton import collectives

    if two_shots:
        size = collectives.twoshot_bytes(programs, width)
        flags = 4 * site.size * programs
    else:
        size, flags = collectives.oneshot_bytes(site.size, programs, width), 0
    addresses = _map(site, size + flags)

    def on_device(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=site.device)

    return collectives.Inboxes(
        site.rank,
        site.size,
        on_device(addresses),
        torch.zeros(programs, dtype=torch.int32, device=site.device),
        programs,
        width,
        flags=on_device([a + size for a in addresses]) if two_shots else None,
        patience=collectives.PATIENCE,
    )


def _map(site: Site, nbytes: int) -> list[int]:
    """Where each rank's ``nbytes`` begin, as this rank sees them."""
    import torch.distributed._symmetric_memory as symm_mem

    addresses: list[int] = []
    why = ""
    try:
        memory = symm_mem.empty(-(-nbytes // 4), dtype=torch.int32, device=site.device)
        handle: Any = symm_mem.rendezvous(memory, site.group.group_name)
        addresses = [handle.get_buffer(r, (1,), torch.int32).data_ptr() for r in range(site.size)]
        memory.zero_()
        torch.cuda.synchronize(site.device)
        _kept.append(memory)
    except RuntimeError as error:
        why = f"torch could not map memory between the ranks ({str(error).splitlines()[0]})"
    for rank, theirs in enumerate(_everybody(site, why)):  # nobody writes before all have zeroed theirs
        if theirs:
            raise Unavailable(f"rank {rank}: {theirs}")
    return addresses


def _everybody(site: Site, mine: Any) -> list[Any]:
    found: list[Any] = [None] * site.size
    torch_dist.all_gather_object(found, mine, group=site.group)
    return found


def _host() -> str:
    """What tells this host from others; containers have the names that they like."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else torch_dist.get_backend()
