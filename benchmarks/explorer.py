"""Measure the explorer in a real browser: a headless Chromium, the standalone page and a real JupyterLab.

    python benchmarks/explorer.py [--models llama-3.1-405b,deepseek-v3] [--rounds 5] [--page-only]

Writes ``benchmarks/results/explorer.json``. Milliseconds from the input event to the frame that shows its effect; the
longest frame is the longest time between two frames while the mouse drags and the wheel turns. Headless Chromium
draws in software, so a real screen is faster. Medians over rounds, each in a new page (of JupyterLab: a new widget);
nothing is downloaded. Let the machine be otherwise idle: its load is written beside the figures, and beside some what
the page's main thread itself worked (``cpu``), which other programs do not lengthen much.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import adkit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "explorer.json"
AIMS = {"first_paint_ms": 1000, "unfold_ms": 150, "step_ms": 150, "longest_frame_ms": 100}
VIEWPORT = {"width": 1440, "height": 900}

#: Notes when the first module stands in the document and a frame has shown it.
PAINT = """
window.painted = new Promise(done => {
  const look = () => requestAnimationFrame(() =>
    document.querySelector(".adk-module") ? requestAnimationFrame(() => done(performance.now())) : look());
  look();
});
"""

#: Acts, waits until `shown` holds, then for the frame that shows it.
ACT = """
async ([act, shown]) => {
  const fire = (e, type) => e.dispatchEvent(new PointerEvent(type, {bubbles: true, button: 0, buttons: 1}));
  const [go, done] = [new Function("fire", act), new Function(shown)];
  const begin = performance.now();
  go(fire);
  const frame = () => new Promise(r => requestAnimationFrame(r));
  while (!done()) {
    await frame();
    if (performance.now() - begin > 20000) throw new Error("nothing happened");
  }
  await frame(); await frame();
  return performance.now() - begin;
}
"""
FRAMES = """
() => { window.frames_ = []; let last = performance.now(); window.watching = true;
  const tick = now => {
    window.frames_.push(now - last);
    last = now;
    if (window.watching) requestAnimationFrame(tick);
  };
  requestAnimationFrame(now => { last = now; requestAnimationFrame(tick); }); }
