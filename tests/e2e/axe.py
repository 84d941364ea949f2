"""What axe-core finds wrong with what is on the screen (https://github.com/dequelabs/axe-core)."""

from __future__ import annotations

from importlib.resources import files

import pytest


def violations(page, within: str) -> list[str]:
    """Every violation inside an element, a line each: rule, what is wrong, where."""
    package = pytest.importorskip("axe_playwright_python")  # axe-core itself, as one file
    page.locator(within).first.wait_for()
    if not page.evaluate("'axe' in window"):
        page.evaluate((files(package) / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("within => axe.run(within, {resultTypes: ['violations']})", within)["violations"]
    return [
        f"{v['id']} ({v['impact']}): {n['failureSummary']} {n['html'][:160]}"
        for v in found
        for n in v["nodes"]
    ]
