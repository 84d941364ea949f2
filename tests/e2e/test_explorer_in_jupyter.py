"""``wb.explore()`` as a person meets it: JupyterLab, a browser, the mouse and the keyboard, and Python reading back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.axe import violations
from tests.e2e.lab import at_rest

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]

SHOTS = os.environ.get("ADKIT_SCREENSHOTS")  # a folder to leave pictures in, for who wants to look
SETUP = """
import adkit
wb = adkit.Workbench("demo", device="cpu", progress=False).run()
explorer = wb.explore()
explorer
"""


def picture(element, name: str) -> None:
    if SHOTS:
        element.screenshot(path=Path(SHOTS) / f"{name}.png")


def test_step_unfold_search_compare_and_read_back(jupyter_lab):
    lab = jupyter_lab
    cell = lab.run(SETUP)
    view = cell.locator(".adk")
    expect(view.locator("[data-key='m:model.layers']").first).to_be_visible()

    # A step by its mark on the timeline; Python knows which.
    view.locator("[aria-label^='match_rmsnorm_pattern']").click()
    expect(view.locator("h2", has_text="match_rmsnorm_pattern")).to_be_visible()
    lab.expect("wb.steps[explorer.step].name", "match_rmsnorm_pattern")

    # Unfold a layer, find a node, choose it.
    layer = view.locator("[data-key^='m:model.layers.']").first
    layer.locator(".adk-fold").click()
    expect(view.locator("[data-key$='.self_attn']").first).to_be_visible()
    view.get_by_label("Search nodes").fill("layers.0 rmsnorm q_norm")
    view.locator(".adk-found button").first.click()
    expect(view.locator("[role=tab][aria-selected=true]", has_text="node")).to_be_visible()
    lab.run("rows = wb.steps['match_rmsnorm_pattern'].after.by_id")
    lab.expect("[(rows[i].target_name, rows[i].module_path) for i in explorer.selection]", "q_norm")

    # Two points side by side, then both programs.
    view.get_by_role("button", name="Compare", exact=True).click()
    expect(view.locator(".adk-pane")).to_have_count(2)
    picture(view, "explorer")
    view.get_by_role("button", name="Code", exact=True).click()
    expect(view.locator(".adk-added").first).to_be_visible()

    # Python leads, the picture follows.
    lab.run("explorer.goto('fuse_rmsnorm');")
    expect(view.locator("[aria-label^='fuse_rmsnorm'][aria-current=step]")).to_be_visible()


def test_panes_folding_and_parts_between_python_and_the_browser(jupyter_lab):
    lab = jupyter_lab
    cell = lab.run(SETUP)
    view = cell.locator(".adk")
    expect(view.locator("[data-key='m:model.layers']").first).to_be_visible()

    # The record came in its light form; what is not looked at arrives by itself.
    lab.run("import gzip, json\nsent = json.loads(gzip.decompress(explorer.record))")
    lab.expect("explorer.parts, any(g.get('view') is None for g in sent['graphs'])", "(True, True)")
    expect(view.locator(".adk-overlay option", has_text="FLOPs").first).to_be_attached()

    # Three panes from Python; the browser closes one and opens a layer; Python knows.
    lab.run("explorer.panes = ['export_to_gm', 'match_rmsnorm_pattern', 'fuse_rmsnorm']")
    panes = view.locator(".adk-pane")
    expect(panes).to_have_count(3)
    for k, name in enumerate(("export_to_gm", "match_rmsnorm_pattern", "fuse_rmsnorm")):
        expect(panes.nth(k)).to_have_attribute("aria-label", f"after {name}")
    panes.nth(1).locator("[data-key^='m:model.layers.'] .adk-fold").first.click()
    expect(panes.first.locator("[data-key$='.self_attn']").first).to_be_visible()
    view.get_by_role("button", name="Close after match_rmsnorm_pattern").click()
    expect(panes).to_have_count(2)
    told = "[wb.steps[k].name for k in explorer.panes], 'model.layers.0' in explorer.unfolded"
    lab.expect(told, "['export_to_gm', 'fuse_rmsnorm'], True")

    # Folding and searching from Python.
    lab.run("explorer.unfolded = ['model']; explorer.search = 'attention'")
    expect(view.locator(".adk-found button").first).to_be_visible()
    expect(view.locator("[data-key$='.self_attn']")).to_have_count(0)
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        lab.theme(theme)
        expect(lab.page.locator(".adk-root.adk-dark")).to_have_count(int("Dark" in theme))
        picture(view, f"panes {theme}")
        assert violations(lab.page, ".adk") == []


# The pass goes on until it is let go, so that a slow browser sees it at work.
LIVE = """
import time, adkit
from pathlib import Path
from adkit.passes import Pass, PassInfo, Stage
class Slow(Pass):
    key, stage = "slow", Stage.POST_EXPORT
    def apply(self, gm, ctx):
        end = time.monotonic() + 300
        ctx.report("at work on <it>")
        while not Path({go!r}).exists() and time.monotonic() < end:
            ctx.progress(7, 30, "waiting")
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


def test_a_running_pipeline_is_seen_while_it_runs(jupyter_lab, tmp_path):
    lab, go = jupyter_lab, tmp_path / "go"
    cell = lab.run(LIVE.format(go=str(go)))
    view = cell.locator(".adk")
    expect(view.locator(".adk-nothing", has_text="has not run yet")).to_be_visible()
    frame = at_rest(view)

    run = lab.run("wb.run()", wait=False)
    now = view.locator(".adk-now")
    expect(now.locator("b", has_text="slow")).to_be_visible()
    expect(now.get_by_text("7 of 30")).to_be_visible()
    expect(view.locator(".adk-log", has_text="at work on <it>")).to_be_visible()
    expect(view.locator("[aria-label^='export_to_gm: done']")).to_be_visible()
    expect(view.locator("[aria-label^='match_rmsnorm_pattern: pending']")).to_be_visible()
    assert at_rest(view) == frame
    picture(view, "running")
    go.touch()

    # It fails: which transform and why, and everything up to there is drawn.
    expect(view.locator(".adk-failure", has_text="broken failed")).to_be_visible()
    expect(run.locator(".jp-OutputArea-output").first).to_be_visible()
    view.locator(".adk-failure").click()
    expect(view.locator(".adk-failure-text", has_text="ValueError: no good")).to_be_visible()
    drawn = view.locator(".adk-pane[aria-label='before broken'] [data-key='m:model.layers']")
    expect(drawn).to_be_visible()
    view.locator("[aria-label^='slow']").click()
    expect(view.locator(".adk-log", has_text="waited long enough")).to_be_visible()
    picture(view, "failed")

    # Mended, it goes on to the end in the same widget.
    lab.run("wb.disable('broken').run()")
    expect(view.locator("[aria-label^='compile_model: done']")).to_be_visible()
    expect(view.locator(".adk-pane[aria-label='after slow']")).to_be_visible()
    expect(view.locator(".adk-failure")).to_have_count(0)
