"""The standalone page as a person meets it, by mouse and by keyboard; no server, no network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adkit.viz import write_page
from adkit.viz.record import Record, RecordWriter
from adkit.viz.record.overlays import overlay
from tests.e2e.axe import violations
from tests.graph.samples import sample

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PLACEMENTS = ("replicated", "shard(0)", "shard(1)", "partial")


@pytest.fixture(scope="module")
def record() -> Record:
    writer = RecordWriter(sample("llama", 4))
    writer.record.name = "tiny llama"
    writer.costs()
    made = writer.complete()
    where = {i: PLACEMENTS[k % 4] for k, i in enumerate(made.nodes.id)}
    made.overlays = [overlay("shard placement", where, note="2 ranks")]
    return made


@pytest.fixture(scope="module")
def page_file(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(record, tmp_path_factory.mktemp("page") / "walk.html")


@pytest.fixture(params=["light", "dark"])
def tab(request: pytest.FixtureRequest, chromium, page_file: Path) -> Iterator:
    page = chromium.new_page(viewport={"width": 1300, "height": 800}, color_scheme=request.param)
    page.set_default_timeout(8_000)
    page.errors = []
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    page.goto(page_file.as_uri())
    page.wait_for_selector(".adk-module")
    yield page
    assert page.errors == []
    page.close()


def button(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def eventually(page, holds) -> None:
    """Wait until it holds; the page's policy forbids Playwright's own ``wait_for_function``."""
    end = time.monotonic() + 8
    while not holds():
        assert time.monotonic() < end
        page.wait_for_timeout(30)


def test_four_panes_in_step(tab) -> None:
    layers = tab.locator(".adk-pane [data-key^='m:model.layers.']")
    button(tab, "Compare").click()
    for n in (2, 3, 4):
        assert tab.locator(".adk-pane").count() == n
        if n < 4:
            button(tab, "Add pane").click()
    assert button(tab, "Add pane").is_disabled()
    assert tab.locator(".adk-focus").count() == 1
    assert len({p.get_attribute("aria-label") for p in tab.locator(".adk-pane").all()}) == 4

    # A layer unfolds in all of them, and stays under the same place of the screen.
    before = layers.first.bounding_box()
    layers.first.locator(".adk-fold").click()
    eventually(
        tab,
        lambda: all(p.locator("[data-key$='.self_attn']").count() for p in tab.locator(".adk-pane").all()),
    )
    after = layers.first.bounding_box()
    assert abs(before["y"] - after["y"]) < 2
    # Panning one moves all by as much.
    tops = lambda: [  # noqa: E731
        p.locator("[data-key^='m:model.layers.']").first.bounding_box()["y"]
        for p in tab.locator(".adk-pane").all()
    ]
    old = tops()
    canvas = tab.locator(".adk-canvas").first.bounding_box()
    x, y = canvas["x"] + 20, canvas["y"] + canvas["height"] - 20
    tab.mouse.move(x, y)
    tab.mouse.down()
    tab.mouse.move(x + 5, y - 40, steps=4)
    tab.mouse.up()
    eventually(tab, lambda: all(30 < a - b < 50 for a, b in zip(old, tops(), strict=True)))

    # Another point in a pane; closing panes leads back to one graph.
    tab.locator(".adk-point").first.select_option(label="after export_to_gm")
    assert tab.locator(".adk-pane").first.get_attribute("aria-label") == "after export_to_gm"
    for n in (3, 2, 1):
        tab.get_by_role("button", name="Close after").first.click()
        assert tab.locator(".adk-pane").count() == n
    assert button(tab, "Graph").get_attribute("aria-pressed") == "true"


def test_nothing_jumps_when_panels_open(tab) -> None:
    frame = tab.locator(".adk").bounding_box()
    strip = tab.locator(".adk-timeline").bounding_box()
    side = tab.locator(".adk-side").bounding_box()
    tab.locator("[data-key='m:model.norm']").first.click()
    assert tab.locator(".adk-side").bounding_box() == side
    button(tab, "Compare").click()
    button(tab, "Add pane").click()
    assert tab.locator(".adk-side").bounding_box() == side
    assert tab.locator(".adk-timeline").bounding_box() == strip
    button(tab, "Details").click()
    assert tab.locator(".adk-side").count() == 0
    button(tab, "Code").click()
    assert tab.locator(".adk-timeline").bounding_box() == strip
    assert tab.locator(".adk").bounding_box() == frame


def test_by_keyboard_alone(tab) -> None:
    focused = lambda: tab.evaluate("document.activeElement.getAttribute('aria-label')")  # noqa: E731
    for _ in range(30):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.matches('.adk-step')"):
            break
    here = focused()
    tab.keyboard.press("ArrowLeft")
    assert focused() != here
    tab.keyboard.press("Home")
    tab.keyboard.press("End")
    assert focused().startswith("compile_model") or "adk-step" in tab.evaluate(
        "document.activeElement.className"
    )
    tab.keyboard.press("k")
    tab.keyboard.press("c")
    tab.keyboard.press("p")
    assert tab.locator(".adk-pane").count() == 3
    for _ in range(30):
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.matches('.adk-scene')"):
            break
    tab.keyboard.press("ArrowDown")
    tab.locator("[role=tab][aria-selected=true]", has_text="Node").wait_for()
    name = tab.locator(".adk-panel h2").text_content()
    tab.keyboard.press("ArrowRight")
    eventually(tab, lambda: tab.locator(".adk-panel h2").text_content() != name)
    eventually(
        tab,
        lambda: tab.locator(".adk-spoken").text_content().startswith(f"{tab.locator('h2').text_content()}, "),
    )
    tab.keyboard.press("Escape")
    tab.keyboard.press("x")
    assert tab.locator(".adk-pane").count() == 2
    tab.keyboard.press("/")
    tab.keyboard.type("rmsnorm")
    tab.locator(".adk-found button").first.wait_for()
    tab.keyboard.press("Enter")
    tab.locator(".adk-selected").first.wait_for()


def test_words_laid_over_nodes_have_a_legend_and_marks(tab) -> None:
    tab.get_by_label("Colour").select_option("shard placement")
    assert [w for w in PLACEMENTS if w not in tab.locator(".adk-legend").text_content()] == []
    tab.locator("[data-key^='m:model.layers.'] .adk-fold").first.click()
    tab.locator("[data-key$='.self_attn'] .adk-fold").first.click()
    tab.locator(".adk-node .adk-badge").first.wait_for()
    assert set(tab.locator(".adk-node .adk-badge").all_text_contents()) <= set(PLACEMENTS)
    # Told apart without colour: each word has a pattern of its own, in the legend as in the graph.
    fills = {s.evaluate("e => e.style.cssText") for s in tab.locator(".adk-legend .adk-swatch").all()}
    assert len(fills) == len(PLACEMENTS)


@pytest.mark.parametrize("mode", ["Graph", "Compare", "Code"])
def test_axe_finds_nothing(tab, mode: str) -> None:
    button(tab, mode).click()
    if mode == "Compare":
        button(tab, "Add pane").click()
    tab.wait_for_timeout(200)
    assert violations(tab, "html") == []
    if mode != "Graph":
        return
    for name in ("Rewrites", "Node", "About"):
        if name == "Node":
            tab.locator("[data-key^='m:model.layers.'] .adk-fold").first.click()
            tab.get_by_label("Search nodes").fill("attention")
            assert violations(tab, ".adk-toolbar") == []
            tab.locator(".adk-found button").first.click()
        else:
            tab.get_by_role("tab", name=name).click()
        assert violations(tab, ".adk-side") == []
    tab.get_by_label("Colour").select_option("shard placement")
    assert violations(tab, ".adk") == []
