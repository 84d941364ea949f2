"""The house's tools do what they promise: floors, make targets, the browser, the `dot` program."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOMS = ("graph", "contract", "ops", "viz", "models", "passes", "runtime", "workbench", "llm", "cli")
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"


@pytest.fixture
def house(repo_root: Path, tmp_path: Path) -> Path:
    """A package `adkit` of empty rooms, under the contracts of the real one."""
    shutil.copy(repo_root / "pyproject.toml", tmp_path)
    for room in ("", *ROOMS):
        folder = tmp_path / "adkit" / room
        folder.mkdir()
        (folder / "__init__.py").write_text("")
    return tmp_path


def check_contracts(house: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT_IMPORTS, "--no-cache"]
    environment = {"PYTHONPATH": str(house), "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=False)


def test_imports_of_lower_floors_are_allowed(house: Path):
    (house / "adkit" / "viz" / "svg.py").write_text("import adkit.graph\n")
    (house / "adkit" / "ops" / "norm.py").write_text("import adkit.contract\n")
    (house / "adkit" / "passes" / "fuse.py").write_text("import adkit.ops\nimport adkit.graph\n")
    (house / "adkit" / "workbench" / "core.py").write_text("import adkit.passes\nimport adkit.runtime\n")
    result = check_contracts(house)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("room", "imported"),
    [
        ("graph", "contract"),
        ("graph", "passes"),
        ("viz", "contract"),
        ("viz", "ops"),
        ("ops", "viz"),
        ("models", "passes"),
        ("runtime", "passes"),
        ("passes", "runtime"),
        ("workbench", "llm"),
    ],
)
def test_imports_of_the_same_or_a_higher_floor_are_refused(house: Path, room: str, imported: str):
    (house / "adkit" / room / "part.py").write_text(f"import adkit.{imported}\n")
    result = check_contracts(house)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout


def test_a_room_without_a_floor_is_refused(house: Path):
    (house / "adkit" / "attic.py").write_text("")
    result = check_contracts(house)
    assert result.returncode == 1
    assert "attic" in result.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_every_target(repo_root: Path):
    makefile = (repo_root / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony is not None
    listed = subprocess.run(["make"], cwd=repo_root, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"make ([a-z-]+) ", listed)) == set(phony.group(1).split())


@pytest.mark.browser
@pytest.mark.slow
def test_the_browser_renders_a_page(chromium):
    page = chromium.new_page()
    page.set_content("<p id='sum'></p><script>document.getElementById('sum').textContent = 27 + 45</script>")
    assert page.inner_text("#sum") == "72"
    page.close()


@pytest.mark.dot
def test_dot_draws():
    drawn = subprocess.run(
        ["dot", "-Tsvg"], input="digraph { a -> b }", capture_output=True, text=True, check=True
    )
    assert "<title>a&#45;&gt;b</title>" in drawn.stdout
