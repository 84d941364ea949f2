"""The standalone page of a small walk, open in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adkit.viz.record import Record, RecordWriter
from tests.e2e.lab import PATIENCE
from tests.graph.samples import sample


def tiny_llama() -> Record:
    """The whole record of four layers' walk, costs included."""
    writer = RecordWriter(sample("llama", 4))
    writer.record.name = "tiny llama"
    writer.costs()
    return writer.complete()


@contextmanager
def opened(browser, file: Path, **options: Any) -> Iterator:
    """A tab with the page drawn; AssertionError at the end if a script of it failed; ``options`` of a new page."""
    page = browser.new_page(viewport={"width": 1300, "height": 800}, **options)
    page.set_default_timeout(1000 * PATIENCE)
    errors: list[str] = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(file.as_uri())
    page.wait_for_selector(".adk-module")
    yield page
    assert errors == []
    page.close()


def button(page, name: str):
    """The button of that name."""
    return page.get_by_role("button", name=name, exact=True)
