"""A real JupyterLab to click in: a server of our own, an open notebook whose cells run one by one.

Used by the end-to-end tests and by ``benchmarks/explorer.py``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OVERRIDES = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # cells out of sight are drawn too
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}


class Notebook:
    """An open notebook in a browser page: ``run(source)`` adds a cell, runs it and gives the cell's element."""

    def __init__(self, page) -> None:
        self.page = page

    def command(self, name: str, **args: object) -> None:
        """One of JupyterLab's commands."""
        self.page.evaluate("([n, a]) => window.jupyterapp.commands.execute(n, a)", [name, args])

    def run(self, source: str, *, wait: bool = True, seconds: float = 60):
        """Run code in a new cell at the end; returns its locator."""
        cell = self.page.evaluate(
            """source => {
                const notebook = window.jupyterapp.shell.currentWidget.content;
                const at = notebook.model.sharedModel.cells.length;
                notebook.model.sharedModel.insertCell(at, {cell_type: "code", source});
                notebook.deselectAll();
                notebook.activeCellIndex = at;
                window.jupyterapp.commands.execute("notebook:run-cell");
                return at;
            }""",
            source,
        )
        located = self.page.locator(".jp-Cell").nth(cell)
        if wait:
            self.page.wait_for_function(
                "n => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells[n].execution_count",
                arg=cell,
                timeout=1000 * seconds,
            )
        return located

    def theme(self, name: str) -> None:
        """``JupyterLab Light`` or ``JupyterLab Dark``."""
        self.command("apputils:change-theme", theme=name)
        self.page.wait_for_timeout(500)


@contextmanager
def serve(root: Path, repo_root: Path) -> Iterator[str]:
    """The address of a JupyterLab on a free port whose files are all in ``root``: it touches nobody's settings.

    Its kernels import adkit from ``repo_root``. Raises RuntimeError when it does not start.
    """
    notebook = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    notebook["metadata"] = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
    }
    (root / "work").mkdir()
    (root / "work" / "test.ipynb").write_text(json.dumps(notebook))
    (root / "app").mkdir()
    (root / "app" / "overrides.json").write_text(json.dumps(OVERRIDES))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    environment = {
        **os.environ,
        **{f"JUPYTER_{name}": str(root / name.lower()) for name in own},
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "IPYTHONDIR": str(root / "ipython"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(repo_root), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True",
        f"--LabApp.app_settings_dir={root / 'app'}", f"--notebook-dir={root / 'work'}",
        "--LabServerApp.extra_labextensions_path=[]",
    ]  # fmt: skip
    log = (root / "log").open("w")
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(
                        f"JupyterLab did not start:\n{(root / 'log').read_text()[-3000:]}"
                    ) from None
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()  # its kernels end with it
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def open_notebook(address: str, page) -> Notebook:
    """The empty notebook of a server in a browser page, its kernel started."""
    page.goto(f"{address}/lab/tree/test.ipynb?reset", wait_until="domcontentloaded")
    page.wait_for_function("() => window.jupyterapp !== undefined", timeout=60_000)
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
        timeout=60_000,
    )
    return Notebook(page)
