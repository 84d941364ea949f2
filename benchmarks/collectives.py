"""Sums over ranks: every strategy at every size, NCCL and torch's own peer-memory kernels beside; needs several GPUs.

    python benchmarks/collectives.py [--ranks 2] [--json FILE] [--seconds 100] [--chain]

A call's time is the device's, from calls captured one after another in a CUDA graph, in microseconds (the
slowest rank). ``bus_gb_s`` is what a rank sends at least, 2 (n-1)/n of the message, over that time. Every strategy's
sum is compared with float64, and the ranks' bits with each other. ``--chain``: instead, what sums cost where
they are made, between the linears of Llama-3.1-8B's layers.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import triton
from torch import Tensor

SIZES = [1 << n for n in range(10, 27)]
CALLS = 20


def seconds_of(call: Callable[[], Any], calls: int = CALLS, replays: int = 5) -> float:
    """Seconds of one call, the slowest rank's."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            kept = [call() for _ in range(calls)]
    del kept
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    graph.replay()
    for _ in range(replays):
        dist.barrier()
        graph.replay()  # ranks are in step when the clock starts
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3 / calls)
    found = torch.tensor([best], device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def candidates(strategies: Any, widths: dict[int, Any], x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What can add up ``x``, by name."""
    from adkit.ops.triton import collectives

    calls: dict[str, Callable[[], Tensor]] = {"NCCL": partial(strategies.get("NCCL").all_reduce, x)}
    for name in ("ONESHOT", "TWOSHOT"):
        strategy = strategies.get(name)
        if strategy is not None and not strategy.refuses(x):
            calls[name] = partial(strategy.all_reduce, x)
    for width, inboxes in widths.items():
        if not collectives.refused(x, inboxes.capacity):
            calls[f"ONESHOT/{width}"] = partial(collectives.oneshot_all_reduce, x, inboxes)
    return calls


def torchs(x: Tensor, group: Any) -> dict[str, Callable[[], Tensor]]:
    """torch's peer-memory kernels, on a copy in its symmetric memory."""
    import torch.distributed._symmetric_memory as symm_mem

    there = symm_mem.empty(x.numel(), dtype=x.dtype, device=x.device)
    symm_mem.rendezvous(there, group.group_name)

    def two_shot() -> Tensor:
        there.copy_(x)
        return torch.ops.symm_mem.two_shot_all_reduce_(there, "sum", group.group_name)

    def one_shot() -> Tensor:
        there.copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce(there, "sum", group.group_name)

    return {"torch one-shot": one_shot, "torch two-shot": two_shot}


def verdict(call: Callable[[], Tensor], x: Tensor) -> dict[str, Any]:
    """Against float64, and the ranks against each other."""
    world = dist.get_world_size()
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x)
    want = torch.stack([p.double() for p in parts]).sum(0)
    got = call().clone()
    torch.cuda.synchronize()
    for _ in range(3):  # the same inboxes again
        again = call()
    same_again = bool((again == got).all())
    sums = [torch.empty_like(got) for _ in range(world)]
    dist.all_gather(sums, got)
    error = float((got.double() - want).abs().max() / want.abs().max())
    return {"error": error, "same_bits": all(bool((s == got).all()) for s in sums), "same_again": same_again}


def measure(rank: int, world: int, port: int, options: argparse.Namespace) -> None:
    """One rank."""
    begin = time.monotonic()
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl", rank=rank, world_size=world, device_id=device)
    from adkit.ops.triton import collectives
    from adkit.runtime.ranks import peers
    from adkit.runtime.ranks.strategies import Site, Strategies

    group = dist.group.WORLD
    collectives.PATIENCE = options.patience
    site = Site(group, rank, world, device)
    strategies = Strategies(site)
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "ranks": world, "dtype": "bfloat16",
        "rows": rows,
    }  # fmt: skip

    def say(text: str) -> None:
        if rank == 0:
            print(f"{time.monotonic() - begin:6.1f}s {text}", flush=True)

    def save() -> None:
        if rank == 0 and options.json:
            options.json.write_text(json.dumps(report, indent=1))

    def out_of_time() -> bool:
        spent = torch.tensor([time.monotonic() - begin], device="cuda")
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        return float(spent) > options.seconds

    say(f"{world} ranks met; peer access {torch.cuda.can_device_access_peer(rank, (rank + 1) % world)}")
    strategies.get("ONESHOT"), strategies.get("TWOSHOT")
    say(f"fallen: {strategies.fallen}")
    report["fallen"] = strategies.fallen
    widths = {}
    if not strategies.fallen:
        widths = {64: peers.inboxes(site, 4096, 64), 2048: peers.inboxes(site, 128, 2048)}
    if options.chain:
        report["chain"] = chain(strategies, widths, say)
    say(f"{'bytes':>9}  microseconds by strategy (! wrong)")
    for nbytes in () if options.chain else SIZES:
        if out_of_time():
            say("out of time")
            break
        x = torch.randn(nbytes // 2, generator=torch.Generator().manual_seed(rank)).bfloat16().to(device)
        calls = candidates(strategies, widths, x)
        try:
            calls |= torchs(x, group)
        except RuntimeError as error:
            say(f"torch's kernels: {str(error).splitlines()[0]}")
        line = []
        for name, call in calls.items():
            try:
                found = verdict(call, x)
                us = 1e6 * seconds_of(call, CALLS if nbytes < 1 << 22 else 5)
            except (RuntimeError, triton.errors.TritonError) as error:
                line.append(f"{name} {type(error).__name__}: {str(error).splitlines()[0][:80]}")
                continue
            bus = 2 * (world - 1) / world * nbytes / us / 1e3
            rows.append({"bytes": nbytes, "strategy": name, "us": us, "bus_gb_s": bus, **found})
            good = found["error"] < 2**-7 and found["same_again"] and found["same_bits"]
            line.append(f"{name} {us:.1f}{'' if good else '!'}")
        say(f"{nbytes:9d}  {'  '.join(line)}")
        save()
    save()
    dist.barrier()
    dist.destroy_process_group()


def chain(strategies: Any, widths: dict[int, Any], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Llama-3.1-8B's linears at one row, ``LAYERS`` layers, with the sums made in several ways."""
    from adkit.ops.triton import collectives
    from adkit.ops.triton.linear import fused_linear

    world = dist.get_world_size()
    layers, d, ffn, q, kv = 6, 4096, 14336 // world, 4096 // world, 1024 // world
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    weights = [
        [torch.randn(*s, **bf16).mul_(0.01) for s in ((d, q), (2 * ffn, d), (d, ffn), (q + 2 * kv, d))]
        for _ in range(layers)
    ]
    norm = torch.ones(d, **bf16)
    ctx = torch.randn(1, q, **bf16)
    nbytes = sum(w.nbytes for layer in weights for w in layer)

    def fused(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        found = strategies.all_reduce_residual_rmsnorm(
            x, residual, norm, 1e-5, 0.0, False, torch.bfloat16, "ONESHOT"
        )
        assert found is not None
        return found

    def step(how: str) -> Tensor:
        residual = torch.zeros(1, d, **(bf16 | ({"dtype": torch.float32} if how.endswith("float32") else {})))
        h = ctx
        for o, gate_up, down, qkv in weights:
            for into, out, act in ((o, gate_up, "silu"), (down, qkv, None)):
                if how == "none":
                    residual = fused_linear(h, into, residual=residual)
                    h = fused_linear(residual, out, norm_weight=norm, eps=1e-5, act=act)
                elif how.startswith("residual"):
                    inboxes = widths[int(how.removeprefix("residual "))]
                    residual = collectives.oneshot_all_reduce(fused_linear(h, into), inboxes, residual)
                    h = fused_linear(residual, out, norm_weight=norm, eps=1e-5, act=act)
                elif how.startswith("fused"):
                    normed, residual = fused(fused_linear(h, into), residual)
                    h = fused_linear(normed, out, act=act)
                else:
                    total = strategies.all_reduce(fused_linear(h, into), how)
                    residual = residual + total
                    h = fused_linear(residual, out, norm_weight=norm, eps=1e-5, act=act)
            h = h[:, : ctx.shape[1]]
        return residual

    rows = []
    for how in ("none", "fused", "fused, float32", *(f"residual {w}" for w in widths), "ONESHOT", "NCCL"):
        try:
            us = 1e6 * seconds_of(lambda how=how: step(how), calls=2)
        except Exception as error:  # the table goes on
            say(f"chain {how}: {type(error).__name__}: {error}")
            continue
        rows.append({"sums": how, "us_a_layer": us / layers, "tb_s": nbytes / us / 1e6})
        say(
            f"chain of {layers} layers, sums {how}: {us / layers:.1f} us a layer, {nbytes / us / 1e6:.2f} TB/s"
        )
    return rows


def main() -> None:
    """Start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--patience", type=int, default=1 << 24)
    parser.add_argument("--chain", action="store_true")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(measure, args=(options.ranks, port, options), nprocs=options.ranks)


if __name__ == "__main__":
    main()