"""
ELEMENTS = "() => document.querySelectorAll('.adk *').length"
LAYER = "[...document.querySelectorAll(\"[data-key^='m:model.layers.'] > .adk-fold\")].pop()"


class Explored:
    """An explorer on a browser page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.tools = page.context.new_cdp_session(page)
        self.tools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def cpu(self) -> float:
        """Milliseconds that the main thread has worked so far."""
        metrics = self.tools.send("Performance.getMetrics")["metrics"]
        return 1e3 * next(float(m["value"]) for m in metrics if m["name"] == "TaskDuration")

    def act(self, code: str, shown: str) -> float:
        """Milliseconds until ``shown`` is on the screen after ``code``."""
        return float(self.page.evaluate(ACT, [code, f"return {shown}"]))

    def button(self, text: str) -> None:
        self.page.get_by_role("button", name=text, exact=True).click()
        self.page.wait_for_timeout(200)

    def unfold(self) -> float:
        count = "document.querySelectorAll('.adk-module').length"
        click = f"const f = {LAYER}; fire(f, 'pointerdown'); fire(f, 'pointerup')"
        return self.act(f"window.before = {count}; {click}", f"{count} > window.before")

    def steps(self) -> list[float]:
        """Every step that changed the graph, from the last to the first; then back to the last."""
        count = self.page.locator(".adk-step.adk-changes").count()
        at = "[...document.querySelectorAll('.adk-step.adk-changes')]"
        order = [*reversed(range(count - 1)), count - 1]
        return [
            self.act(f"{at}[{k}].click()", f"{at}[{k}].matches('[aria-current=step]')")
            for k in order
            if k >= 0
        ]

    def move(self) -> float:
        """The longest frame while the graph is dragged about and zoomed in and out."""
        box = self.page.locator(".adk-canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        mouse = self.page.mouse
        mouse.move(x, y)
        mouse.down()
        mouse.up()  # the wheel zooms once the graph was clicked
        self.page.wait_for_timeout(300)
        self.page.evaluate(FRAMES)
        for dx, dy in ((0, -260), (180, 200), (-200, 80), (20, -120)):
            mouse.move(x, y)
            mouse.down()
            mouse.move(x + dx, y + dy, steps=25)
            mouse.up()
        mouse.move(x, y)
        for by in (-120, 120):
            for _ in range(14):
                mouse.wheel(0, by)
                self.page.wait_for_timeout(16)
        self.page.wait_for_timeout(150)
        frames = self.page.evaluate("() => { window.watching = false; return window.frames_; }")
        return float(max(frames))

    def round(self) -> dict[str, float]:
        elements = {"outline": self.page.evaluate(ELEMENTS)}
        clock = [self.cpu()]
        unfold = self.unfold()
        clock.append(self.cpu())
        steps = self.steps()
        clock.append(self.cpu())
        frame = self.move()
        self.button("Unfold all")
        elements["everything unfolded"] = self.page.evaluate(ELEMENTS)
        all_frame = self.move()
        self.button("Fold all")
        self.button("Compare")
        self.button("Add pane")
        three = self.move()
        return {
            "unfold_ms": unfold,
            "unfold_cpu_ms": clock[1] - clock[0],
            "step_ms": statistics.median(steps),
            "step_cpu_ms": (clock[2] - clock[1]) / len(steps),
            "slowest_step_ms": max(steps),
            "longest_frame_ms": frame,
            "longest_frame_everything_unfolded_ms": all_frame,
            "longest_frame_three_panes_ms": three,
            "elements_outline": elements["outline"],
            "elements_everything_unfolded": elements["everything unfolded"],
        }


def page_rounds(browser: Any, file: Path, rounds: int) -> dict[str, float]:
    """The standalone page, each time opened anew."""

    def one() -> dict[str, float]:
        page = browser.new_page(viewport=VIEWPORT)
        page.add_init_script(PAINT)
        page.goto(file.as_uri())
        paint = float(page.evaluate("window.painted"))
        found = Explored(page).round()
        page.close()
        return {"first_paint_ms": paint, **found}

    return medians(one, rounds)


def lab_rounds(browser: Any, name: str, rounds: int) -> dict[str, float]:
    """JupyterLab: from running the cell ``wb.explore()`` to the picture, then as on the page."""
    from tests.e2e.lab import open_notebook, serve

    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), ROOT) as address:
        page = browser.new_page(viewport={"width": 1440, "height": 1300})
        lab = open_notebook(address, page)
        setup = f"import adkit, time\nwb = adkit.Workbench({name!r}, device='cpu', progress=False).run()"
        lab.run(setup, seconds=300)

        def one() -> dict[str, float]:
            page.evaluate("window.from = performance.now()")
            page.evaluate(f"() => {{ {PAINT} }}")  # not its promise: nothing is painted yet
            cell = lab.run(
                "start = time.process_time(); explorer = wb.explore(); took = time.process_time() - start\nexplorer"
            )
            paint = float(page.evaluate("window.painted.then(at => at - window.from)"))
            told = lab.run("print('seconds', took)").locator(".jp-OutputArea-output").first
            told.wait_for()
            seconds = float((told.text_content() or "").split()[1])
            cell.scroll_into_view_if_needed()
            page.wait_for_timeout(4000)  # the parts that were left out arrive
            found = Explored(page).round()
            lab.command("notebook:clear-all-cell-outputs")
            lab.run("explorer.close()")
            return {"explore_to_paint_ms": paint, "explore_in_python_cpu_ms": seconds * 1e3, **found}

        found = medians(one, rounds)
        page.close()
    return found


def medians(one: Callable[[], dict[str, float]], rounds: int) -> dict[str, float]:
    """The median of each figure."""
    got = [one() for _ in range(rounds)]
    return {k: round(statistics.median(g[k] for g in got), 1) for k in got[0]}


def main() -> None:
    """Measure what the command line names and write it down."""
    from playwright.sync_api import sync_playwright

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", default="llama-3.1-405b,deepseek-v3")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--page-only", action="store_true", help="leave JupyterLab out")
    a = p.parse_args()
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    out: dict[str, Any] = {
        "what": "the explorer in a headless browser: medians, milliseconds",
        "command": " ".join(["python", "benchmarks/explorer.py", *sys.argv[1:]]),
        "aims": AIMS,
        "models": {},
    }
    loads = [os.getloadavg()[0]]
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"],
        )
        out["machine"] = f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}, no GPU"
        out["versions"] = {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "chromium": browser.version,
        }  # fmt: skip
        for name in a.models.split(","):
            wb = adkit.Workbench(name, device="cpu", progress=False).run()
            start = time.perf_counter()
            file = wb.report(Path(folder) / f"{name}.html")
            nodes = max(len(s.after) for s in wb.steps)
            seconds = time.perf_counter() - start
            del wb
            found = {
                "nodes": nodes,
                "report_seconds": round(seconds, 2),
                "report_megabytes": round(file.stat().st_size / 1e6, 2),
                "page": page_rounds(browser, file, a.rounds),
            }
            if not a.page_only:
                found["jupyterlab"] = lab_rounds(browser, name, max(1, a.rounds - 2))
            loads.append(os.getloadavg()[0])
            out["models"][name] = found
            out["load_average"] = [round(x, 2) for x in loads]
            RESULTS.write_text(json.dumps(out, indent=1) + "\n")
            print(name, json.dumps(found, indent=1), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
