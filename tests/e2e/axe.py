"""What axe-core finds wrong with what is on the screen (https://github.com/dequelabs/axe-core)."""

from __future__ import annotations

from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "frontend/node_modules/axe-core/axe.min.js"


def violations(page, within: str) -> list[str]:
    """Every violation inside an element, a line each: rule, what is wrong, where."""
    if not SOURCE.exists():
        pytest.skip("needs axe-core: run `npm ci` in frontend/")
    if not page.evaluate("'axe' in window"):
        page.evaluate(SOURCE.read_text())
    found = page.evaluate("within => axe.run(within, {resultTypes: ['violations']})", within)["violations"]
    assert page.locator(within).count() > 0
    return [
        f"{v['id']} ({v['impact']}): {n['failureSummary']} {n['html'][:160]}"
        for v in found
        for n in v["nodes"]
    ]
