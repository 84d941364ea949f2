"""Jupyter Notebook 7, the other host of one server: the explorer and the panel live there as in JupyterLab."""

from __future__ import annotations

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]

SETUP = """
import adkit
wb = adkit.Workbench("demo", device="cpu", progress=False).run()
explorer = wb.explore()
explorer
"""


def test_explorer_steps_and_is_read_back_and_the_panel_answers(jupyter_notebook):
    notebook = jupyter_notebook
    view = notebook.run(SETUP).locator(".adk")
    expect(view.locator("[data-key='m:model.layers']").first).to_be_visible()

    # The mouse leads, Python knows.
    view.locator("[aria-label^='match_rmsnorm_pattern']").click()
    expect(view.locator("h2", has_text="match_rmsnorm_pattern")).to_be_visible()
    view.get_by_label("Search nodes").fill("model.norm rmsnorm")
    view.locator(".adk-found button").first.click()
    notebook.run("rows = wb.steps['match_rmsnorm_pattern'].after.by_id")
    told = "wb.steps[explorer.step].name, {rows[i].module_path for i in explorer.selection}"
    notebook.expect(told, "('match_rmsnorm_pattern', {'model.norm'})")

    # Python leads, the picture follows; parts that were not sent come.
    notebook.run("explorer.goto('fuse_rmsnorm', compare_to='export_to_gm');")
    expect(view.locator("[aria-label^='fuse_rmsnorm'][aria-current=step]")).to_be_visible()
    expect(view.locator(".adk-pane")).to_have_count(2)
    expect(view.locator(".adk-overlay option", has_text="FLOPs").first).to_be_attached()
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        notebook.theme(theme)
        expect(notebook.page.locator(".adk-root.adk-dark")).to_have_count(int("Dark" in theme))

    panel = notebook.run("panel = wb.play(chat=False)\npanel").locator(".adkit-play")
    box = panel.locator("input[type=text]").first
    box.fill("What is 27 + 45?")
    notebook.expect("panel._controls.prompt.value", "What is 27 + 45?")
    box.press("Enter")
    expect(panel.locator(".al-text", has_text="27 + 45 = 72.")).to_be_visible()
