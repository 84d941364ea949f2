"""Everything that needs a GPU, in one go: its tests, the kernel suites, correctness figures, speed figures.

    python scripts/gpu_check.py                    # make gpu-check; what ran and passed is not run again
    python scripts/gpu_check.py --minutes 10       # as much as fits; the next call goes on from there
    python scripts/gpu_check.py --only kernels,accuracy --fresh
    python scripts/gpu_check.py --tiny --out DIR   # the same code on a CPU with tiny models: does it run?

Pieces run one after another, each a process with a limit of its own. After each, `<prefix>_check.json` in the results
folder says how it ended and for which code, so that a call that was cut off costs one piece. A piece that has passed is
skipped while the code is the same; one that failed is run again. Figures stand where benchmarks/accuracy.py and
benchmarks/gpu.py put them, what pieces printed in `<prefix>_check.log`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from adkit.saving import write_text  # noqa: E402
from benchmarks import accuracy, gpu  # noqa: E402

GROUPS = ("tests", "kernels", "accuracy", "speed")
#: Kernels against their references -> the test that runs the file where it is not run by itself.
SUITES = {
    "sampling_against_reference": "test_sampling.py::test_on_a_gpu",
    "rope_cache_against_reference": "test_rope_cache.py::test_the_kernel_equals_its_reference_on_a_gpu",
    "triton_moe": "test_moe.py::test_kernels_equal_float64_on_a_gpu",
    "triton_against_reference": "test_triton.py::test_kernels_equal_their_references_on_a_gpu",
}
#: One quick test of each suite for --tiny, where triton's interpreter runs it.
QUICK = {
    "triton_against_reference": "test_a_layer_of_one_output", "triton_moe": "test_tokens_without_experts",
    "sampling_against_reference": "test_rows_that_are_not_finite",
    "rope_cache_against_reference": "test_angles_and_caches",
}  # fmt: skip
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """One command of a group, with the most seconds it may take.

    ``counts``: it is pytest, which says what passed; at least one test must, unless ``may_skip``.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    counts: bool = False
    may_skip: bool = False
    env: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The group that it belongs to."""
        return self.name.split(":")[0]


def pieces(options: argparse.Namespace) -> list[Piece]:
    """All pieces in order; the quick ones that tell most come first."""
    tiny, out, prefix = options.tiny, options.out, options.prefix
    pytest = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        *workers(tiny),
    )
    found = []
    for suite in SUITES:
        picked = ("-k", QUICK[suite]) if tiny else ()
        found.append(
            Piece(f"kernels:{suite}", (*pytest, f"tests/ops/{suite}.py", *picked), 300, counts=True,
                  env={"TRITON_INTERPRET": "1" if tiny else "0"})
        )  # fmt: skip
    apart = [f"--deselect=tests/ops/{test}" for test in SUITES.values()]
    where = ("tests/test_gpu.py", "tests/ops/test_triton.py") if tiny else ("tests",)
    found.append(Piece("tests", (*pytest, "-m", "gpu", *apart, *where), 420, counts=True, may_skip=tiny))
    for model in accuracy.TINY if tiny else accuracy.MODELS:
        command = [sys.executable, "benchmarks/accuracy.py", "--only", model]
        command += ["--out", str(out / f"{prefix}_accuracy.json"), *(["--tiny"] if tiny else [])]
        found.append(Piece(f"accuracy:{model}", tuple(command), 180))
    for case in gpu.CASES[:2] if tiny else gpu.CASES:
        command = [
            sys.executable,
            "benchmarks/gpu.py",
            "--only",
            case.name,
            "--out",
            str(out),
            "--prefix",
            prefix,
        ]
        command += ["--tiny", "--no-peers"] if tiny else []
        found.append(Piece(f"speed:{case.name}", tuple(command), 260))
    return [p for p in found if any(p.group == o or p.name == o for o in options.only)]


def workers(tiny: bool) -> tuple[str, ...]:
    """Options that spread tests over processes, where pytest-xdist is there: their time is compiling kernels."""
    many = min(6, (os.cpu_count() or 1) // 2)
    return ("-n", str(many)) if many > 1 and not tiny and importlib.util.find_spec("xdist") else ()


def main() -> int:
    """Run what is left; the exit status is the number of pieces that did not pass."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", default=",".join(GROUPS), help="groups or pieces, separated by commas")
    parser.add_argument(
        "--minutes", type=float, default=60, help="start nothing, and let nothing run, after these"
    )
    parser.add_argument("--fresh", action="store_true", help="run again what has passed")
    parser.add_argument("--list", action="store_true", help="say what there is and how it ended last")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models, a few tests in triton's interpreter"
    )
    parser.add_argument("--out", type=Path, default=gpu.RESULTS, help="folder of the results files")
    parser.add_argument("--prefix", default="h100", help="what the files' names begin with")
    options = parser.parse_args()
    given = options.only
    options.only = [o for o in given.split(",") if o]
    todo = pieces(options)
    if missing := [o for o in options.only if not any(o in (p.group, p.name) for p in todo)]:
        options.only = list(GROUPS)
        known = [*GROUPS, *(p.name for p in pieces(options))]
        parser.error(f"nothing is called {', '.join(missing)}; known: {', '.join(dict.fromkeys(known))}")
    if not options.tiny and not options.list and not has_gpu():
        print("No CUDA device: nothing to check here. --tiny runs the same code on a CPU.")
        return len(todo)
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out / f"{options.prefix}_check.json", code())
    began = time.monotonic()
    for piece in todo:
        if options.list or (record.passed(piece) and not options.fresh):
            continue
        left = 60 * options.minutes - (time.monotonic() - began)
        if left < min(30, piece.limit):  # less than starting up takes
            print(f"{piece.name}: no time left", flush=True)
            continue
        print(f"{piece.name}: at most {min(left, piece.limit):.0f} s", flush=True)
        outcome = run(piece, min(left, piece.limit), options.out / f"{options.prefix}_check.log")
        record.put(piece, outcome)
        print(f"  {told(outcome)}", flush=True)
    return summary(todo, record)


