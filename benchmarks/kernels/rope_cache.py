"""RoPE with norms of heads and cache write: one fused kernel against the ops that it replaces, on a GPU.

    python benchmarks/kernels/rope_cache.py [--model NAME ...] [--json FILE]

Each case is checked against the reference in float64 first. Times are microseconds of the device's own time
(replayed from a CUDA graph, inputs in the second-level cache, as they are after the projection).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench_cudagraph

from adkit.ops import pick
from adkit.ops.triton import attention

#: Model: query heads, kv heads, head dim, normalised heads.
MODELS = {
    "llama-3.1-8b": (32, 8, 128, False),
    "llama-3.2-1b": (32, 8, 64, False),
    "qwen3-0.6b": (16, 8, 128, True),
    "gemma3-4b": (8, 4, 256, True),
}


def arguments(
    tokens: int, heads: int, kv_heads: int, dim: int, norm: bool
) -> tuple[list[Any], dict[str, Any]]:
    """What a layer's fused op is given, in bfloat16: pieces of one projection, random slots of 4,096 pages."""
    make = {"device": "cuda", "dtype": torch.bfloat16}
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    pieces = torch.randn(1, tokens, sum(sizes), **make).split(sizes, -1)
    q, k, v = (x.view(1, tokens, -1, dim) for x in pieces)
    angle = torch.randn(1, tokens, dim, device="cuda")
    weights = [torch.randn(dim, **make) if norm else None for _ in range(2)]
    slots = torch.randperm(4096 * 16, device="cuda")[:tokens]
    caches = [torch.zeros(4096, 16, kv_heads, dim, **make) for _ in range(2)]
    eps = {"q_eps": 1e-6, "k_eps": 1e-6} if norm else {}
    return [q, k, v, *weights, angle.cos().bfloat16(), angle.sin().bfloat16(), slots, *caches], eps


def parts(args: list[Any], eps: dict[str, Any]) -> Any:
    """The same by the single kernels: norms, RoPE, cache write."""
    q, k, v, wq, wk, cos, sin, slots, k_cache, v_cache = args
    if eps:
        q, k = pick("rmsnorm", "triton")(q, wq, 1e-6), pick("rmsnorm", "triton")(k, wk, 1e-6)
    q, k = pick("rope_with_explicit_cos_sin", "triton")(q, k, cos, sin, 2)
    attention.write_kv(k, v, slots, k_cache, v_cache)
    return q, k


def error(args: list[Any], eps: dict[str, Any]) -> float:
    """Largest difference of the fused kernel from float64, as a share of the largest value."""
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    want = (*pick("rope_kv_cache", "torch")(*wide, **eps), *wide[-2:])
    got = (*pick("rope_kv_cache", "triton")(*args, **eps), *args[-2:])
    return max(float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True))


def extra_bytes(args: list[Any], eps: dict[str, Any]) -> int:
    """Device memory that a call takes beyond its two results (bytes)."""
    run = pick("rope_kv_cache", "triton")
    run(*args, **eps)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run(*args, **eps)
    return torch.cuda.max_memory_allocated() - before - sum(-(-t.nbytes // 512) * 512 for t in out)


def main() -> None:
    """Check, time, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    chosen = parser.parse_args()
    rows = []
    print(f"{'model':14} {'tokens':>6} {'fused us':>9} {'parts us':>9} {'GB/s':>6} {'error':>8} {'extra':>6}")
    for model in chosen.model:
        for tokens in (1, 32, 256, 8192):
            args, eps = arguments(tokens, *MODELS[model])
            off, extra = error(args, eps), extra_bytes(args, eps)
            fused = 1e3 * do_bench_cudagraph(
                lambda a=args, e=eps: pick("rope_kv_cache", "triton")(*a, **e), rep=10
            )
            single = 1e3 * do_bench_cudagraph(lambda a=args, e=eps: parts(a, e), rep=10)
            moved = 2 * sum(t.nbytes for t in args[:3]) + args[1].nbytes
            row = {
                "model": model, "tokens": tokens, "fused_us": fused, "parts_us": single,
                "gb_per_s": moved / fused / 1e3, "error": off, "extra_bytes": extra,
            }  # fmt: skip
            rows.append(row)
            print(
                f"{model:14} {tokens:6d} {fused:9.2f} {single:9.2f} {row['gb_per_s']:6.0f} {off:8.1e} {extra:6d}",
                flush=True,
            )
    if chosen.json:
        chosen.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
