"""A real JupyterLab for the tests that click: server, browser, a notebook whose cells run one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.lab import Notebook, lab


@pytest.fixture(scope="session")
def jupyter_server(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Iterator[str]:
    """The address of a JupyterLab of our own, on a free port, that touches nobody's settings."""
    pytest.importorskip("jupyterlab")
    with lab(tmp_path_factory.mktemp("jupyter"), repo_root) as address:
        yield address


@pytest.fixture
def jupyter_lab(jupyter_server: str, chromium) -> Iterator[Notebook]:
    """An empty notebook, open, with its kernel started."""
    page = chromium.new_page(viewport={"width": 1280, "height": 1500})
    yield Notebook.open(page, jupyter_server)
    page.close()
