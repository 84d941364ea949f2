"""A real JupyterLab for the tests that click."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.lab import Notebook, open_notebook, serve


@pytest.fixture(scope="session")
def jupyter_server(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Iterator[str]:
    """The address of a JupyterLab of our own."""
    pytest.importorskip("jupyterlab")
    with serve(tmp_path_factory.mktemp("jupyter"), repo_root) as address:
        yield address


@pytest.fixture
def jupyter_lab(jupyter_server: str, chromium) -> Iterator[Notebook]:
    """An empty notebook, open, with its kernel started."""
    page = chromium.new_page(viewport={"width": 1280, "height": 1500})
    yield open_notebook(jupyter_server, page)
    page.close()
