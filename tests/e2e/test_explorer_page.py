"""The standalone page as a person meets it, by mouse and by keyboard; no server, no network."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adkit.viz.record import Record
from adkit.viz.record.overlays import overlay
from tests.e2e.axe import violations
from tests.e2e.lab import PATIENCE, at_rest
from tests.e2e.standalone import button, opened, tiny_llama

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]

PLACEMENTS = ("replicated", "shard(0)", "shard(1)", "partial")


@pytest.fixture(scope="module")
def record() -> Record:
    made = tiny_llama()
    where = {i: PLACEMENTS[k % 4] for k, i in enumerate(made.nodes.id)}
    made.overlays = [overlay("shard placement", where, note="2 ranks")]
    return made


@pytest.fixture(params=["light", "dark"])
def tab(request: pytest.FixtureRequest, chromium, page_file: Path) -> Iterator:
    with opened(chromium, page_file, color_scheme=request.param) as page:
        yield page


def eventually(page, holds) -> None:
    """Wait until it holds; the page's policy forbids Playwright's own ``wait_for_function``."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        page.wait_for_timeout(30)


def test_four_panes_in_step(tab) -> None:
    layers = tab.locator(".adk-pane [data-key^='m:model.layers.']")
    button(tab, "Compare").click()
    panes = tab.locator(".adk-pane")
    for n in (2, 3, 4):
        expect(panes).to_have_count(n)
        if n < 4:
            button(tab, "Add pane").click()
    expect(button(tab, "Add pane")).to_be_disabled()
    expect(tab.locator(".adk-focus")).to_have_count(1)
    assert len({p.get_attribute("aria-label") for p in panes.all()}) == 4

    # A layer unfolds in all of them, and stays under the same place of the screen.
    before = at_rest(layers.first)
    layers.first.locator(".adk-fold").click()
    for n in range(4):
        expect(panes.nth(n).locator("[data-key$='.self_attn']").first).to_be_visible()
    after = at_rest(layers.first)
    assert abs(before["y"] - after["y"]) < 2
    # Panning one moves all by as much.
    tops = lambda: [  # noqa: E731
        p.locator("[data-key^='m:model.layers.']").first.bounding_box()["y"] for p in panes.all()
    ]
    old = tops()
    canvas = at_rest(tab.locator(".adk-canvas").first)
    x, y = canvas["x"] + 20, canvas["y"] + canvas["height"] - 20
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 5, y - 40, steps=4)
    tab.mouse.up()
    eventually(tab, lambda: all(30 < a - b < 50 for a, b in zip(old, tops(), strict=True)))

    # Another point in a pane; closing panes leads back to one graph.
    tab.locator(".adk-point").first.select_option(label="after export_to_gm")
    expect(panes.first).to_have_attribute("aria-label", "after export_to_gm")
    for n in (3, 2, 1):
        tab.get_by_role("button", name="Close after").first.click()
        expect(panes).to_have_count(n)
    expect(button(tab, "Graph")).to_have_attribute("aria-pressed", "true")


def test_nothing_jumps_when_panels_open(tab) -> None:
    frame = at_rest(tab.locator(".adk"))
    strip = at_rest(tab.locator(".adk-timeline"))
    side = at_rest(tab.locator(".adk-side"))
    tab.locator("[data-key='m:model.norm']").first.click()
    expect(tab.locator(".adk-panel h2")).to_contain_text("norm")
    assert at_rest(tab.locator(".adk-side")) == side
    button(tab, "Compare").click()
    button(tab, "Add pane").click()
    expect(tab.locator(".adk-pane")).to_have_count(3)
    assert at_rest(tab.locator(".adk-side")) == side
    assert at_rest(tab.locator(".adk-timeline")) == strip
    button(tab, "Details").click()
    expect(tab.locator(".adk-side")).to_have_count(0)
    button(tab, "Code").click()
    expect(button(tab, "Code")).to_have_attribute("aria-pressed", "true")
    assert at_rest(tab.locator(".adk-timeline")) == strip
    assert at_rest(tab.locator(".adk")) == frame


