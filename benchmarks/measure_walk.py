"""Measure the walk: time of the passes, cost of recording, canonical counts of every bundled config, and what
looking costs: records written, any two points compared.

    python benchmarks/measure_walk.py [--quick | --seeing]

Writes ``benchmarks/results/walk.json`` (``--seeing``: that part of it alone). Everything runs on shapes alone, on
CPU; nothing is downloaded. Let the machine be otherwise idle: times are medians of three runs of the passes over
one export.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import itertools
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
from adkit.viz import load_record

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
    wb.growing.keep([])
    gc.collect()
    full = tracemalloc.get_traced_memory()[0]
    wb._steps, wb._history = [], []
    wb._state.snapshot = adkit.graph.snapshot.Snapshot()
    gc.collect()
    rest = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return full - rest


def telling(name: str, cache: str) -> dict[str, float]:
    """Seconds and bytes of telling a walk for the explorer, which a Workbench does while it runs if it exports."""
    wb = bench(name, cache).run()
    for traced in (False, True):
        wb.growing.keep([])
        for s in wb.steps:
            s._diff = None
        gc.collect()
        if traced:
            tracemalloc.start()
        start = time.perf_counter()
        wb.growing.walked.follow(wb.steps)
        _ = repr(wb.steps)
        if not traced:
            seconds = time.perf_counter() - start
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {"telling": round(seconds, 3), "telling_megabytes": round(held / 1e6, 1)}


def seeing(name: str, cache: str) -> dict[str, object]:
    """The record's size and seconds; milliseconds of ``wb.steps.diff`` between all pairs of steps, with its rewrites.

    ``first`` is the longest diff, the steps' own differences not yet known; collections of garbage (one of
    the whole heap takes ``garbage_ms``) are kept out of all but ``worst_with_garbage``.
    """
    wb = bench(name, cache).run()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = wb.record(Path(folder) / "walk.json.gz")
        wrote = time.perf_counter() - start
        size, plain = path.stat().st_size, len(gzip.decompress(path.read_bytes()))
        start = time.perf_counter()
        load_record(path)
        read = time.perf_counter() - start
    points = [s.name for s in wb.steps if len(s.after) and s.changed]
    pairs = list(itertools.permutations(points, 2))

    def took(a: str, b: str) -> float:
        start = time.perf_counter()
        _ = wb.steps.diff(a, b).rewrites
        return (time.perf_counter() - start) * 1e3

    with_garbage = [took(*p) for p in pairs]
    for s in wb.steps:
        s._diff = None
    start = time.perf_counter()
    gc.collect()
    garbage = (time.perf_counter() - start) * 1e3
    gc.disable()
    first = took(points[0], points[-1])
    without = [took(*p) for p in pairs]
    gc.enable()
    return {
        "nodes_at_export": len(wb.steps["export_to_gm"].after),
        "record_seconds": round(wrote, 2),
        "record_read_seconds": round(read, 2),
        "record_megabytes": round(plain / 1e6, 2),
        "record_gzipped_megabytes": round(size / 1e6, 2),
        "pairs_of_steps": len(pairs),
        "diff_ms": {
            "first": round(first, 1),
            "median": round(statistics.median(without), 1),
            "worst": round(max(without), 1),
            "worst_with_garbage": round(max(with_garbage), 1),
            "garbage_ms": round(garbage, 1),
        },
    }


def counts(name: str, cache: str) -> dict[str, int]:
    """Canonical ops after pattern matching."""
    found = bench(name, cache).run("pattern_matcher").graph.counts()
    return {op: found[f"adkit.{op}"] for op in OPS if f"adkit.{op}" in found}


def seen(names: list[str], cache: str) -> dict[str, object]:
    """:func:`seeing` of the models that its figures are asked for."""
    found: dict[str, object] = {}
    for name in [n for n in ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-405b", "deepseek-v3") if n in names]:
        bench(name, cache).run("export")
        found[name] = seeing(name, cache)
        print(f"{name}: {found[name]}", flush=True)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="llama-3.2-1b alone, nothing written")
    parser.add_argument(
        "--seeing", action="store_true", help="only records and diffs, into the file there is"
    )
    args = parser.parse_args()
    quick = args.quick
    names = ["llama-3.2-1b"] if quick else list(bundled_names())
    if args.seeing:
        with tempfile.TemporaryDirectory() as cache:
            known = json.loads(RESULTS.read_text(encoding="utf-8")) | {"seeing": seen(names, cache)}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        return
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
            timed[name] |= telling(name, cache)
            print(f"{name}: {timed[name]}", flush=True)
        looked = seen(names, cache)
    result |= {
        "seeing": looked,
        "export_seconds": exports,
        "passes_seconds": timed,
        "canonical_counts": canonical,
    }
    if {"llama-3.1-8b", "llama-3.1-405b"} <= timed.keys():
        result["depth_126_over_32"] = round(
            timed["llama-3.1-405b"]["wall"] / timed["llama-3.1-8b"]["wall"], 2
        )
    if not quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
