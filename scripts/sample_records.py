"""Write sample records to look at: ``python scripts/sample_records.py OUT [model ...]``.

Without models: demo, llama-3.1-8b, llama-3.1-405b and deepseek-v3. Shapes alone (the demo model has its
weights), nothing is downloaded.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import adkit

MODELS = ("demo", "llama-3.1-8b", "llama-3.1-405b", "deepseek-v3")


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("records")
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or MODELS:
        wb = adkit.Workbench(name, device="cpu", progress=False).run()
        start = time.perf_counter()
        path = wb.record(out / f"{name}.json.gz")
        seconds = time.perf_counter() - start
        print(
            f"{path.name}: {len(wb.graph):,} nodes at the end, {path.stat().st_size:,} bytes, {seconds:.2f} s"
        )


if __name__ == "__main__":
    main()
