"""A real Jupyter for the tests that click."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adkit.viz import write_page
from adkit.viz.record import Record
from tests.e2e.lab import PATIENCE, Notebook, Server, open_notebook, serve


@pytest.fixture(scope="session", autouse=True)
def patient() -> None:
    """What is expected of a page may come late: other processes share the machine."""
    pytest.importorskip("playwright.sync_api").expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture(scope="session")
def jupyter_server(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Iterator[Server]:
    """A Jupyter server of our own, for JupyterLab and Notebook."""
    pytest.importorskip("jupyterlab")
    with serve(tmp_path_factory.mktemp("jupyter"), repo_root) as server:
        yield server


@pytest.fixture(scope="module")
def page_file(record: Record, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The standalone page of the module's ``record``."""
    return write_page(record, tmp_path_factory.mktemp("page") / "walk.html")


@pytest.fixture
def jupyter_lab(jupyter_server: Server, chromium) -> Iterator[Notebook]:
    """An empty notebook, open in JupyterLab, with its kernel started."""
    yield from _opened(jupyter_server, chromium, "lab")


@pytest.fixture
def jupyter_notebook(jupyter_server: Server, chromium) -> Iterator[Notebook]:
    """An empty notebook, open in Jupyter Notebook 7, with its kernel started."""
    pytest.importorskip("notebook")
    yield from _opened(jupyter_server, chromium, "notebook")


def _opened(server: Server, chromium, app) -> Iterator[Notebook]:
    page = chromium.new_page(viewport={"width": 1280, "height": 1500})
    page.set_default_timeout(1000 * PATIENCE)
    notebook = open_notebook(server, page, app)
    yield notebook
    notebook.close()
