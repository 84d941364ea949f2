"""The correctness figures with one command: each model's logits against float32, the demo model's answers.

    python benchmarks/accuracy.py            # under two minutes on an H100
    python benchmarks/accuracy.py --tiny --out FILE

A model that fails is told and the others go on; the exit status counts those that failed or are out of bounds. Rows of
models that are not measured this time stay in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from adkit.bench import accuracy
from adkit.saving import write_text

RESULTS = Path(__file__).parent / "results" / "h100_accuracy.json"
#: Model -> layers kept, where a float32 copy of the whole would not fit beside anything else.
MODELS: dict[str, int | None] = {
    "demo": None,
    "llama-3.2-1b": None,
    "qwen3-0.6b": None,
    "qwen3-30b-a3b": 4,
    "llama-3.1-8b": None,
}
TINY = {
    "demo": {"tasks": 10, "sequences": 8},
    "qwen3-0.6b": {"layers": 1, "sequences": 1, "prompt": 8, "new": 2},
}


def main() -> int:
    """Measure, print a line a model, write after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"models, separated by commas: {', '.join(MODELS)}")
    parser.add_argument("--tiny", action="store_true", help="two small models, few tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    names = [n for n in options.only.split(",") if n] or list(TINY if options.tiny else MODELS)
    unknown = [n for n in names if n not in MODELS]
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; known: {', '.join(MODELS)}")
    rows: dict[str, dict[str, Any]] = {}
    if options.out.exists():
        rows = {r["model"]: r for r in json.loads(options.out.read_text())["rows"]}
    failures = 0
    for name in names:
        sizes: dict[str, Any] = {"layers": MODELS[name]}
        sizes |= {"sequences": 40, "new": 128} if name == "demo" else {}
        sizes |= TINY.get(name, {}) if options.tiny else {}
        start = time.perf_counter()
        try:
            row = accuracy.measure(name, **sizes, progress=False)
            failures += not row["ok"]
        except Exception as error:  # the other models' figures are wanted all the same
            row = {"model": name, "error": f"{type(error).__name__}: {str(error).strip()[:500]}"}
            print(f"{name}: FAILED: {row['error']}", flush=True)
            failures += 1
        rows[name] = row | {"model": name, "seconds": round(time.perf_counter() - start, 1)}
        result = {
            "what": "correctness of bf16 runs",
            "command": "python benchmarks/accuracy.py",
            "rows": [rows[n] for n in sorted(rows, key=[*MODELS, *rows].index)],
        }
        write_text(options.out, json.dumps(result, indent=1) + "\n")
    return failures


if __name__ == "__main__":
    sys.exit(main())
