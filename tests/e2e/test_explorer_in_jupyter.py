"""``wb.explore()`` as a person meets it: JupyterLab, a browser, the mouse and the keyboard, and Python reading back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.axe import violations

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
    view.get_by_role("button", name="Compare", exact=True).click()
    assert view.locator(".adk-pane").count() == 2
    if SHOTS:
        view.screenshot(path=Path(SHOTS) / "explorer.png")
    view.get_by_role("button", name="Code", exact=True).click()
    assert view.locator(".adk-added").count() > 0

    # Python leads, the picture follows.
    lab.run("explorer.goto('fuse_rmsnorm')")
    view.locator("[aria-label^='fuse_rmsnorm'][aria-current=step]").wait_for(timeout=10_000)


def test_panes_folding_and_parts_between_python_and_the_browser(jupyter_lab):
    lab = jupyter_lab
    cell = lab.run(SETUP)
    view = cell.locator(".adk")
    view.locator("[data-key='m:model.layers']").first.wait_for(timeout=30_000)

    # The record came in its light form; what is not looked at arrives by itself.
    told = lab.run("explorer.parts, sum(g.view is None for g in explorer.data.graphs) > 0")
    told.locator(".jp-OutputArea-output", has_text="(True, True)").wait_for(timeout=10_000)
    view.locator(".adk-overlay option", has_text="FLOPs").first.wait_for(state="attached", timeout=30_000)

    # Three panes from Python; the browser closes one and opens a layer; Python knows.
    lab.run("explorer.panes = ['export_to_gm', 'match_rmsnorm_pattern', 'fuse_rmsnorm']")
    view.locator(".adk-pane").nth(2).wait_for(timeout=10_000)
    assert [p.get_attribute("aria-label") for p in view.locator(".adk-pane").all()] == [
        "after export_to_gm", "after match_rmsnorm_pattern", "after fuse_rmsnorm",
    ]  # fmt: skip
    view.locator(".adk-pane").nth(1).locator("[data-key^='m:model.layers.'] .adk-fold").first.click()
    view.locator(".adk-pane").first.locator("[data-key$='.self_attn']").first.wait_for(timeout=10_000)
    view.get_by_role("button", name="Close after match_rmsnorm_pattern").click()
    told = lab.run("[wb.steps[k].name for k in explorer.panes], 'model.layers.0' in explorer.unfolded")
    told.locator(".jp-OutputArea-output", has_text="['export_to_gm', 'fuse_rmsnorm'], True").wait_for(
        timeout=10_000
    )

    # Folding and searching from Python.
    lab.run("explorer.unfolded = ['model']; explorer.search = 'attention'")
    view.locator(".adk-found button").first.wait_for(timeout=10_000)
    assert view.locator("[data-key$='.self_attn']").count() == 0
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        lab.theme(theme)
        if SHOTS:
            view.screenshot(path=Path(SHOTS) / f"panes {theme}.png")
        assert violations(lab.page, ".adk") == []


LIVE = """
import time, adkit
from adkit.passes import Pass, PassInfo, Stage
class Slow(Pass):
    key, stage = "slow", Stage.POST_EXPORT
    def apply(self, gm, ctx):
        for k in range(30):
            ctx.progress(k, 30, "waiting")
            time.sleep(0.1)
        ctx.report("waited long enough")
        return PassInfo()
class Broken(Pass):
    key, stage = "broken", Stage.CACHE_INIT
    def apply(self, gm, ctx):
        raise ValueError("no good")
wb = adkit.Workbench("demo", device="cpu", progress=False)
wb.insert(Slow, after="cleanup_noop_slice").insert(Broken, before="insert_cached_attention")
explorer = wb.explore()
explorer
"""


def test_a_running_pipeline_is_seen_while_it_runs(jupyter_lab):
    lab = jupyter_lab
    cell = lab.run(LIVE)
    view = cell.locator(".adk")
    view.locator(".adk-nothing", has_text="has not run yet").wait_for(timeout=30_000)
    frame = view.bounding_box()

    run = lab.run("wb.run()", wait=False)
    now = view.locator(".adk-now")
    now.locator("b", has_text="slow").wait_for(timeout=60_000)
    now.get_by_text("of 30").wait_for(timeout=10_000)
    assert "done" in view.locator("[aria-label^='export_to_gm']").get_attribute("aria-label")
    assert "pending" in view.locator("[aria-label^='match_rmsnorm_pattern']").get_attribute("aria-label")
    assert view.bounding_box() == frame
    if SHOTS:
        view.screenshot(path=Path(SHOTS) / "running.png")

    # It fails: which transform and why, and everything up to there is drawn.
    view.locator(".adk-failure", has_text="broken failed").wait_for(timeout=60_000)
    run.locator(".jp-OutputArea-output").first.wait_for(timeout=10_000)
    view.locator(".adk-failure").click()
    view.locator(".adk-failure-text", has_text="ValueError: no good").wait_for(timeout=10_000)
    view.locator(".adk-pane[aria-label='before broken'] [data-key='m:model.layers']").wait_for(timeout=30_000)
    view.locator("[aria-label^='slow']").click()
    view.locator(".adk-log", has_text="waited long enough").wait_for(timeout=10_000)
    if SHOTS:
        view.screenshot(path=Path(SHOTS) / "failed.png")

    # Mended, it goes on to the end in the same widget.
    lab.run("wb.disable('broken').run()")
    view.locator("[aria-label^='compile_model: done']").wait_for(timeout=60_000)
    view.locator(".adk-pane[aria-label='after slow']").wait_for(timeout=20_000)
    assert view.locator(".adk-failure").count() == 0
