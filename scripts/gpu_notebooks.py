"""Record the cells of the notebooks that need a GPU, on a machine that has one.

    python scripts/gpu_notebooks.py                        # every notebook with such cells, in place
    python scripts/gpu_notebooks.py NOTEBOOK... --out DIR  # these, recorded into a folder

A cell that needs a GPU has the tags `gpu` and `nbval-skip`: CI and `make notebooks` pass it over and leave its
recorded outputs alone. Here a notebook is executed whole, and the outputs of those cells are taken over; the
other cells run as well, but keep what a CPU recorded, which is what CI compares them with. Without a CUDA device, or
when a cell fails, nothing is written. Paths of this machine are cut from the outputs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
TAG = "gpu"
FOLDERS = ("notebooks", "cookbooks")
_WIDGET = "application/vnd.jupyter.widget-view+json"


def needs_gpu(cell: Any) -> bool:
    """Whether a cell is recorded here."""
    return cell.cell_type == "code" and TAG in cell.metadata.get("tags", [])


def notebooks(root: Path = ROOT) -> list[Path]:
    """The notebooks that have cells for a GPU."""
    found = [p for folder in FOLDERS for p in sorted((root / folder).glob("*.ipynb"))]
    return [p for p in found if any(map(needs_gpu, nbformat.read(p, as_version=4).cells))]


def record(path: Path, *, timeout: int, allow_errors: bool = False) -> Any:
    """The notebook with new outputs in its GPU cells. Raises CellExecutionError when a cell fails."""
    recorded = nbformat.read(path, as_version=4)
    ran = nbformat.read(path, as_version=4)
    began = time.perf_counter()

    def tell(cell: Any, cell_index: int, **_: Any) -> None:
        if needs_gpu(cell):
            seconds = time.perf_counter() - began
            print(f"{path.name}: cell {cell_index + 1} of {len(ran.cells)} after {seconds:.0f} s", flush=True)

    NotebookClient(
        ran,
        allow_errors=allow_errors,
        on_cell_executed=tell,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
    ).execute()
    for old, new in zip(recorded.cells, ran.cells, strict=True):
        if needs_gpu(old):
            old.outputs = [scrubbed(o) for o in new.outputs if shows(o)]
            old.execution_count = new.execution_count
    return recorded


def shows(output: Any) -> bool:
    """Whether a document can show an output: a widget alone is nothing once its kernel is gone."""
    data = output.get("data", {})
    return _WIDGET not in data or "text/html" in data


def scrubbed(value: Any) -> Any:
    """An output without this machine's paths."""
    if isinstance(value, str):
        for pattern, by in _PLACES:
            value = re.sub(pattern, by, value)
        return value
    if isinstance(value, list):
        return [scrubbed(v) for v in value]
    if isinstance(value, dict):
        kept = {k: v if k.startswith("image/png") else scrubbed(v) for k, v in value.items() if k != _WIDGET}
        return type(value)(kept)
    return value


_PLACES = [
    (re.escape(f"{ROOT}/"), ""),
    (r"(?<![\w.])/[\w./+-]*/(?:site|dist)-packages/", ""),
    (re.escape(str(Path.home())) + r"(?=/)", "~"),
    (re.escape(tempfile.gettempdir()) + r"/[\w./+-]*", "TEMP"),
]


def main() -> int:
    """Record; the exit status is the number of notebooks that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all that have cells for a GPU")
    parser.add_argument("--out", type=Path, help="folder to write to, instead of in place")
    parser.add_argument("--timeout", type=int, default=300, help="most seconds a cell")
    parser.add_argument(
        "--allow-errors", action="store_true", help="write although a cell failed, to see how"
    )
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("No CUDA device: nothing to record here. `make notebooks` records what a CPU can run.")
        return 1
    failures = 0
    for path in options.notebooks or notebooks():
        start = time.perf_counter()
        try:
            made = record(path, timeout=options.timeout, allow_errors=options.allow_errors)
        except CellExecutionError as error:
            failures += 1
            print(f"{path.name}: failed, left as it was\n{error}")
            continue
        target = path if options.out is None else options.out / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(made, target)
        print(f"{path.name}: recorded in {time.perf_counter() - start:.0f} s", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
