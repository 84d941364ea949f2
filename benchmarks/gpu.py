"""Every case of the GPU table with one command: each in a process of its own, a results file a case, one table.

    python benchmarks/gpu.py                      # all cases with their peers: about nine minutes on an H100
    python benchmarks/gpu.py --no-peers --only llama-3.2-1b,qwen3-0.6b
    python benchmarks/gpu.py --tiny --out FOLDER  # the same code on tiny models, on a CPU: does it run?

Files are ``<prefix>_<case>.json`` under ``benchmarks/results``, as ``adkit bench`` writes them, and
``<prefix>_figures.svg`` shows all that there are. A case that fails says so in the table and the others go on.
Extra settings after ``--`` go to every case: ``-- --set max_batch_size=256``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adkit.bench import picture
from adkit.bench.results import SHARES
from adkit.models.bundled import bundled_config

RESULTS = Path(__file__).parent / "results"
#: What a model's config shrinks to under --tiny, where it has the field.
TINY = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "moe_intermediate_size": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One command and its goals: (requests, key of the row, least value)."""

    name: str
    kind: str
    model: str
    arguments: tuple[str, ...]
    peers: str
    goals: tuple[tuple[int, str, float], ...]
    reported: str = ""
    tiny: tuple[str, ...] = field(default=())


CASES = (
    Case("llama-3.2-1b", "latency", "llama-3.2-1b", ("--batch", "1"), "hf-static-compile",
         ((1, "tokens_per_second", 920),), "HF compiled 275", ("--prompt", "16", "--new", "8")),
    Case("qwen3-0.6b", "latency", "qwen3-0.6b", ("--batch", "1", "--batch", "32"), "hf-static-compile",
         ((1, "tokens_per_second", 1000), (32, "tokens_per_second", 20000)), "HF compiled 346, 6,053",
         ("--prompt", "16", "--new", "8")),
    Case("llama-3.1-8b", "latency", "llama-3.1-8b", ("--batch", "1"), "hf-static-compile",
         ((1, "tokens_per_second", 182),), "gpt-fast 163, HF compiled 114", ("--prompt", "16", "--new", "8")),
    Case("prefill", "prefill", "llama-3.1-8b", ("--prompt", "8192"), "hf",
         ((1, "flops_per_second", 570e12),), "HF sdpa 486 TFLOP/s", ("--prompt", "128")),
    Case("throughput-qwen3-0.6b", "throughput", "qwen3-0.6b",
         ("--requests", "256", "--prompt", "100-1024", "--new", "100-1024", "--peer-seconds", "60"),
         "hf-continuous", ((256, "output_tokens_per_second", 17000),), "",
         ("--requests", "12", "--prompt", "10-40", "--new", "8-32")),
    Case("throughput-llama-3.1-8b", "throughput", "llama-3.1-8b",
         ("--requests", "2048", "--prompt", "128", "--new", "128"), "",
         ((2048, "output_tokens_per_second", 16000),), "AutoDeploy 12,628",
         ("--requests", "24", "--prompt", "16", "--new", "16")),
    Case("qwen3-30b-a3b", "latency", "qwen3-30b-a3b", ("--batch", "1"), "hf-static-compile",
         ((1, "tokens_per_second", 250),), "HF compiled 89", ("--prompt", "16", "--new", "8")),
)  # fmt: skip


def main() -> int:
    """Run the cases; the exit status is the number of those that failed."""
    names = [c.name for c in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", default="", help=f"cases, separated by commas: {', '.join(names)}")
    parser.add_argument("--no-peers", action="store_true", help="adkit alone")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short requests")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results files")
    parser.add_argument("--prefix", default="h100", help="what the files' names begin with")
    parser.add_argument("--limit", type=float, default=240, help="most seconds a case")
    argv, extra = sys.argv[1:], []
    if "--" in argv:
        argv, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = parser.parse_args(argv)
    only = [n for n in options.only.split(",") if n] or names
    unknown = [n for n in only if n not in names]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; known: {', '.join(names)}")
    options.out.mkdir(parents=True, exist_ok=True)

    rows, failures = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for case in (c for c in CASES if c.name in only):
            print(f"\n== {case.name}", flush=True)
            out = options.out / f"{options.prefix}_{case.name}.json"
            start = time.perf_counter()
            error = run(case, out, options, extra, Path(scratch))
            seconds = time.perf_counter() - start
            failures += bool(error)
            if error:
                print(f"{case.name}: {error}", flush=True)
            # A case that was stopped has written the rows that it had.
            rows += summary(case, out, seconds) if out.exists() else failed(case, error, seconds)
    draw(options.out, options.prefix)
    print()
    show(rows)
    return failures


