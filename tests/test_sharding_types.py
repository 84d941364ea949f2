"""The page of what is cut, type by type: a row says what is cut, and takes the place of the row before."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def script(repo_root: Path):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(
        "sharding_types", repo_root / "scripts" / "sharding_types.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_counts_decisions_and_tells_what_was_in_the_way(script):
    def one(decision, why="", reduce=False):
        return SimpleNamespace(decision=decision, why=why, reduce=reduce)

    plan = [
        one("vocab", reduce=True), one("colwise"), one("colwise"), one("rowwise", reduce=True), one("follow"),
        one("whole", "router: every rank routes every token"), one("whole", "slice_4 is in the way: takes a slice"),
    ]  # fmt: skip
    line = script.line_of("some", plan, "1e-07")
    assert line == "| some | 2 colwise, 2 whole, 1 rowwise | 2 | 1e-07 | slice: takes a slice |"


def test_a_row_takes_the_place_of_the_one_before_and_others_stay(script):
    page = "# T\n\n| type | x |\n| --- | --- |\n| b | 1 |\n| d | 2 |\n\nend\n"
    assert script.put(page, "b", "| b | 9 |") == page.replace("| b | 1 |", "| b | 9 |")
    assert script.put(page, "c", "| c | 5 |") == page.replace("| d | 2 |", "| c | 5 |\n| d | 2 |")


def test_every_row_of_the_page_is_one_of_the_script(script):
    text = script.PAGE.read_text()
    assert script.put(text, "gpt2", next(x for x in text.splitlines() if x.startswith("| gpt2 |"))) == text