def press_tab_until(tab, selector: str):
    """Go by the Tab key to the first element of a kind; returns it, focused."""
    for _ in range(30):
        tab.keyboard.press("Tab")
        if tab.evaluate("s => document.activeElement.matches(s)", selector):
            return tab.locator(f"{selector}:focus")
    raise AssertionError(f"{selector} is not reached by the Tab key")


def test_by_keyboard_alone(tab) -> None:
    mark = press_tab_until(tab, ".adk-step")
    here = mark.get_attribute("data-step")
    tab.keyboard.press("ArrowLeft")
    expect(mark).not_to_have_attribute("data-step", here)
    tab.keyboard.press("Home")
    expect(mark).to_have_attribute("data-step", "0")
    tab.keyboard.press("End")
    expect(mark).to_have_attribute("aria-label", re.compile("^compile_model"))
    tab.keyboard.press("k")
    tab.keyboard.press("c")
    expect(tab.locator(".adk-pane")).to_have_count(2)
    tab.keyboard.press("p")
    expect(tab.locator(".adk-pane")).to_have_count(3)
    press_tab_until(tab, ".adk-scene")
    tab.keyboard.press("ArrowDown")
    expect(tab.locator("[role=tab][aria-selected=true]", has_text="Node")).to_be_visible()
    heading = tab.locator(".adk-panel h2")
    name = heading.text_content()
    tab.keyboard.press("ArrowRight")
    expect(heading).not_to_have_text(name)
    expect(tab.locator(".adk-spoken")).to_have_text(re.compile(f"^{re.escape(heading.text_content())}, "))
    tab.keyboard.press("Escape")
    tab.keyboard.press("x")
    expect(tab.locator(".adk-pane")).to_have_count(2)
    tab.keyboard.press("/")
    tab.keyboard.type("rmsnorm")
    expect(tab.locator(".adk-found button").first).to_be_visible()
    tab.keyboard.press("Enter")
    expect(tab.locator(".adk-selected").first).to_be_visible()


def test_words_laid_over_nodes_have_a_legend_and_marks(tab) -> None:
    tab.get_by_label("Colour").select_option("shard placement")
    for word in PLACEMENTS:
        expect(tab.locator(".adk-legend")).to_contain_text(word)
    tab.locator("[data-key^='m:model.layers.'] .adk-fold").first.click()
    tab.locator("[data-key$='.self_attn'] .adk-fold").first.click()
    expect(tab.locator(".adk-node .adk-badge").first).to_be_visible()
    assert set(tab.locator(".adk-node .adk-badge").all_text_contents()) <= set(PLACEMENTS)
    # Told apart without colour: each word has a pattern of its own, in the legend as in the graph.
    fills = {s.evaluate("e => e.style.cssText") for s in tab.locator(".adk-legend .adk-swatch").all()}
    assert len(fills) == len(PLACEMENTS)


@pytest.mark.parametrize("mode", ["Graph", "Compare", "Code"])
def test_axe_finds_nothing(tab, mode: str) -> None:
    button(tab, mode).click()
    expect(button(tab, mode)).to_have_attribute("aria-pressed", "true")
    if mode == "Compare":
        button(tab, "Add pane").click()
        expect(tab.locator(".adk-pane")).to_have_count(3)
    assert violations(tab, "html") == []
    if mode != "Graph":
        return
    for name in ("Rewrites", "Node", "About"):
        if name == "Node":
            tab.locator("[data-key^='m:model.layers.'] .adk-fold").first.click()
            tab.get_by_label("Search nodes").fill("attention")
            expect(tab.locator(".adk-found button").first).to_be_visible()
            assert violations(tab, ".adk-toolbar") == []
            tab.locator(".adk-found button").first.click()
        else:
            tab.get_by_role("tab", name=name).click()
        expect(tab.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
        assert violations(tab, ".adk-side") == []
    tab.get_by_label("Colour").select_option("shard placement")
    expect(tab.locator(".adk-legend")).to_contain_text(PLACEMENTS[0])
    assert violations(tab, ".adk") == []
