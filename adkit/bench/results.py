"""A benchmark's result: plain data with where, with what and how it was measured; a line a row; a file.

Every result has ``what``, ``command``, ``date``, ``machine``, ``versions``, ``model``, ``dtype``, ``settings`` (of
adkit's engine), ``ceilings`` (bytes/s, FLOP/s), ``workload`` and ``rows``. A row is one engine at one batch size or
workload; rates are tokens/s, delays seconds, shares of what the ceilings allow 0 to 1. No host names, no paths.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from adkit.bench import machine
from adkit.bench.subject import Subject
from adkit.saving import write_text

Result = dict[str, Any]
Row = dict[str, Any]


def result_of(subject: Subject, kind: str, what: str, workload: dict[str, Any], command: str) -> Result:
    """The head of a result, its rows still to come."""
    work = subject.work
    return {
        "what": what,
        "kind": kind,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(subject.device),
        "ranks": subject.ranks,
        "attention_dp": subject.attention_dp,
        "versions": machine.versions(),
        "model": subject.factory.name,
        "weights": subject.factory.weights,
        "dtype": str(subject.factory.dtype).removeprefix("torch."),
        "settings": subject.settings,
        "ceilings": {
            f"{subject.ceilings.access}_bytes_per_second": round(subject.ceilings.memory),
            "matmul_flops_per_second": round(subject.ceilings.matmul),
        },
        "work": {
            "weight_bytes_one_token": round(work.weight_bytes()),
            "cache_bytes_a_token": work.cache_token_bytes,
            "linear_flops_a_token": round(work.token_flops + work.row_flops),
        },
        "workload": workload,
        "rows": [],
    }


def heading(result: Result) -> str:
    """What its rows are figures of, for people."""
    rates = result["ceilings"]
    matmul = f"matmul {rates['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s"
    memory = next(
        f"{access} {rates[key] / 1e9:,.3g} GB/s"
        for access in ("copy", "read")
        if (key := f"{access}_bytes_per_second") in rates
    )
    ranks = f"{result['ranks']} x " if result["ranks"] > 1 else ""
    where = f"{result['dtype']} on {ranks}{result['machine']} ({memory}, {matmul})"
    return f"{result['what']}: {where}, weights: {result['weights']}"


def line(row: Row) -> str:
    """A row for people."""
    head = f"{row['engine']:<18} {row['requests']:>5} x"
    if "error" in row:
        return f"{head} failed: {row['error']}"
    parts = ["attention dp"] if row.get("attention_dp") else []
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:>10,.1f} tokens/s")
    if "output_tokens_per_second" in row:
        parts.append(f"{row['output_tokens_per_second']:>10,.1f} output tokens/s")
    if "flops_per_second" in row:
        parts.append(f"{row['flops_per_second'] / 1e12:>8,.4g} TFLOP/s in {row['seconds'] * 1e3:.1f} ms")
    for key, of in SHARES.items():
        if key in row:
            parts.append(f"{row[key]:.0%} of {of}")
    if "first_token_seconds" in row:
        parts.append(f"first token {row['first_token_seconds']['p50'] * 1e3:.1f} ms")
    if row.get("inter_token_seconds", {}).get("p50"):
        gaps = row["inter_token_seconds"]
        parts.append(f"then {gaps['p50'] * 1e3:.2f} ms (p99 {gaps['p99'] * 1e3:.2f})")
    if row.get("cut"):
        parts.append(f"stopped after {row['seconds']:.3g} s")
    if "note" in row:
        parts.append(row["note"])
    return f"{head} {', '.join(parts)}"


#: What a row's shares are shares of.
SHARES = {
    "copy_bandwidth_share": "copy bandwidth",
    "read_bandwidth_share": "read bandwidth",
    "matmul_share": "matmul rate",
    "limit_share": "the limit",
}


def write(result: Result, path: str | Path) -> Path:
    """Write a result as JSON, whole or not at all."""
    return write_text(path, json.dumps(result, indent=1) + "\n")
