"""Measure the walk: time of the passes, cost of recording, canonical counts of every bundled config.

    python benchmarks/measure_walk.py [--quick]

Writes ``benchmarks/results/walk.json``. Everything runs on shapes alone, on CPU; nothing is downloaded. Let
the machine be otherwise idle: times are medians of three runs of the passes over one export.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch
import transformers

import adkit
from adkit.models import bundled_names

RESULTS = Path(__file__).parent / "results" / "walk.json"
OPS = ("torch_rmsnorm", "torch_attention", "torch_rope_with_explicit_cos_sin", "torch_rope_with_qk_interleaving",
       "torch_rope_with_complex_freqs", "torch_swiglu", "torch_moe", "torch_linear_simple")  # fmt: skip


def bench(name: str, cache: str) -> adkit.Workbench:
    """A Workbench on shapes whose export is kept in ``cache`` for the next one."""
    overrides = ["transforms.pipeline_cache.enabled=true", "transforms.pipeline_cache.stage=export",
                 f"transforms.pipeline_cache.root={cache}"]  # fmt: skip
    return adkit.Workbench(name, device="cpu", progress=False, overrides=overrides)


def passes(name: str, cache: str) -> dict[str, float]:
    """Seconds of one run of everything beyond export, and of recording it."""
    wb = bench(name, cache).run("export")
    gc.collect()
    start = time.perf_counter()
    wb.run()
    total = time.perf_counter() - start
    steps = [s for s in wb.steps if s.stage not in ("factory", "export")]
    record = sum(s.record_seconds for s in steps)
    return {"wall": total, "passes": sum(s.seconds for s in steps), "recording": record,
            "nodes_before": len(steps[0].before), "nodes_after": len(wb.graph)}  # fmt: skip


def recording_bytes(name: str, cache: str) -> int:
    """Bytes that the whole record holds on to: what is freed when only the last graph is kept."""
    tracemalloc.start()
    wb = bench(name, cache).run()
    gc.collect()
    full = tracemalloc.get_traced_memory()[0]
    wb._steps, wb._history = [], []
    wb._state.snapshot = adkit.graph.snapshot.Snapshot()
    gc.collect()
    rest = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return full - rest


def counts(name: str, cache: str) -> dict[str, int]:
    """Canonical ops after pattern matching."""
    found = bench(name, cache).run("pattern_matcher").graph.counts()
    return {op: found[f"adkit.{op}"] for op in OPS if f"adkit.{op}" in found}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="llama-3.2-1b alone, nothing written")
    quick = parser.parse_args().quick
    names = ["llama-3.2-1b"] if quick else list(bundled_names())
    result: dict[str, object] = {
        "what": "passes beyond export on shapes alone, recording, canonical counts",
        "command": "python benchmarks/measure_walk.py",
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()} CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    with tempfile.TemporaryDirectory() as cache:
        exports, canonical, timed = {}, {}, {}
        for name in [n for n in names if n != "demo"]:
            start = time.perf_counter()
            bench(name, cache).run("export")
            exports[name] = round(time.perf_counter() - start, 2)
            canonical[name] = counts(name, cache)
            print(f"{name}: export {exports[name]} s, {canonical[name]}", flush=True)
        for name in [n for n in ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-405b") if n in names]:
            runs = [passes(name, cache) for _ in range(3)]
            timed[name] = {k: round(statistics.median(r[k] for r in runs), 3) for k in runs[0]}
            timed[name]["recording_share"] = round(timed[name]["recording"] / timed[name]["passes"], 3)
            timed[name]["recording_megabytes"] = round(recording_bytes(name, cache) / 1e6, 1)
            print(f"{name}: {timed[name]}", flush=True)
    result |= {"export_seconds": exports, "passes_seconds": timed, "canonical_counts": canonical}
    if {"llama-3.1-8b", "llama-3.1-405b"} <= timed.keys():
        result["depth_126_over_32"] = round(
            timed["llama-3.1-405b"]["wall"] / timed["llama-3.1-8b"]["wall"], 2
        )
    if not quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
