"""The linears of one decode step in one CUDA graph, attention left out: how the residual stream is kept, and settings
found where they are used.

    python benchmarks/kernels/decode_chain.py [--rows 1 8 64] [--models qwen3-0.6b ...] [--json FILE]
    python benchmarks/kernels/decode_chain.py --tune --rows 1 2 4 8   # and keep the fastest settings for these rows

Weights are random and all of a model's, so none comes from the cache. ``--tune`` exchanges the settings of one linear
after the other, measures the whole chain with each candidate, and keeps what is fastest as ``tuning`` does, in
``$ADKIT_CACHE_DIR``: kernels of a few microseconds are in each other's way, which timing one apart does not show. About
a minute a number of rows on an H100; memory for the weights of the largest model. Rows above 64 are the library's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from adkit.ops.triton import linear, tuning

BF16, F32 = torch.bfloat16, torch.float32
#: layers, D, rows of q+k+v, columns of o, F, V
MODELS = {
    "llama-3.1-8b": (32, 4096, 6144, 4096, 14336, 128256),
    "llama-3.2-1b": (16, 2048, 3072, 2048, 8192, 128256),
    "qwen3-0.6b": (28, 1024, 4096, 2048, 3072, 151936),
}
LINEARS = ("qkv", "o", "gate_up", "down", "lm_head")
#: Dtype of the residual stream, and whether a sum goes over its residual.
STREAMS = {
    "bfloat16, new memory": (BF16, False),
    "bfloat16, in place": (BF16, True),
    "float32, new memory": (F32, False),
    "float32, in place": (F32, True),
}
ROUNDS = 5
Settings = Mapping[str, tuning.Settings]


class Model:
    """Random weights of all linears of a model, and one step through them."""

    def __init__(self, name: str) -> None:
        layers, d, qkv, o, f, v = MODELS[name]
        self.name, self.attended = name, o
        shapes = {"qkv": (qkv, d), "o": (d, o), "gate_up": (2 * f, d), "down": (d, f)}
        self.layers = [{k: _random(*shape) for k, shape in shapes.items()} for _ in range(layers)]
        self.head = _random(v, d)
        self._inputs: dict[int, list[Tensor]] = {}
        self.gain = torch.ones(d, device="cuda", dtype=BF16)

    def call(
        self, kind: str, x: Tensor, residual: Tensor | None = None, in_place: bool = False
    ) -> linear.Layer:
        """The kernel call of a linear: with its norm, gate or sum."""
        norm = kind in ("qkv", "gate_up", "lm_head")
        return linear.Layer(
            x,
            bias=None,
            norm_weight=self.gain if norm else None,
            residual=residual,
            eps=1e-5 if norm else None,
            offset=0.0,
            in_float=False,
            act="silu" if kind == "gate_up" else None,
            out_dtype=F32 if kind == "lm_head" else None,
            out=residual if in_place else None,
        )

    def inputs(self, rows: int) -> list[Tensor]:
        """What a step begins with [M, D], and what attention gives [M, columns of o]; kept for the graphs' sake."""
        if rows not in self._inputs:
            generator = torch.Generator("cuda").manual_seed(0)
            sizes = (self.head.shape[1], self.attended)
            made = [torch.randn(rows, n, device="cuda", generator=generator).to(BF16) for n in sizes]
            self._inputs[rows] = made
        return self._inputs[rows]

    def step(
        self,
        x: Tensor,
        attended: Tensor,
        settings: Settings,
        dtype: torch.dtype,
        in_place: bool,
        layers: int | None = None,
    ) -> Tensor:
        """Logits [M, V] of ``inputs``, with a residual stream of ``dtype``; through ``layers``, or all."""
        x = x.to(dtype, copy=True)
        for weights in self.layers[:layers]:
            qkv = self.call("qkv", x).run(settings["qkv"], weights["qkv"])
            a = qkv[:, : self.attended] if len(x) == 1 else attended  # one row: what the kernel before wrote
            x = self.call("o", a, x, in_place).run(settings["o"], weights["o"])
            h = self.call("gate_up", x).run(settings["gate_up"], weights["gate_up"])
            x = self.call("down", h, x, in_place).run(settings["down"], weights["down"])
        return self.call("lm_head", x).run(settings["lm_head"], self.head)

    def weight(self, kind: str) -> Tensor:
        """The head, or a linear of the first layer."""
        return self.head if kind == "lm_head" else self.layers[0][kind]

    def sample(self, kind: str, rows: int, dtype: torch.dtype) -> linear.Layer:
        """A linear's call on random input, beside a residual stream of ``dtype``."""
        weight, sums = self.weight(kind), kind in ("o", "down")
        x = torch.randn(rows, weight.shape[1], device="cuda").to(BF16 if sums else dtype)
        residual = torch.randn(rows, weight.shape[0], device="cuda").to(dtype) if sums else None
        return self.call(kind, x, residual)

    def graph(
        self, rows: int, settings: Settings, dtype: torch.dtype, in_place: bool
    ) -> torch.cuda.CUDAGraph:
        """One step, captured."""
        x, attended = self.inputs(rows)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles
            self.step(x, attended, settings, dtype, in_place, layers=1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.step(x, attended, settings, dtype, in_place)
        return graph


def _random(*shape: int) -> Tensor:
    return (torch.rand(shape, device="cuda", dtype=BF16) - 0.5) * (2 * shape[-1] ** -0.5)


def microseconds(graphs: Mapping[str, torch.cuda.CUDAGraph], replays: int = 12) -> dict[str, float]:
    """Of one replay of each: medians of rounds in which all take their turn."""

    def once(graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / replays * 1000

    for graph in graphs.values():
        once(graph)
    rounds = [{name: once(graph) for name, graph in graphs.items()} for _ in range(ROUNDS)]
    return {name: round(statistics.median(r[name] for r in rounds), 2) for name in graphs}


def known(model: Model, rows: int, dtype: torch.dtype) -> dict[str, tuning.Settings]:
    """The settings that an engine runs with: shipped, found here before, or measured now."""
    return {k: linear.fastest(model.sample(k, rows, dtype), model.weight(k)) for k in LINEARS}


def tune(model: Model, rows: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Settings for so many rows, each linear's chosen with the others in place; kept for engines that start here."""
    settings, tried = known(model, rows, F32), {}
    for kind in LINEARS:
        call, weight = model.sample(kind, rows, F32), model.weight(kind)
        ways = {json.dumps(way, sort_keys=True): way for way in linear.ways(call, weight)}
        graphs = {}
        for name, way in ways.items():
            with contextlib.suppress(triton.errors.TritonError):  # does not compile for these sizes
                graphs[name] = model.graph(rows, {**settings, kind: way}, F32, in_place=True)
        times = microseconds(graphs)
        fastest = min(times, key=times.__getitem__)
        settings[kind] = ways[fastest]
        tried[kind] = dict(sorted(times.items(), key=lambda item: item[1]))
        show(f"{model.name:13} M={rows:<3} {kind:8} {times[fastest]:8.1f} us a step with {fastest}")
        tuning.keep("linear", linear.key(call, weight), settings[kind])
    return {"model": model.name, "rows": rows, "settings": settings, "us": tried}


def main() -> None:
    """Print; write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tune", action="store_true", help="first find and keep settings for these rows")
    parser.add_argument("--json", help="file for all figures")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "chains": [],
        "tuned": [],
    }
    with torch.inference_mode():
        for name in options.models:
            model = Model(name)
            for rows in options.rows:
                if options.tune:
                    result["tuned"].append(tune(model, rows, lambda line: print(line, flush=True)))
                settings = {dtype: known(model, rows, dtype) for dtype in (BF16, F32)}
                graphs = {k: model.graph(rows, settings[how[0]], *how) for k, how in STREAMS.items()}
                times = microseconds(graphs)
                result["chains"].append({"model": name, "rows": rows, "us": times})
                told = ", ".join(f"{k} {v:.1f}" for k, v in times.items())
                print(f"{name:13} M={rows:<3} us a step: {told}", flush=True)
                del graphs
            del model
            torch.cuda.empty_cache()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
