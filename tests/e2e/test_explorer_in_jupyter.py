"""``wb.explore()`` as a person meets it: JupyterLab, a browser, the mouse and the keyboard, and Python reading back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SHOTS = os.environ.get("ADKIT_SCREENSHOTS")  # a folder to leave pictures in, for who wants to look
SETUP = """
import adkit
wb = adkit.Workbench("demo", device="cpu", progress=False).run()
explorer = wb.explore()
explorer
"""


def test_step_unfold_search_compare_and_read_back(jupyter_lab):
    lab = jupyter_lab
    cell = lab.run(SETUP)
    view = cell.locator(".adk")
    view.locator("[data-key='m:model.layers']").first.wait_for(timeout=30_000)

    # A step by its mark on the timeline; Python knows which.
    view.locator("[aria-label^='match_rmsnorm_pattern']").click()
    view.locator("h2", has_text="match_rmsnorm_pattern").wait_for()
    told = lab.run("wb.steps[explorer.step].name")
    told.locator(".jp-OutputArea-output", has_text="match_rmsnorm_pattern").wait_for(timeout=10_000)

    # Unfold a layer, find a node, choose it.
    layer = view.locator("[data-key^='m:model.layers.']").first
    layer.locator(".adk-fold").click()
    view.locator("[data-key$='.self_attn']").first.wait_for()
    view.get_by_label("Search nodes").fill("layers.0 rmsnorm q_norm")
    view.locator(".adk-found button").first.click()
    view.locator("[role=tab][aria-selected=true]", has_text="node").wait_for()
    lab.run("row = wb.steps['match_rmsnorm_pattern'].after.by_id[explorer.selection[0]]")
    told = lab.run("row.target_name, row.module_path")
    told.locator(".jp-OutputArea-output", has_text="q_norm").wait_for(timeout=10_000)

    # Two points side by side, then both programs.
    view.get_by_role("button", name="compare", exact=True).click()
    assert view.locator(".adk-pane").count() == 2
    if SHOTS:
        view.screenshot(path=Path(SHOTS) / "explorer.png")
    view.get_by_role("button", name="code", exact=True).click()
    assert view.locator(".adk-added").count() > 0

    # Python leads, the picture follows.
    lab.run("explorer.goto('fuse_rmsnorm')")
    view.locator("[aria-label^='fuse_rmsnorm'][aria-current=step]").wait_for(timeout=10_000)
