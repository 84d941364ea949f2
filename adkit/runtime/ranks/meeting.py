"""How ranks find each other: a store of torch.distributed, in which they agree on who is who."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from adkit.contract import ShardingError
from adkit.runtime.ranks.communicator import TorchCommunicator
from adkit.runtime.ranks.link import listen

LOOPBACK = "127.0.0.1"


def open_store(host: str = LOOPBACK, port: int = 0, timeout: float = 600) -> torch_dist.TCPStore:
    """A store that listens on ``host`` alone (0: on a free port).

    Raises ShardingError when the port is taken.
    """
    sock = listen(host, port)  # torch's own would listen on every interface
    number = sock.getsockname()[1]
    return torch_dist.TCPStore(
        host, number, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout),
        master_listen_fd=sock.detach(),
    )  # fmt: skip


def visit_store(address: tuple[str, int], timeout: float) -> torch_dist.Store:
    """Another rank's store."""
    return torch_dist.TCPStore(
        *address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
    )


def join(
    store: torch_dist.Store, rank: int, size: int, device: torch.device, timeout: float
) -> TorchCommunicator:
    """Meet the others in ``store``; returns when all are there.

    ``timeout`` (seconds) bounds this and every later exchange. Raises ShardingError where the device's library is
    missing.
    """
    if device.type == "cuda":
        if not torch_dist.is_nccl_available():
            raise ShardingError(
                "this build of torch has no NCCL, through which ranks on GPUs talk; install a CUDA build of torch for "
                "Linux, or use device='cpu' (gloo)"
            )
        torch.cuda.set_device(device)
    torch_dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch_dist.PrefixStore("adkit", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
        device_id=device if device.type == "cuda" else None,
    )
    group = torch_dist.group.WORLD
    assert group is not None
    return TorchCommunicator(group, device)


def check_devices(size: int, device: str, available: int | None = None) -> list[str]:
    """A device a rank, on this host; ShardingError when there are too few.

    ``device`` is what the configuration says: auto, cpu, cuda.
    """
    if available is None:
        available = torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not available):
        return ["cpu"] * size
    if device not in ("auto", "cuda"):
        raise ShardingError(
            f"device is {device!r}, but {size} ranks need one device each; use device='cuda' and choose by "
            "CUDA_VISIBLE_DEVICES, or device='cpu'"
        )
    if size > available:
        raise ShardingError(
            f"{size} ranks need {size} GPUs and torch sees {available}; lower tp, look at CUDA_VISIBLE_DEVICES, or use "
            "device='cpu' to try it out"
        )
    return [f"cuda:{n}" for n in range(size)]


def quiet_interfaces(host: str, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment that keeps the libraries' own sockets on the loopback device, where that is where ``host`` is."""
    if host != LOOPBACK:
        return {}
    loop = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {} if loop is None else {n: loop for n in names if n not in env}
