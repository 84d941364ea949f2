"""``wb.play()`` as a person meets it: JupyterLab, a browser, the mouse and the keyboard."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]

SETUP = """
import adkit
wb = adkit.Workbench("demo", device="cpu", progress=False, max_seq_len=2048, max_batch_size=16)
llm = wb.llm()
"""
SHOTS = os.environ.get("ADKIT_SCREENSHOTS")  # a folder to leave pictures in, for who wants to look


def picture(element, name: str) -> None:
    if SHOTS:
        element.screenshot(path=Path(SHOTS) / f"{name}.png")


def test_ask_watch_stop_and_close(jupyter_lab):
    lab = jupyter_lab
    lab.run(SETUP)
    cell = lab.run("panel = wb.play(chat=False, max_tokens=2000)\npanel")
    panel = cell.locator(".adkit-play")
    panel.wait_for(timeout=30_000)
    before = panel.bounding_box()

    # Type, press Enter, and text comes while the kernel stays free for other cells.
    box = panel.locator("input[type=text]").first
    box.fill("What is 27 + 45?")
    box.press("Enter")
    panel.locator(".al-text", has_text="27 + 45 = 72.").wait_for(timeout=30_000)
    # Why it ended comes a redraw after the text.
    panel.get_by_text("stop", exact=True).wait_for(timeout=30_000)

    # Slow enough that a busy machine has time to look, on the way.
    lab.run(
        "llm.engine.step = (lambda step: lambda: (__import__('time').sleep(0.03), step())[1])(llm.engine.step)"
    )
    box.fill("Once <b>upon</b> a time")
    panel.get_by_label("copies").fill("3")
    lab.run("panel._settings['ignore_eos'] = True")
    panel.get_by_role("button", name="Generate").click()
    running = panel.locator(".al-running")
    running.nth(2).wait_for(timeout=30_000)
    second = panel.locator(".al-answer").nth(1)
    early = second.locator(".al-text").text_content()
    grown = "n => document.querySelectorAll('.al-answer .al-text')[1].textContent.length > n"
    lab.page.wait_for_function(grown, arg=len(early), timeout=30_000)
    assert second.locator(".al-prompt").text_content() == "Once <b>upon</b> a time"
    panel.locator("path.al-held").nth(2).wait_for(state="attached", timeout=30_000)
    picture(panel, "light")
    assert panel.bounding_box() == before, "nothing jumps while it runs"
    told = lab.run("llm.generate('What is 8 + 9?').text")
    told.locator(".jp-OutputArea-output", has_text="8 + 9 = 17").wait_for(timeout=30_000)
    lab.theme("JupyterLab Dark")
    picture(panel, "dark")

    # Stop stops, and keeps what came.
    clicked = time.monotonic()
    panel.get_by_role("button", name="Stop").click()
    panel.get_by_text("cancelled", exact=True).nth(2).wait_for(timeout=10_000)
    assert time.monotonic() - clicked < 10
    ended = second.locator(".al-text").text_content()
    assert ended.startswith(early)
    lab.page.wait_for_timeout(500)
    assert second.locator(".al-text").text_content() == ended
    expect(panel.get_by_role("button", name="Stop")).to_be_disabled(timeout=30_000)

    # A mistake is told; the panel lives on.
    panel.get_by_label("copies").fill("1")
    box.fill("x " * 3000)
    box.press("Enter")
    panel.locator(".al-log", has_text="max_seq_len").wait_for(timeout=30_000)
    picture(panel, "error")

    # Closed, the output is a picture that needs no kernel.
    lab.run("panel.close()")
    cell.locator(".jp-RenderedHTMLCommon .al-answers").wait_for(timeout=30_000)
    expect(panel).to_have_count(0, timeout=30_000)
    assert "27 + 45 = 72." in cell.text_content()
    picture(cell, "closed")
