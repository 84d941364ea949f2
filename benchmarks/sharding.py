"""Measure sharding on virtual ranks: do they compute what the uncut model computes, what does each hold, how long do
plans take.

    python benchmarks/sharding.py [--quick | --plans | --accuracy]

Writes ``benchmarks/results/sharding.json`` (with an option: that part of it alone; ``--quick`` prints a few cases and
writes nothing). CPU alone; nothing is downloaded. Accuracy is of float32 models made sensitive (tests/zoo.py): logits
of a batch of two prompts of 23 tokens, and 32 greedy tokens through a paged cache on every rank against the uncut
engine's.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

import adkit  # noqa: E402
from tests.sharding.models import MOE_TYPES, TYPES, bench, saved  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "sharding.json"
PROMPTS = [[5, 9, 33, 2, 71, 8, 100, 31, 4], [17, 3, 3]]


def accuracy(kinds: tuple[str, ...], tps: tuple[int, ...]) -> dict[str, Any]:
    """Each model over each world: rmse ratio and largest difference of logits, whether greedy tokens are the same."""
    rows: dict[str, Any] = {}
    params = adkit.SamplingParams(max_tokens=32, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            wb = bench(saved(Path(folder), kind))
            whole = bench(saved(Path(folder), kind)).llm().generate(PROMPTS, params, progress=False)
            worlds: list[tuple[int, int | None]] = [(tp, None) for tp in tps]
            if kind in MOE_TYPES:
                worlds += [(4, 2), (4, 4), (2, 2), (4, 1)]
            for tp, ep in worlds:
                v = wb.shard(tp, moe_ep=ep)
                check = v.check()
                got = v.generate(PROMPTS, params, progress=False)
                same = all(a.token_ids == b.token_ids for a, b in zip(got, whole, strict=True))
                name = f"{kind} tp {tp}" + (f" moe {v.dist.moe_ep_size}x{v.dist.moe_tp_size}" if ep else "")
                rows[name] = {
                    "ok": check.ok,
                    "rmse_ratio": float(f"{check.rmse_ratio:.2e}"),
                    "max_abs": float(f"{check.max_abs:.2e}"),
                    "compared": check.compared,
                    "nodes": check.nodes,
                    "greedy_32_identical": same,
                    "share": round(max(r.memory.share for r in v.ranks), 3),
                    "sent_bytes_a_decode_step": v.comm.sent(1),
                }
                print(name, rows[name], flush=True)
                if check.first_divergence is not None:
                    print(check.first_divergence, flush=True)
    return rows


def plan(name: str, tp: int, **options: Any) -> dict[str, Any]:
    """A bundled model on shapes: seconds of export, of the plan, of cutting all ranks; memory against a fair share.

    ``cpu`` seconds are the process's own, for a machine that is shared.
    """
    start = time.perf_counter()
    wb = adkit.Workbench(name, device="cpu", dtype="bfloat16", progress=False).run(until="pattern_matcher")
    exported, exported_cpu = time.perf_counter(), time.process_time()
    v = wb.shard(tp, **options)
    first, first_cpu = time.perf_counter(), time.process_time()
    v.ranks[:]
    done, done_cpu = time.perf_counter(), time.process_time()
    decided = sum(v.steps[k].seconds + v.steps[k].record_seconds for k in
                  ("detect_sharding", "sharding_transform_executor"))  # fmt: skip
    memories = [r.memory for r in v.ranks]
    comm = v.comm.total()
    found = {
        "tp": tp,
        "moe_ep": v.dist.moe_ep_size,
        "export_and_match_seconds": round(exported - start, 2),
        "plan_seconds": round(decided, 2),
        "plan_and_first_rank_seconds": round(first - exported, 2),
        "plan_and_first_rank_cpu_seconds": round(first_cpu - exported_cpu, 2),
        "other_ranks_seconds": round(done - first, 2),
        "other_ranks_cpu_seconds": round(done_cpu - first_cpu, 2),
        "plan_rows": len(v.plan),
        "total_gigabytes": round(memories[0].total / 1e9, 3),
        "rank_gigabytes": [round(m.weights / 1e9, 3) for m in memories],
        "worst_share": round(max(m.share for m in memories), 5),
        "experts_fractions": sorted({m.fraction("experts") for m in memories}),
        "cache_bytes_a_token_a_rank": memories[0].cache_per_token,
        "collectives": len(v.comm),
        "sent_bytes_a_decode_step": comm["decode bytes"],
        "decode_comm_microseconds_estimated": round(1e6 * comm["decode seconds"], 1),
    }
    print(name, found, flush=True)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two models, nothing written")
    parser.add_argument("--plans", action="store_true", help="only the plans of large models")
    parser.add_argument("--accuracy", action="store_true", help="only the accuracy of tiny ones")
    args = parser.parse_args()
    if args.quick:
        accuracy(("llama", "mixtral"), (2,))
        plan("llama-3.2-1b", 8)
        return
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known |= {
        "what": "virtual ranks against the uncut model; plans of large models on shapes",
        "command": "python benchmarks/sharding.py",
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()} CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    if not args.accuracy:
        known["plans"] = {
            "llama-3.1-405b": plan("llama-3.1-405b", 8),
            "deepseek-v3": plan("deepseek-v3", 8, moe_ep=8),
        }
    if not args.plans:
        known["accuracy"] = accuracy(TYPES, (2, 4, 8))
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
