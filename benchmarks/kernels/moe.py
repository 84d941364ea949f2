"""Experts and routing on a GPU: right, how long, and what share of the roofline.

    python benchmarks/kernels/moe.py [--models qwen3-30b-a3b mixtral-8x7b] [--tokens 1 8 1024] [--json FILE]

Each figure is one CUDA graph of several calls with different routing, so that no call finds its experts in the
cache. The roofline is the larger of bytes (weights of the experts that are hit, read once) over the copy rate
and FLOPs over the matmul rate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adkit.ops import pick
from adkit.ops.triton import moe as kernels
from adkit.ops.triton.moe_grouped import grouped

#: E, k, D, F
SHAPES = {"qwen3-30b-a3b": (128, 8, 2048, 768), "mixtral-8x7b": (8, 2, 4096, 14336)}
TOKENS = (1, 2, 4, 8, 32, 128, 1024, 8192)
COPY, MATMUL = 3.03e12, 793e12  # bytes/s and FLOP/s of an H100 80GB, measured
GATED = kernels.Gating("silu", True, False, None, None, 0.0)


def microseconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of one call, all of them in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for i in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i > 1:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return sorted(times)[len(times) // 2]


def gathered(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Copies of the chosen experts' weights and batched products."""
    h = torch.einsum("tkfd,td->tkf", up[ids], x)
    gate, rest = h.chunk(2, -1)
    return torch.einsum("tkdf,tkf,tk->td", down[ids], F.silu(gate) * rest, weights)


def grouped_mm(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Sorted pairs and torch's grouped product."""
    order = ids.flatten().argsort()
    ends = torch.searchsorted(ids.flatten()[order], torch.arange(up.shape[0], device=x.device), right=True)
    ends = ends.to(torch.int32)
    h = torch._grouped_mm(x[order // ids.shape[1]], up.transpose(1, 2), offs=ends)
    gate, rest = h.chunk(2, -1)
    y = torch._grouped_mm(F.silu(gate) * rest, down.transpose(1, 2), offs=ends)
    back = torch.empty_like(y).index_copy_(0, order, y * weights.flatten()[order, None])
    return back.view(*ids.shape, -1).sum(1)


def one(name: str, tokens: int) -> dict[str, Any]:
    """Figures of the experts of one layer at so many tokens."""
    experts, k, d, f = SHAPES[name]
    torch.manual_seed(0)
    up = torch.randn(experts, 2 * f, d, device="cuda", dtype=torch.bfloat16) * d**-0.5
    down = torch.randn(experts, d, f, device="cuda", dtype=torch.bfloat16) * f**-0.5
    x = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16)
    n = 16 if tokens <= 128 else 4
    logits = [torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16) for _ in range(n)]
    route = pick("moe_topk", "triton")
    options: dict[str, Any] = {"normalize": True, "dtype": torch.bfloat16}
    routed = [route(row, k, **options) for row in logits]
    hit = sum(len(ids.unique()) for _, ids in routed) / n
    moved = hit * 3 * d * f * 2 + tokens * 2 * d * 2
    limit = max(moved / COPY, 6 * tokens * k * d * f / MATMUL) * 1e6
    row: dict[str, Any] = {"model": name, "tokens": tokens, "experts hit": round(hit, 1), "limit us": limit}

    def run(what: Callable[..., Tensor], *rest: Any) -> float:
        return microseconds([lambda r=r: what(x, r[1], r[0], up, down, *rest) for r in routed])

    moe = pick("moe", "triton")
    row["us"] = run(moe)
    row["share"] = limit / row["us"]
    if tokens <= 32:
        row["pair by pair us"] = run(kernels.pairwise, None, None, GATED)
    if tokens >= 4:
        row["grouped us"] = run(grouped, None, None, GATED)
    if tokens * k * 3 * d * f * 2 <= 10e9:
        row["gather us"] = run(gathered)
    try:
        row["grouped_mm us"] = run(grouped_mm)
    except (AttributeError, RuntimeError) as error:
        row["grouped_mm us"] = f"{type(error).__name__}"
    row["routing us"] = microseconds([lambda row=r: route(row, k, **options) for r in logits])
    row["routing in torch us"] = microseconds(
        [lambda row=r: pick("moe_topk", "torch")(row, k, **options) for r in logits]
    )
    row["error"] = _error(
        x[:128], *(t[:128] for t in routed[0]), up, down, moe(x, *routed[0][::-1], up, down)
    )
    return row


def _error(x: Tensor, weights: Tensor, ids: Tensor, up: Tensor, down: Tensor, got: Tensor) -> float:
    """rmse against float32 over the root mean square."""
    want = torch.zeros_like(x, dtype=torch.float32)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        gate, rest = (x[token].float() @ up[e].float().t()).chunk(2, -1)
        y = (F.silu(gate) * rest) @ down[e].float().t()
        want.index_add_(0, token, y * weights[token, slot, None].float())
    return float((got[: len(x)].float() - want).norm() / want.norm())


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for name in args.models:
        for tokens in args.tokens:
            rows.append(one(name, tokens))
            shown = {c: f"{v:.3g}" if isinstance(v, float) and v < 10 else v for c, v in rows[-1].items()}
            print(", ".join(f"{c} {v:.0f}" if isinstance(v, float) else f"{c} {v}" for c, v in shown.items()))
            torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
