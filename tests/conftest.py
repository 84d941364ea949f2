"""What every test shares: markers and the machine they need, one torch thread a worker, hypothesis."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import hypothesis
import pytest

MARKERS = {
    "slow": "takes more than about two seconds; left out of `make test-fast`",
    "gpu": "needs a CUDA device",
    "browser": "drives a real browser (take the `chromium` fixture)",
    "dot": "needs Graphviz's `dot` program",
}

hypothesis.settings.register_profile("adkit", deadline=None)
hypothesis.settings.load_profile("adkit")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say what would make it run."""
    wanted = {marker.name for item in items for marker in item.iter_markers()}
    reasons: dict[str, str] = {}
    if "gpu" in wanted and not _has_cuda():
        reasons["gpu"] = "needs a CUDA device"
    if "dot" in wanted and shutil.which("dot") is None:
        reasons["dot"] = "needs Graphviz's `dot`: run `make graphviz`"
    for item in items:
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout under test."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def chromium():
    """A headless browser: the system's chromium, or the one that playwright installed for itself."""
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            # Containers run as root and have a small /dev/shm; chromium refuses both unless told.
            browser = playwright.chromium.launch(
                executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
        except sync_api.Error as error:
            first_line = str(error).strip().splitlines()[0]
            pytest.skip(f"needs a browser: run `make chromium` ({first_line})")
        yield browser
        browser.close()
