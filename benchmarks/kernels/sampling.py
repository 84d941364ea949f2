"""Choosing tokens on the device: the kernels against the torch path of the sampler, on a GPU.

    python benchmarks/kernels/sampling.py [--vocab V ...] [--json FILE]

Every drawn token is checked: the number it was drawn with must lie in its interval of the distribution function
in float64 (1e-6 of rounding allowed). ``device`` is the device's own time (replayed from a CUDA graph),
``call`` a call from Python with the device idle, ``torch`` such a call of the torch path, all in microseconds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench_cudagraph

from adkit.contract import SamplingParams
from adkit.ops.triton import sampling
from adkit.runtime import sampler

VOCABS = (151_936, 128_256)
ROWS = (1, 32, 256)
KINDS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.8),
    "top-k": SamplingParams(temperature=0.8, top_k=50),
    "top-p": SamplingParams(temperature=0.8, top_p=0.9),
    "all": SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.02),
}


def torch_path(logits: Tensor, params: list[SamplingParams], uniform: Tensor) -> Tensor:
    """What the sampler does without kernels."""
    scores = logits.float()
    if params[0].greedy:
        return scores.max(-1).indices
    return sampler._draw(sampler.filter_scores(scores, params), uniform)


def settings_of(params: list[SamplingParams], uniform: Tensor) -> Tensor:
    """The parameters as the kernels take them."""
    rows = [
        [p.temperature for p in params],
        [p.top_k or math.inf for p in params],
        [p.top_p if p.top_p < 1 else math.inf for p in params],
        [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params],
    ]
    return torch.cat([torch.tensor(rows, dtype=torch.float64).cuda(), uniform[None]])


def wrong(tokens: Tensor, logits: Tensor, params: list[SamplingParams], uniform: Tensor) -> int:
    """Rows whose token is not the one that float64 gives, rounding apart."""
    if params[0].greedy:
        return int((logits.float().gather(1, tokens[:, None])[:, 0] != logits.float().amax(-1)).sum())
    probs = sampler.filter_scores(logits.float(), params).double().softmax(-1)
    upto = probs.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    own = probs.gather(1, tokens[:, None])[:, 0]
    return int(((uniform > upto + 1e-6) | (uniform < upto - own - 1e-6) | (own == 0)).sum())


def call_us(run: Callable[[], Any], seconds: float = 0.1) -> float:
    """Microseconds of a call, until the device is done."""
    run()
    torch.cuda.synchronize()
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds or count < 3:
        run()
        torch.cuda.synchronize()
        count += 1
    return 1e6 * spent / count


def main() -> None:
    """Check, time, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABS)
    chosen = parser.parse_args()
    rows = []
    print(
        f"{'vocab':>7} {'rows':>4} {'kind':12} {'device us':>9} {'call us':>9} {'torch us':>9} {'wrong':>5}"
    )
    for vocab in chosen.vocab:
        for count in ROWS:
            # Peaked like a language model's: a few likely tokens above a broad rest.
            logits = torch.randn(count, vocab, device="cuda") * 2
            logits[:, torch.randperm(vocab, device="cuda")[:40]] += 8
            logits = logits.bfloat16()
            uniform = torch.rand(count, dtype=torch.float64, device="cuda")
            for kind, p in KINDS.items():
                params = [p] * count
                settings = settings_of(params, uniform)

                def run(x: Tensor = logits, s: Tensor = settings, p: SamplingParams = p) -> Tensor:
                    if p.greedy:
                        return sampling.greedy(x)
                    return sampling.draw(x, s, bool(p.top_k), p.top_p < 1)

                bad = wrong(run(), logits, params, uniform)
                device = 1e3 * do_bench_cudagraph(run, rep=10)
                call = call_us(run)
                plain = call_us(lambda x=logits, p=params, u=uniform: torch_path(x, p, u))
                rows.append(
                    {"vocab": vocab, "rows": count, "kind": kind, "device_us": device, "call_us": call,
                     "torch_us": plain, "wrong": bad}
                )  # fmt: skip
                print(
                    f"{vocab:7d} {count:4d} {kind:12} {device:9.1f} {call:9.1f} {plain:9.1f} {bad:5d}",
                    flush=True,
                )
    if chosen.json:
        chosen.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
