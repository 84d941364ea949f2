"""Rows of docs/sharding-types.md: what is cut of a tiny model, and whether two virtual ranks compute the same.

python scripts/sharding_types.py gpt2 falcon    # these rows anew, the others stay; no type: all that have a row
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "sharding-types.md"
#: Reasons that every model has: they are no news.
ROUTINE = ("router", "latent", "not a table", "one output")
_NO_REGION = "no linear before it whose cut it could read, and none after it in its region"
_SIZES = {"vocab_size": 144, "max_position_embeddings": 64}


def main() -> int:
    """Measure and write; the exit status is the number of types whose ranks do not compute the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types of transformers")
    options = parser.parse_args()
    text = PAGE.read_text()
    bad = 0
    for kind in options.types or re.findall(r"^\| (\S+) \|", text, re.M)[1:]:
        try:
            line, ok = row(kind)
        except Exception as error:  # one type that cannot be built must not hide the others
            line, ok = (
                f"| {kind} |  |  |  | {type(error).__name__}: {' '.join(str(error).split())[:150]} |",
                False,
            )
        print(line, flush=True)
        text = put(text, kind, line)
        bad += not ok
    PAGE.write_text(text)
    return bad


def row(kind: str) -> tuple[str, bool]:
    """A type's line, and whether its ranks compute what one does."""
    import adkit
    from tests.zoo import tiny_config

    warnings.simplefilter("ignore")
    default = tiny_config(kind).to_dict()
    config = tiny_config(kind, **{k: v for k, v in _SIZES.items() if k in default})
    wb = adkit.Workbench(config, device="cpu", progress=False, random_weights=True)
    v = wb.shard(2)
    found = v.check()
    return line_of(kind, list(v.plan), f"{found.rmse_ratio:.0e}"), bool(found.ok)


def line_of(kind: str, plan: list[Any], checked: str) -> str:
    """The decisions for layers (the vocabulary is always cut), sums, and what was in the way."""
    layers = [r for r in plan if r.decision not in ("follow", "vocab", "gather")]
    counts = Counter(r.decision for r in layers)
    decisions = ", ".join(f"{n} {what}" for what, n in counts.most_common())
    why = {
        re.sub(r"(_\d+)? is in the way", "", r.why).replace(_NO_REGION, "no region")
        for r in layers
        if r.decision == "whole" and not r.why.startswith(ROUTINE)
    }
    sums = sum(r.reduce for r in plan)
    return f"| {kind} | {decisions} | {sums} | {checked} | {'; '.join(sorted(why))[:150]} |"


def put(text: str, kind: str, line: str) -> str:
    """The page with a type's line replaced, or added in order."""
    lines = text.splitlines()
    first = next(i for i, at in enumerate(lines) if at.startswith("| ---")) + 1
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("| ")), len(lines))
    rows = {at.split("|")[1].strip(): at for at in lines[first:last]}
    rows[kind] = line
    return "\n".join([*lines[:first], *(rows[k] for k in sorted(rows)), *lines[last:]]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
