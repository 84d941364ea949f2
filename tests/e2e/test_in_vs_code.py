"""What VS Code puts around an output, its theme's classes and colours, and how adkit's outputs look in it.

The editor itself is not here (docs/explorer.md, "VS Code", says what was tried by hand).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adkit.graph.display import html_of
from adkit.viz import write_page
from adkit.viz.record import RecordWriter
from adkit.viz.static import static_html
from tests.e2e.axe import violations
from tests.graph.samples import sample

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]

NAMES = (
    "editor-background", "editor-foreground", "descriptionForeground", "panel-border", "editorWidget-background",
    "textLink-foreground", "errorForeground", "terminal-ansiGreen",
)  # fmt: skip
#: Classes of the body, and the theme's colours of those names.
THEMES = {
    "vscode-light": "#ffffff #3b3b3b #3b3b3b #e5e5e5 #f8f8f8 #005fb8 #c62626 #107c10",
    "vscode-dark": "#1f1f1f #cccccc #9d9d9d #2b2b2b #202020 #4daafc #f85149 #0dbc79",
    "vscode-high-contrast": "#000000 #ffffff #ffffff #6fc3df #0c141f #21a6ff #f48771 #00cd00",
    "vscode-high-contrast vscode-high-contrast-light": (
        "#ffffff #292929 #292929 #0f4a85 #ffffff #0f4a85 #b5200d #136c13"
    ),
}
#: What ipywidgets' style sheet says everywhere once a widget was shown.
LIGHT = "--jp-ui-font-color1:rgba(0,0,0,.87);--jp-ui-font-color2:rgba(0,0,0,.54);--jp-layout-color1:#fff"


@pytest.fixture
def tab(chromium):
    page = chromium.new_page(color_scheme="dark")  # of the system, which the editor's theme overrules
    yield page
    page.close()


@pytest.mark.parametrize("theme", THEMES)
def test_html_is_readable_in_every_theme(tab, theme: str) -> None:
    steps = sample("llama", 4)
    step = steps["match_rmsnorm_pattern"]
    shown: list[Any] = [steps, step, step.after]
    html = "".join(str(html_of(x)) for x in shown) + static_html(RecordWriter(steps).complete())
    colours = dict(zip(NAMES, THEMES[theme].split(), strict=True))
    variables = ";".join(f"--vscode-{name}:{colour}" for name, colour in colours.items())
    ground, text = colours["editor-background"], colours["editor-foreground"]
    tab.set_content(
        f"<!doctype html><html lang=en style='{variables};{LIGHT}'><title>outputs</title>"
        f"<body class='{theme}' style='background:{ground};color:{text}'><main>{html}</main>"
    )
    assert [v for v in violations(tab, "main") if v.startswith("color-contrast")] == []


def test_the_explorer_follows_the_editors_theme(tab, tmp_path: Path) -> None:
    tab.goto(write_page(RecordWriter(sample("llama", 4)).complete(), tmp_path / "walk.html").as_uri())
    dark = tab.locator(".adk-root.adk-dark")
    expect(dark).to_have_count(1)
    for theme in THEMES:
        tab.evaluate("theme => { document.body.className = theme; }", theme)
        expect(dark).to_have_count(int(theme in ("vscode-dark", "vscode-high-contrast")))