def draw(folder: Path, prefix: str) -> None:
    """One picture of every case that has a results file, those of earlier runs included."""
    files = [folder / f"{prefix}_{c.name}.json" for c in CASES]
    results = [json.loads(f.read_text()) for f in files if f.exists()]
    if results:
        picture.save(results, folder / f"{prefix}_figures.svg")


def run(case: Case, out: Path, options: argparse.Namespace, extra: list[str], scratch: Path) -> str:
    """Run one case, its output passed on; why it failed, or nothing."""
    model = str(shrunk(case.model, scratch)) if options.tiny else case.model
    arguments = (*case.tiny, "--random-weights") if options.tiny else ()
    peers = () if options.no_peers or not case.peers else ("--vs", case.peers)
    command = [sys.executable, "-m", "adkit", "bench", case.kind, model, *case.arguments, *arguments,
               *peers, *extra, "--out", str(out)]  # fmt: skip
    out.unlink(missing_ok=True)
    try:
        code = subprocess.run(command, timeout=options.limit).returncode
    except subprocess.TimeoutExpired:
        return f"took more than {options.limit:.0f} s"
    return "" if code == 0 and out.exists() else f"ended with status {code}"


def shrunk(name: str, folder: Path) -> Path:
    """A folder with the config of a bundled model made tiny."""
    config = bundled_config(name)
    config |= {key: value for key, value in TINY.items() if key in config}
    config.setdefault("head_dim", TINY["head_dim"])
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    target = folder / name
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    return target


def failed(case: Case, error: str, seconds: float) -> list[dict[str, Any]]:
    """Table rows of a case without a result."""
    return [
        {"case": case.name, "requests": n, "target": goal, "key": key, "error": error, "seconds": seconds}
        for n, key, goal in case.goals
    ]


def summary(case: Case, out: Path, seconds: float) -> list[dict[str, Any]]:
    """Table rows of a results file: for each goal what was reached and what the peers reached."""
    result = json.loads(out.read_text())
    rows = []
    for n, key, goal in case.goals:
        # A tiny case has other numbers of requests: rows then stand in the goals' order.
        sizes = list(dict.fromkeys(r["requests"] for r in result["rows"]))
        size = n if n in sizes else sizes[0]
        found = {r["engine"]: r for r in result["rows"] if r["requests"] == size}
        if "adkit" not in found:
            rows += failed(case, "no figures of adkit", seconds)[:1]
            continue
        own = found.pop("adkit")
        share = next((own[s] for s in SHARES if s in own), 0)
        rows.append(
            {
                "case": case.name, "requests": size, "target": goal, "key": key, "reached": own[key],
                "share": share, "seconds": seconds, "reported": case.reported,
                "peers": {name: r.get(key, r.get("error", "?")) for name, r in found.items()},
            }
        )  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    heads = f"{'case':<26}{'requests':>9}{'target':>10}{'reached':>10}{'':<8}{'of it':>7}{'share':>7}{'s':>6}"
    print(f"{heads}  peers")
    for r in rows:
        scale, unit = (1e12, "TFLOP/s") if r["key"] == "flops_per_second" else (1, "tok/s")
        head = f"{r['case']:<26}{r['requests']:>9}{r['target'] / scale:>10,.0f}"
        if "error" in r:
            print(f"{head}  FAILED: {r['error']} ({r['seconds']:.0f} s)")
            continue
        peers = [
            f"{name} {value / scale:,.0f} ({r['reached'] / value:.2f}x)" if isinstance(value, (int, float)) and value
            else f"{name} failed: {str(value)[:60]}"
            for name, value in r["peers"].items()
        ]  # fmt: skip
        peers += [f"[earlier: {r['reported']}]"] if r["reported"] else []
        print(
            f"{head}{r['reached'] / scale:>10,.1f} {unit:<7}{r['reached'] / r['target']:>7.0%}{r['share']:>7.0%}"
            f"{r['seconds']:>6.0f}  {', '.join(peers)}"
        )


if __name__ == "__main__":
    sys.exit(main())
