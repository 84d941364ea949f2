"""``wb.play()`` as a person meets it: JupyterLab, a browser, the mouse and the keyboard."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.e2e.lab import at_rest

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]

SETUP = """
import adkit
wb = adkit.Workbench("demo", device="cpu", progress=False, max_seq_len=2048, max_batch_size=16)
llm = wb.llm()
"""
#: A button's message may overtake a field's.
ASKED = "panel._controls.prompt.value[:12], panel._controls.fields['copies'].value"
SHOTS = os.environ.get("ADKIT_SCREENSHOTS")  # a folder to leave pictures in, for who wants to look


def picture(element, name: str) -> None:
    if SHOTS:
        element.screenshot(path=Path(SHOTS) / f"{name}.png")


def test_ask_watch_stop_and_close(jupyter_lab):
    lab = jupyter_lab
    lab.run(SETUP)
    cell = lab.run("panel = wb.play(chat=False, max_tokens=2000)\npanel")
    panel = cell.locator(".adkit-play")
    before = at_rest(panel)

    # Type, press Enter, and text comes while the kernel stays free for other cells.
    box = panel.locator("input[type=text]").first
    box.fill("What is 27 + 45?")
    lab.expect(ASKED, "('What is 27 +', 1)")
    box.press("Enter")
    expect(panel.locator(".al-text", has_text="27 + 45 = 72.")).to_be_visible()
    expect(panel.get_by_text("stop", exact=True)).to_be_visible()

    # Slow enough that a busy machine has time to look, on the way.
    lab.run(
        "llm.engine.step = (lambda step: lambda: (__import__('time').sleep(0.05), step())[1])(llm.engine.step)"
    )
    box.fill("Once <b>upon</b> a time")
    panel.get_by_label("copies").fill("3")
    lab.run("panel._settings['ignore_eos'] = True")
    lab.expect(ASKED, "('Once <b>upon', 3)")
    panel.get_by_role("button", name="Generate").click()
    expect(panel.locator(".al-running").nth(2)).to_be_visible()
    second = panel.locator(".al-answer").nth(1)
    expect(second.locator(".al-prompt")).to_have_text("Once <b>upon</b> a time")
    early = second.locator(".al-text").text_content()
    expect(second.locator(".al-text")).not_to_have_text(early)
    expect(panel.locator("path.al-held").nth(2)).to_be_attached()
    picture(panel, "light")
    assert at_rest(panel) == before, "nothing jumps while it runs"
    told = lab.run("llm.generate('What is 8 + 9?').text")
    expect(told.locator(".jp-OutputArea-output")).to_contain_text("8 + 9 = 17")
    lab.theme("JupyterLab Dark")
    picture(panel, "dark")

    # Stop stops, and keeps what came.
    panel.get_by_role("button", name="Stop").click()
    expect(panel.get_by_text("cancelled", exact=True)).to_have_count(3)
    expect(panel.get_by_role("button", name="Stop")).to_be_disabled()
    ended = second.locator(".al-text").text_content()
    assert ended.startswith(early)
    lab.expect("panel.completions[0].finish_reason, panel.running", "('cancelled', False)")
    assert second.locator(".al-text").text_content() == ended

    # A mistake is told; the panel lives on.
    panel.get_by_label("copies").fill("1")
    box.fill("x " * 3000)
    lab.expect(ASKED, "('x x x x x x ', 1)")
    box.press("Enter")
    expect(panel.locator(".al-log", has_text="max_seq_len")).to_be_visible()
    picture(panel, "error")

    # Closed, the output is a picture that needs no kernel.
    lab.run("panel.close()")
    expect(cell.locator(".jp-RenderedHTMLCommon .al-answers")).to_be_visible()
    expect(panel).to_have_count(0)
    expect(cell).to_contain_text("27 + 45 = 72.")
    picture(cell, "closed")
