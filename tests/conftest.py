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
                executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=180_000
            )
        except sync_api.Error as error:
            first_line = str(error).strip().splitlines()[0]
            pytest.skip(f"needs a browser: run `make chromium` ({first_line})")
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny two-layer llama: float32, sensitive weights, no tokenizer. Not to be written
    to."""
    return _saved(tmp_path_factory, "llama")


@pytest.fixture(scope="session")
def exported(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """``exported(**options)``: a Workbench on that llama whose export comes from a pipeline cache, so it is
    quick."""
    import adkit

    root = tmp_path_factory.mktemp("cache")

    def make(model=llama_dir, **options):
        options = {"device": "cpu", "max_seq_len": 64, "page_size": 4, "progress": False, **options}
        extra = options.pop("config", {})
        cache = {
            "transforms": {"pipeline_cache": {"enabled": True, "root": str(root), "stage": "post_export"}}
        }
        return adkit.Workbench(model, config=[cache, extra], **options)

    make().run(until="post_export")
    return make


def _saved(factory: pytest.TempPathFactory, kind: str) -> Path:
    from tests.zoo import tiny

    folder = factory.mktemp(kind) / f"tiny-{kind}"
    tiny(kind)[1].save_pretrained(folder)
    return folder