def run(piece: Piece, limit: float, log: Path) -> Outcome:
    """Run one piece, what it prints going to ``log``; how it ended."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, log.open("a", encoding="utf-8") as printed:
        report = Path(scratch) / "report.xml"
        command = [*piece.command, *([f"--junitxml={report}"] if piece.counts else [])]
        printed.write(f"\n== {piece.name}: {' '.join(command[1:])}\n")
        printed.flush()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, **piece.env}
        # A group of its own, so that a piece that is stopped takes its workers along.
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"took more than {limit:.0f} s"
        finally:
            end(process)
        outcome: Outcome = {
            "passed": status == 0,
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
        }
        if piece.counts and report.exists():
            outcome |= counted(report)
            outcome["passed"] &= piece.may_skip or outcome["tests_passed"] > 0
    return outcome


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a piece and what it started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def counted(report: Path) -> Outcome:
    """How many tests passed, failed and were skipped, and the names of those that failed."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    return {
        "tests_passed": len(cases) - len(bad) - len(skipped),
        "tests_failed": len(bad),
        "tests_skipped": len(skipped),
        "failed": [f"{c.get('classname', '')}::{c.get('name', '')}" for c in bad][:40],
    }


class Record:
    """How each piece ended last, on disk after every one."""

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.code = path, code
        self.rows: dict[str, Outcome] = json.loads(path.read_text())["pieces"] if path.exists() else {}

    def passed(self, piece: Piece) -> bool:
        """True when the piece passed with this code and this command."""
        row = self.rows.get(piece.name, {})
        return bool(row.get("passed")) and row["code"] == self.code and row["command"] == said(piece)

    def put(self, piece: Piece, outcome: Outcome) -> None:
        """Note how a piece ended."""
        self.rows[piece.name] = {"code": self.code, "command": said(piece), **outcome}
        result = {"what": "checks on a GPU", "command": "python scripts/gpu_check.py", "pieces": self.rows}
        write_text(self.path, json.dumps(result, indent=1) + "\n")


def said(piece: Piece) -> str:
    """A piece's command as it reads on any machine."""
    words = ["python", *(Path(w).name if Path(w).is_absolute() else w for w in piece.command[1:])]
    return " ".join([*(f"{k}={v}" for k, v in piece.env.items()), *words])


def code() -> str:
    """A short hash of everything that a piece's outcome depends on."""
    found = hashlib.sha256()
    for folder in ("adkit", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml") or path.parent.name == "configs":
                found.update(
                    str(path.relative_to(ROOT)).encode() + path.read_bytes() if path.is_file() else b""
                )
    return found.hexdigest()[:12]


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def told(outcome: Outcome) -> str:
    """How a piece ended, in a few words."""
    words = "passed" if outcome["passed"] else "FAILED"
    if isinstance(outcome["status"], str):
        words = f"FAILED: {outcome['status']}"
    if "tests_passed" in outcome:
        counts = [f"{outcome[f'tests_{how}']} {how}" for how in ("passed", "failed", "skipped")]
        words += f" ({', '.join(counts)})"
    return f"{words} in {outcome['seconds']:.0f} s"


def summary(todo: list[Piece], record: Record) -> int:
    """One line a piece; how many did not pass."""
    print(f"\n{'piece':<42}outcome")
    bad = 0
    for piece in todo:
        row = record.rows.get(piece.name)
        bad += not record.passed(piece)
        old = "" if row is None or row["code"] == record.code else "; with other code"
        print(f"{piece.name:<42}{'not run' if row is None else told(row) + old}")
        for name in (row or {}).get("failed", [])[:10]:
            print(f"    {re.sub(r'^tests[.]', '', name)}")
    print(f"{len(todo) - bad} of {len(todo)} passed; figures beside {record.path.name}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
