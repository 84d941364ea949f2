"""Attention kernels on a GPU: right against float64, and how near the hardware's limit.

    python benchmarks/kernels/attention.py [--only decode,prefill,mixed] [--sweep] [--json FILE]

Decode counts bytes: keys and values read once, against the copy rate. Prefill counts multiplications of the
causal half, against the matmul rate. Each time is the median of CUDA graph replays over layers whose caches
differ, with the L2 cache overwritten before each replay.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from adkit.ops.triton import flash_decoding, flash_prefill
from adkit.ops.triton.attention_step import Step

#: Measured on an H100 80GB HBM3: bytes/s of a device copy, multiply-adds x 2 / s of bf16 matrices of 8,192.
COPY, MATMUL = 3.03e12, 793e12
#: name -> (query heads, kv heads, head size)
SHAPES = {"qwen3-0.6b": (16, 8, 128), "llama-3.1-8b": (32, 8, 128)}
PAGE = 16
LAYERS_BYTES = 4e9


@dataclass
class Batch:
    """One step of ``counts[r]`` new tokens on ``cached[r]`` old ones, for a few layers' caches."""

    shape: str
    counts: list[int]
    cached: list[int]
    width: int = 0
    layers: int = 32
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        heads, kv_heads, dim = SHAPES[self.shape]
        make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        need = [-(-(a + b) // PAGE) for a, b in zip(self.counts, self.cached, strict=True)]
        pages = 1 + sum(need)
        self.layers = max(1, min(self.layers, int(LAYERS_BYTES / (pages * PAGE * kv_heads * dim * 4))))
        order = torch.randperm(pages - 1).int() + 1
        table = torch.zeros(len(need), max(self.width, max(need)), dtype=torch.int32)
        at = 0
        for r, n in enumerate(need):
            table[r, :n] = order[at : at + n]
            at += n
        table = table.cuda()
        starts = torch.tensor([0, *self.counts]).cumsum(0).int().cuda()
        lengths = torch.tensor(self.cached, dtype=torch.int32, device="cuda")
        tokens = sum(self.counts)
        rows = torch.cat([torch.arange(c) + b for c, b in zip(self.counts, self.cached, strict=True)]).cuda()
        of = torch.repeat_interleave(torch.arange(len(need)), torch.tensor(self.counts)).cuda()
        slots = table[of, rows // PAGE].long() * PAGE + rows % PAGE
        for _ in range(self.layers):
            qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, **make)
            q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
            caches = [torch.randn(pages, PAGE, kv_heads, dim, **make) for _ in range(2)]
            for cache, new in zip(caches, (k, v), strict=True):
                cache.view(-1, kv_heads, dim)[slots] = new
            out = torch.empty(tokens, heads, dim, **make)
            self.steps.append(
                Step(q, k, v, out, None, None, starts, lengths, table, *caches, dim**-0.5, None, None, None)
            )

    @property
    def bytes(self) -> float:
        """Keys and values of sequences of one token, a layer."""
        _, kv_heads, dim = SHAPES[self.shape]
        return (
            sum(b + 1 for c, b in zip(self.counts, self.cached, strict=True) if c == 1) * kv_heads * dim * 4
        )

    @property
    def flops(self) -> float:
        """2 products x 2, for keys that a token sees, a layer."""
        heads, _, dim = SHAPES[self.shape]
        seen = sum(c * b + c * (c + 1) / 2 for c, b in zip(self.counts, self.cached, strict=True) if c > 1)
        return 4 * seen * heads * dim

    def error(self, sequences: int = 2) -> float:
        """Largest difference from float64 over the first and last sequences, of the largest output."""
        step, kv_heads = self.steps[0], SHAPES[self.shape][1]
        worst = 0.0
        for r in {*range(len(self.counts))[:sequences], *range(len(self.counts))[-sequences:]}:
            start, length = int(step.cu_seqlens[r]), self.counts[r] + self.cached[r]
            used = step.page_table[r, : -(-length // PAGE)].long()
            k, v = (
                c[used].flatten(0, 1)[:length].double().transpose(0, 1) for c in (step.k_cache, step.v_cache)
            )
            first = max(0, self.counts[r] - 256)  # the last rows see the most
            rows = slice(start + first, start + self.counts[r])
            q = step.q[rows].double().transpose(0, 1).unflatten(0, (kv_heads, -1))
            scores = q @ k.transpose(1, 2).unsqueeze(1) * step.scale
            position = torch.arange(self.cached[r] + first, length, device="cuda")
            scores.masked_fill_(torch.arange(length, device="cuda") > position[:, None], float("-inf"))
            want = (scores.softmax(-1) @ v.unsqueeze(1)).flatten(0, 1).transpose(0, 1)
            worst = max(worst, float((step.out[rows].double() - want).abs().max() / want.abs().max()))
        return worst


_flush = None


def seconds(runs: list[Callable[[], Any]], repeat: int = 9) -> float:
    """Median seconds of one of ``runs``, replayed together from a CUDA graph with a cold L2 cache."""
    global _flush
    if _flush is None:
        _flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for run in runs[:2]:
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            run()
    times = []
    for _ in range(repeat):
        _flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[repeat // 2] / len(runs)


def compile_all(runs: list[Callable[[], Any]]) -> None:
    """Compile side by side; what does not compile fails again where it is measured."""

    def attempt(run: Callable[[], Any]) -> None:
        torch.cuda.set_device(0)
        try:
            run()
        except Exception as error:
            print("does not run:", str(error)[:120])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(attempt, runs))
    torch.cuda.synchronize()


def report(
    results: list[dict[str, Any]], case: str, variant: str, time: float, batch: Batch, error: float
) -> None:
    """Keep and print one line."""
    rate = {"GB/s": batch.bytes / time / 1e9, "TFLOP/s": batch.flops / time / 1e12}
    share = max(batch.bytes / time / COPY, batch.flops / time / MATMUL)
    results.append(
        {"case": case, "variant": variant, "us": time * 1e6, **rate, "share": share, "error": error}
    )
    what = f"{rate['GB/s']:7.0f} GB/s" if batch.bytes > batch.flops / 300 else f"{rate['TFLOP/s']:7.1f} TF/s"
    print(f"{case:34s} {variant:44s} {time * 1e6:9.1f} us {what} {share:5.0%}  error {error:.1e}", flush=True)


#: (sequences, context) -> parts tried
_SWEPT = {
    (1, 128): (1,),
    (1, 256): (1, 2, 4),
    (1, 1024): (2, 4, 8, 16),
    (1, 8192): (16, 32),
    (32, 256): (1, 2),
    (32, 850): (1, 2, 4),
    (256, 850): (1, 2),
}
DECODE_SETTINGS: list[dict[str, Any]] = [
    {"BLOCK_L": block, "LEAST": 64, "num_warps": warps, "num_stages": stages}
    for block, warps, stages in (
        (64, 4, 5),
        (64, 4, 7),
        (32, 4, 5),
        (32, 4, 7),
        (32, 2, 5),
        (32, 2, 7),
        (128, 4, 5),
        (128, 4, 2),
        (64, 2, 5),
    )
]
PREFILL_SETTINGS: list[tuple[dict[str, Any], bool]] = [
    (
        {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages, "HISTORY_STAGES": history},
        descriptors,
    )
    for m, n, warps, stages, history, descriptors in (
        (128, 128, 8, 3, 3, True),
        (128, 128, 8, 3, 5, True),
        (64, 64, 4, 3, 3, True),
        (64, 64, 4, 3, 5, True),
        (64, 64, 4, 3, 7, True),
        (64, 64, 4, 4, 5, True),
        (128, 64, 8, 3, 5, True),
        (128, 64, 8, 3, 7, True),
        (64, 32, 4, 4, 7, True),
    )
]


def compile_sweep() -> None:
    """Compile every kernel that a sweep measures."""
    step = Batch("qwen3-0.6b", [1] * 4, [100] * 4, 513, 1).steps[0]
    long = Batch("llama-3.1-8b", [512], [0], 0, 1).steps[0]
    compile_all(
        [
            *(
                lambda s=s, d=d: flash_prefill.launch(long, settings=s, descriptors=d)
                for s, d in PREFILL_SETTINGS
            ),
            *(lambda s=s: flash_decoding.run(step, alone=True, settings=s) for s in DECODE_SETTINGS),
        ]
    )


def name(settings: dict[str, Any], *more: Any) -> str:
    """Settings as a word."""
    return " ".join([*(f"{k.removeprefix('num_')[:7]}={v}" for k, v in settings.items()), *map(str, more)])


def decode(results: list[dict[str, Any]], sweep: bool) -> None:
    """Batches of one token a sequence."""
    wide = 8192 // PAGE + 1
    for shape in SHAPES:
        for sequences in (1, 32, 256, 1024):
            for context in (128, 256, 850, 1024, 8192):
                if sequences * context * 8 * 128 * 4 > 9e9 or (context == 128 and sequences > 1):
                    continue
                if context == 850 and sequences not in (32, 256):
                    continue
                lengths = [context - 1] * sequences
                if context == 850:  # a drained batch: lengths differ
                    lengths = [200 + 1300 * r // sequences for r in range(sequences)]
                batch = Batch(shape, [1] * sequences, lengths, wide)
                case = f"decode {shape} {sequences} x {context}"
                tried: list[tuple[Any, Any]] = [(None, None)]
                if sweep and shape == "qwen3-0.6b" and (sequences, context) in _SWEPT:
                    tried += [(s, p) for s in DECODE_SETTINGS for p in _SWEPT[sequences, context]]
                for settings, parts in tried:
                    runs = [
                        lambda t=t, s=settings, p=parts: (
                            flash_decoding.run(t, alone=True, settings=s, parts=p)
                            if s
                            else flash_decoding.launch(t, alone=True)
                        )
                        for t in batch.steps
                    ]
                    batch.steps[0].out.zero_()
                    try:
                        time = seconds(runs)
                    except Exception as error:
                        print(case, settings, str(error)[:100])
                        continue
                    report(results, case, name(settings or {}, f"parts={parts}"), time, batch, batch.error())


def sdpa(step: Step, counts: list[int], backend: SDPBackend) -> Callable[[], Any]:
    """torch's attention over sequences of one length without history."""
    q, k, v = (x.unflatten(0, (len(counts), -1)).transpose(1, 2) for x in (step.q, step.key, step.value))

    def run() -> None:
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def prefill(results: list[dict[str, Any]], sweep: bool) -> None:
    """Prompts, whole and as a chunk behind what is cached."""
    for shape, counts, cached in (
        ("llama-3.1-8b", [8192], [0]),
        ("llama-3.1-8b", [2048] * 4, [0] * 4),
        ("llama-3.1-8b", [128] * 16, [0] * 16),
        ("llama-3.1-8b", [2048], [6144]),
        ("qwen3-0.6b", [2048], [0]),
    ):
        batch = Batch(shape, counts, cached, layers=4)
        case = f"prefill {shape} {len(counts)} x {counts[0]}" + (f" after {cached[0]}" if cached[0] else "")
        tried: list[tuple[Any, bool]] = [(None, True)]
        if sweep and shape == "llama-3.1-8b":
            tried = PREFILL_SETTINGS
        for settings, descriptors in tried:
            runs = [
                lambda t=t, s=settings, d=descriptors: flash_prefill.launch(t, settings=s, descriptors=d)
                for t in batch.steps
            ]
            batch.steps[0].out.zero_()
            try:
                time = seconds(runs)
            except Exception as error:
                print(case, settings, str(error)[:100])
                continue
            variant = name(settings or {}, "descriptors" if descriptors else "pointers")
            report(results, case, variant, time, batch, batch.error())
        if not any(cached):
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                try:
                    time = seconds([sdpa(t, counts, backend) for t in batch.steps])
                except Exception as error:
                    print(case, backend, str(error)[:100])
                    continue
                report(results, case, f"torch {backend.name.lower()}", time, batch, float("nan"))


def mixed(results: list[dict[str, Any]]) -> None:
    """Decodes and prompt chunks in one step; rates count the larger of both limits."""
    for shape in SHAPES:
        for decodes, prompts in ((200, [1848]), (64, [512] * 3)):
            counts = prompts + [1] * decodes
            batch = Batch(shape, counts, [0] * len(prompts) + [850] * decodes, 513, layers=4)

            def both(step: Step) -> None:
                flash_prefill.launch(step)
                flash_decoding.launch(step, alone=False)

            for what, run in (
                ("both", both),
                ("prefill", flash_prefill.launch),
                ("decode", lambda t: flash_decoding.launch(t, alone=False)),
            ):
                time = seconds([lambda t=t, run=run: run(t) for t in batch.steps])
                case = f"mixed {shape} {len(prompts)} x {prompts[0]} + {decodes}"
                report(results, case, what, time, batch, batch.error())


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="decode,prefill,mixed")
    parser.add_argument("--sweep", action="store_true", help="try many launch settings")
    parser.add_argument("--compile", action="store_true", help="compile what a sweep needs, and stop")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    if args.sweep or args.compile:
        compile_sweep()
    if args.compile:
        return
    try:
        if "prefill" in args.only:
            prefill(results, args.sweep)
        if "decode" in args.only:
            decode(results, args.sweep)
        if "mixed" in args.only:
            mixed(results)
    finally:
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
