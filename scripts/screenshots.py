"""Take the README's pictures of the explorer anew: ``python scripts/screenshots.py [NAME ...]`` (``make screenshots``).

A headless Chromium opens the standalone report of Llama 3.1 405B's walk on shapes (nothing is downloaded) and
a JupyterLab of its own, goes where each picture is and writes ``docs/images/NAME.png``. Look at them before
you commit them.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adkit

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MODEL = "llama-3.1-405b"
NOTEBOOK = """
import adkit

wb = adkit.Workbench("demo", progress=False).run()
step = wb.steps["match_rope_pattern"]
explorer = wb.explore()
explorer.goto(step.name, step.rewrites[0].sites[0].created[0])
explorer
"""


class Report:
    """The standalone page in a tab, driven as a reader would: by names, not by places."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def step(self, name: str) -> None:
        self.page.get_by_role("button", name=re.compile(f"^{name}:")).click()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def colour(self, name: str) -> None:
        self.page.get_by_label("Colour").select_option(label=name)

    def find(self, text: str, nth: int = 0) -> None:
        """Search, and choose the ``nth`` node found."""
        box = self.page.get_by_role("searchbox")
        box.fill(text)
        self.page.get_by_role("search").get_by_role("listitem").nth(nth).get_by_role("button").click()

    def smaller(self, times: int) -> None:
        for _ in range(times):
            self.page.get_by_role("button", name="Zoom out").first.click()

    def read(self, heading: str) -> None:
        """Scroll the panel to a heading."""
        self.page.get_by_role("heading", name=heading).evaluate("h => h.scrollIntoView({block: 'start'})")


def hero(report: Report) -> None:
    """An attention among 126 open, coloured by roofline time, with its history and the code that it came from."""
    report.step("match_linear")
    report.colour("roofline time (prefill of 2048 tokens)")
    report.find("torch_attention")
    report.smaller(2)
    report.read("History")


def diff(report: Report) -> None:
    """Before and after a pass, side by side."""
    report.step("match_rmsnorm_pattern")
    report.press("Compare")
    report.press("Unfold changed")
    report.tab("Step")


def rewrite(report: Report) -> None:
    """A rewrite class: its first site before and after."""
    report.step("match_rope_pattern")
    report.tab("Rewrites")
    report.page.get_by_role("button", name=re.compile("torch_rope")).first.click()


PICTURES: dict[str, Callable[[Report], None]] = {"explorer": hero, "diff": diff, "rewrite": rewrite}


def main() -> None:
    """Take the pictures named, or all."""
    from playwright.sync_api import sync_playwright

    sys.path.insert(0, str(ROOT))
    from tests.e2e.lab import open_notebook, serve

    wanted = sys.argv[1:] or [*PICTURES, "notebook"]
    unknown = set(wanted) - {*PICTURES, "notebook"}
    if unknown:
        sys.exit(f"no picture {', '.join(unknown)}; there are {', '.join([*PICTURES, 'notebook'])}")
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, BROWSERS)), None), args=["--no-sandbox"]
        )
        view: dict[str, Any] = {"viewport": {"width": 1360, "height": 840}, "device_scale_factor": 1.25}
        if any(name in PICTURES for name in wanted):
            made = adkit.Workbench(MODEL, device="cpu", dtype="bfloat16", progress=False).run()
            address = made.report(Path(folder) / "walk.html").as_uri()
        for name in [n for n in PICTURES if n in wanted]:
            page = browser.new_page(**view)
            page.goto(address)
            page.get_by_role("tablist").wait_for()
            PICTURES[name](Report(page))
            page.wait_for_timeout(600)  # what slides into view has arrived
            page.locator("#adkit-explorer").screenshot(path=IMAGES / f"{name}.png")
            page.close()
        if "notebook" in wanted:
            with serve(Path(folder), ROOT) as address:
                page = browser.new_page(**view)
                notebook = open_notebook(address, page)
                notebook.command("application:toggle-left-area")
                notebook.run(NOTEBOOK.strip()).get_by_role("tablist").wait_for()
                page.wait_for_timeout(1500)
                page.screenshot(path=IMAGES / "notebook.png")
        browser.close()
    for name in wanted:
        print(f"docs/images/{name}.png  {(IMAGES / f'{name}.png').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
