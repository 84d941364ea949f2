"""Measure the linear layers of decode batches: cuBLAS with its neighbours apart, and the best kernel.

    python benchmarks/kernels/linear.py [--rows 1 2 4 8 16 32 64] [--models qwen3-0.6b ...] [--json FILE]

Every layer is checked against float64, then timed in a CUDA graph over copies of its weight, so that none
comes from the cache. Share: the weight's bytes over the time, as part of the measured copy rate (bytes read
plus written). The chains run the linears of eight layers one after another as a decode step does (attention left out),
with programmatic dependent launch and without.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adkit.ops import OPS
from adkit.ops.triton import linear, pdl, tuning

BF16 = torch.bfloat16
#: D, rows of q+k+v, columns of o, F, V
MODELS = {
    "qwen3-0.6b": (1024, 4096, 2048, 3072, 151936),
    "llama-3.2-1b": (2048, 3072, 2048, 8192, 128256),
    "llama-3.1-8b": (4096, 6144, 4096, 14336, 128256),
}
LAYERS = 8
TOP = 5


def copy_rate() -> float:
    """Bytes a second, read and written, of a 4 GiB device copy (launched alone: graphs copy more slowly)."""
    a = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        b.copy_(a)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * a.nbytes / min(times)


class Layer:
    """One linear of a model with what stands around it."""

    def __init__(self, name: str, outs: int, width: int, rows: int, norm: bool, act: bool, residual: bool):
        self.name, self.rows, self.norm, self.act, self.residual = name, rows, norm, act, residual
        self.weight = torch.randn(outs, width, device="cuda", dtype=BF16) * width**-0.5

    def call(self, generator: torch.Generator) -> linear.Layer:
        """Its kernel call on random input."""

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda", generator=generator).to(BF16)

        outs, width = self.weight.shape
        return linear.Layer(
            x=random(self.rows, width),
            bias=None,
            norm_weight=random(width) if self.norm else None,
            residual=random(self.rows, outs) if self.residual else None,
            eps=1e-6 if self.norm else None,
            offset=0.0,
            in_float=False,
            act="silu" if self.act else None,
        )


def layers(model: str, rows: int) -> list[Layer]:
    """The linears of one decoder layer, and the lm_head."""
    d, qkv, o, f, v = MODELS[model]
    return [
        Layer("qkv", qkv, d, rows, True, False, False),
        Layer("o", d, o, rows, False, False, True),
        Layer("gate_up", 2 * f, d, rows, True, True, False),
        Layer("down", d, f, rows, False, False, True),
        Layer("lm_head", v, d, rows, True, False, False),
    ]


def exact(call: linear.Layer, weight: Tensor) -> Tensor:
    """What the layer gives in float64."""
    wide = [None if t is None else t.double() for t in (weight, call.bias, call.norm_weight, call.residual)]
    x = call.x.double()
    if call.eps is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + call.eps) * wide[2]
    want: Tensor = OPS["torch_fused_linear"].reference(x, wide[0], None, None, wide[3], act=call.act)
    return want


def compare(model: str, rows: int, copy: float, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """One line a linear of the model."""
    generator = torch.Generator("cuda").manual_seed(0)
    found = []
    for layer in layers(model, rows):
        call = layer.call(generator)
        ways = linear.ways(call, layer.weight)
        begin = time.perf_counter()
        times = tuning.measure(ways, call.run, (layer.weight,))
        spent = time.perf_counter() - begin
        tuning.keep("linear", linear.key(call, layer.weight), ways[times.index(min(times))])
        library = times[ways.index(linear.LIBRARY)]
        order = sorted(range(len(ways)), key=times.__getitem__)
        want = exact(call, layer.weight)
        worst = max(
            float((call.run(way, layer.weight).double() - want).norm() / want.norm())
            for way, t in zip(ways, times, strict=True)
            if t < math.inf
        )
        share = {k: layer.weight.nbytes / t / copy for k, t in (("lib", library), ("best", times[order[0]]))}
        found.append(
            {
                "model": model,
                "linear": layer.name,
                "rows": rows,
                "library_us": library * 1e6,
                "best_us": times[order[0]] * 1e6,
                "library_share": share["lib"],
                "best_share": share["best"],
                "error": worst,
                "tuning_seconds": spent,
                "ways": [{**ways[i], "us": round(times[i] * 1e6, 2)} for i in order],
            }
        )
        show(
            f"{model:13} {layer.name:8} M={rows:<3} lib {library * 1e6:7.2f} us {share['lib']:5.1%}  "
            f"best {times[order[0]] * 1e6:7.2f} us {share['best']:5.1%}  err {worst:.4f}  {spent:4.1f} s  "
            + " | ".join(f"{_short(ways[i])} {times[i] * 1e6:.1f}" for i in order[:TOP])
        )
    return found


def _short(way: dict[str, Any]) -> str:
    """Settings in few characters."""
    if way["path"] == "library":
        return "lib"
    if way["path"] == "rows":
        return f"n{way['BLOCK_N']}w{way['num_warps']}"
    if way["path"] == "stream":
        return f"n{way['BLOCK_N']}x{way['each']}w{way['num_warps']}"
    return f"n{way['BLOCK_N']}k{way['BLOCK_K']}/{way['SPLIT']}s{way['num_stages']}w{way['num_warps']}" + (
        "i" if way["inline"] else ""
    )


def chain(model: str, rows: int, copy: float, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """The linears of LAYERS layers in their order, each with its fastest way: microseconds a layer."""
    found = []
    generator = torch.Generator("cuda").manual_seed(0)
    stack = [layers(model, rows)[:-1] for _ in range(LAYERS)]
    calls = [[layer.call(generator) for layer in block] for block in stack]
    size = sum(layer.weight.nbytes for block in stack for layer in block)
    enabled = pdl.enabled
    results: list[Tensor] = []  # the first is what the library gives, launch after launch
    for way in ("library", "best without pdl", "best with pdl"):
        pdl.enabled = lambda on=way == "best with pdl": on  # type: ignore[assignment]

        def step(way: str = way) -> None:
            x = calls[0][0].x
            for block, made in zip(stack, calls, strict=True):
                attended = made[1].x  # what attention gives, in its place
                for layer, call in zip(block, made, strict=True):
                    given = {"qkv": x, "o": attended, "gate_up": x, "down": x}[layer.name]
                    settings = linear.LIBRARY
                    now = linear.Layer(**{**vars(call), "x": given})
                    if way != "library":
                        settings = linear.fastest(now, layer.weight)
                    y = now.run(settings, layer.weight)
                    x = x if layer.name == "qkv" else y
            results.append(x)

        step()
        took = tuning.seconds([step])
        apart = float((results[-1].double() - results[0].double()).norm() / results[0].double().norm())
        found.append(
            {
                "model": model,
                "rows": rows,
                "way": way,
                "us_a_layer": took * 1e6 / LAYERS,
                "share": size / took / copy,
                "apart": apart,
            }
        )
        show(
            f"{model:13} M={rows:<3} chain, {way:17} {took * 1e6 / LAYERS:7.2f} us a layer {size / took / copy:5.1%}  "
            f"rmse to the library's {apart:.4f}"
        )
    pdl.enabled = enabled
    return found


def main() -> None:
    """Print a table; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--json")
    args = parser.parse_args()
    copy = copy_rate()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e12:.2f} TB/s, pdl {pdl.enabled()}"
    )
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "copy": copy,
        "linears": [],
        "chains": [],
    }
    for rows in args.rows:
        for model in args.models:
            result["linears"] += compare(model, rows, copy, lambda line: print(line, flush=True))
            result["chains"] += chain(model, rows, copy, lambda line: print(line, flush=True))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
