"""Questions that people bring to a walk, and how few presses lead from each to its answer; on the standalone page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from adkit.viz.record import Record
from tests.e2e.axe import violations
from tests.e2e.standalone import button, opened, tiny_llama

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def record() -> Record:
    return tiny_llama()


@pytest.fixture
def tab(chromium, page_file: Path) -> Iterator:
    with opened(chromium, page_file) as page:
        yield page


def at_step(page, name: str) -> None:
    page.get_by_role("button", name=re.compile(f"^{name}:")).click()
    expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()


def test_what_did_this_step_do(tab, record: Record) -> None:
    at_step(tab, "match_swiglu_pattern")
    s = next(s for s in record.steps if s.name == "match_swiglu_pattern")
    # Folded, the layer says how much; one press opens what changed and nothing else.
    layer = tab.locator("[data-key^='m:model.layers.']").first
    expect(layer.locator(".adk-plus")).to_have_text("+1")
    expect(layer.locator(".adk-minus")).to_have_text("−2")
    expect(tab.locator(".adk-node.adk-created")).to_have_count(0)
    button(tab, "Unfold changed").click()
    made = tab.locator(".adk-node.adk-created")
    expect(made).to_have_count(1)
    expect(made).to_be_in_viewport()
    expect(tab.locator("[data-key$='.self_attn']").first).not_to_have_class(re.compile("adk-open"))
    # The count in the legend, and the key, lead to the node.
    button(tab, f"{s.created} added").click()
    expect(tab.locator(".adk-node.adk-selected")).to_contain_text("torch_swiglu")
    tab.keyboard.press("Escape")
    tab.locator(".adk-scene").focus()
    tab.keyboard.press("Escape")
    expect(tab.locator(".adk-selected")).to_have_count(0)
    tab.keyboard.press("n")
    expect(tab.locator(".adk-node.adk-selected")).to_contain_text("torch_swiglu")
    # What is gone stands in the graph before.
    button(tab, f"{s.erased} removed").click()
    expect(tab.locator(".adk-pane")).to_have_count(2)
    expect(tab.locator(".adk-pane").first.locator(".adk-node.adk-selected.adk-erased")).to_be_in_viewport()


def test_where_does_this_node_come_from_and_why_did_nothing_take_it(tab) -> None:
    box = tab.get_by_role("searchbox")
    box.fill("torch_rmsnorm")
    found = tab.get_by_role("search").get_by_role("listitem")
    expect(found.filter(has_text="×4").first).to_be_visible()  # equal layers are one line
    tab.keyboard.press("ArrowDown")
    expect(found.first.get_by_role("button")).to_be_focused()
    tab.keyboard.press("ArrowUp")
    expect(box).to_be_focused()
    tab.keyboard.press("Enter")
    history = tab.locator(".adk-history li")
    expect(history.first).to_contain_text("export_to_gm")
    expect(history.filter(has_text="made this node")).to_have_count(1)
    expect(tab.locator(".adk-costs tbody tr").first).to_contain_text("FLOP")
    tab.get_by_text("later passes left it as it is").click()
    told = tab.locator("details[open] .adk-facts dd")
    expect(
        told.filter(has_text=re.compile("matched nothing|already|rewrote other nodes")).first
    ).to_be_visible()
    # What flows into it and out of it stands out.
    expect(tab.locator(".adk-edge.adk-flows").first).to_be_attached()
    assert violations(tab, ".adk") == []


def test_where_do_the_programs_differ(tab) -> None:
    at_step(tab, "match_rmsnorm_pattern")
    button(tab, "Code").click()
    differing = tab.locator(".adk-programs tr.adk-added, .adk-programs tr.adk-removed")
    expect(differing.first).to_be_in_viewport()
    for name in ("Next difference", "Previous difference"):
        button(tab, name).click()
        expect(tab.locator("tbody tr[class]:not([class=''])").first).to_be_attached()
    button(tab, "Previous difference").click()  # before the first comes the last
    expect(differing.last).to_be_in_viewport()
    assert violations(tab, ".adk") == []


def test_which_pass_took_the_time(tab, record: Record) -> None:
    bars = tab.get_by_label("Bars")
    slow = max(record.steps, key=lambda s: s.seconds)
    heights = lambda: {  # noqa: E731
        b.get_attribute("aria-label").split(":")[0]: b.locator("i").evaluate(
            "i => parseFloat(i.style.height)"
        )
        for b in tab.locator(".adk-step").all()
    }
    bars.select_option(label="time")
    expect(tab.locator(f".adk-step[aria-label^='{slow.name}:'] i")).to_have_attribute(
        "style", re.compile("26px")
    )
    assert max(heights(), key=heights().get) == slow.name
    tab.locator(f".adk-step[aria-label^='{slow.name}:']").hover()
    expect(tab.locator(".adk-now")).to_contain_text(slow.name)
    if not any(s.memory_bytes for s in record.steps):
        expect(bars.get_by_role("option", name="memory")).to_be_disabled()


def test_the_panel_is_as_wide_as_one_likes(tab) -> None:
    side = tab.locator(".adk-side")
    wide = side.evaluate("s => s.clientWidth")
    tab.get_by_role("separator").focus()
    for _ in range(4):
        tab.keyboard.press("ArrowLeft")
    expect(tab.get_by_role("separator")).to_have_attribute("aria-valuenow", str(wide + 4 * 24))
    assert side.bounding_box()["width"] > wide + 80
