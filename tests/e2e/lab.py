"""A real Jupyter to click in: a server of our own, an open notebook whose cells run one by one.

Used by the end-to-end tests, ``benchmarks/explorer.py`` and ``scripts/screenshots.py``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

OVERRIDES = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # cells out of sight are drawn too
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}
#: Where an application of the server opens a notebook: JupyterLab, or Jupyter Notebook 7.
PATHS = {"lab": "lab/tree/{}?reset", "notebook": "notebooks/{}"}
_TRIES = 5  # that a server gets to come up: each port is free when it is chosen, and perhaps no more when it is used
#: Seconds until something that must come counts as missing; a busy machine needs many of them.
PATIENCE = 90


class Server:
    """A Jupyter server: its ``address``, and the folder of its notebooks."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address = address
        self._folder = folder
        self._made = 0

    def new_notebook(self) -> str:
        """An empty notebook's path. Each has a kernel of its own, so none finds what another has left."""
        self._made += 1
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = {"cells": [], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
        name = f"test-{self._made}.ipynb"
        (self._folder / name).write_text(json.dumps(notebook))
        return name


class Notebook:
    """An open notebook in a browser page: ``run(source)`` adds a cell, runs it and gives the cell's element."""

    def __init__(self, page) -> None:
        self.page = page

    def command(self, name: str, **args: object) -> None:
        """One of the application's commands."""
        self.page.evaluate("([n, a]) => window.jupyterapp.commands.execute(n, a)", [name, args])

    def run(self, source: str, *, wait: bool = True, seconds: float = PATIENCE):
        """Run code in a new cell at the end; returns its locator.

        RuntimeError with the traceback where it fails, unless nobody waits for its end.
        """
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
            failed = self.page.evaluate(
                """n => window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells[n].getOutputs()
                    .filter(o => o.output_type === "error").map(o => o.traceback.join("\\n"))""",
                cell,
            )
            if failed:
                raise RuntimeError("\n".join(failed))
        return located

    def expect(self, source: str, text: str) -> None:
        """Run code until what it shows has a text in it: what the browser sends may still be under way.

        AssertionError with what was shown instead.
        """
        end = time.monotonic() + PATIENCE
        while text not in (shown := self.run(source).locator(".jp-OutputArea").inner_text()):
            assert time.monotonic() < end, f"{source} shows {shown!r}, not {text!r}"
            self.page.wait_for_timeout(100)

    def theme(self, name: str) -> None:
        """``JupyterLab Light`` or ``JupyterLab Dark``; returns when the page has it."""
        self.command("apputils:change-theme", theme=name)
        self.page.wait_for_function(
            "name => document.body.dataset.jpThemeName === name", arg=name, timeout=1000 * PATIENCE
        )

    def close(self) -> None:
        """End the kernel and close the page."""
        try:
            self.page.evaluate("window.jupyterapp.serviceManager.sessions.shutdownAll()")
        finally:
            self.page.close()


def at_rest(element) -> dict[str, float]:
    """Where an element is (CSS pixels: x, y, width, height) once that has not changed for a while."""
    end = time.monotonic() + PATIENCE
    seen = [None] * 5
    while seen[0] is None or any(box != seen[0] for box in seen):
        assert time.monotonic() < end, f"it still moves: {seen}"
        element.page.wait_for_timeout(50)
        seen = [*seen[1:], element.bounding_box()]
    return seen[0]


@contextmanager
def serve(root: Path, repo_root: Path) -> Iterator[Server]:
    """A Jupyter server whose files are all in ``root``: it touches nobody's settings.

    Its kernels import adkit from ``repo_root``. Raises RuntimeError when it does not start.
    """
    (root / "work").mkdir()
    (root / "app").mkdir()
    (root / "app" / "overrides.json").write_text(json.dumps(OVERRIDES))
    log = root / "log"
    # Kernels are spoken to through sockets in the runtime folder, whose paths must be short; ports may be taken.
    with tempfile.TemporaryDirectory(prefix="jp") as runtime, log.open("w") as written:
        environment = {
            **os.environ,
            "JUPYTER_CONFIG_DIR": str(root / "config"),
            "JUPYTER_DATA_DIR": str(root / "data"),
            "JUPYTER_RUNTIME_DIR": runtime,
            "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
            "IPYTHONDIR": str(root / "ipython"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(repo_root), os.environ.get("PYTHONPATH")])),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        for _ in range(_TRIES):
            server = subprocess.Popen(
                [*_command(root), f"--port={_free_port()}"], env=environment,
                stdin=subprocess.DEVNULL, stdout=written, stderr=subprocess.STDOUT,
            )  # fmt: skip
            try:
                address = _address(server, Path(runtime))
                if address is not None:
                    yield Server(address, root / "work")
                    return
            finally:
                server.terminate()  # its kernels end with it
                try:
                    server.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()
        raise RuntimeError(f"Jupyter did not start:\n{log.read_text()[-3000:]}")


def _command(root: Path) -> list[str]:
    apps = ("LabApp", "JupyterNotebookApp")
    return [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
        "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--KernelManager.transport=ipc",
        *(f"--{app}.expose_app_in_browser=True" for app in apps),
        *(f"--{app}.app_settings_dir={root / 'app'}" for app in apps),
        f"--notebook-dir={root / 'work'}", "--LabServerApp.extra_labextensions_path=[]",
    ]  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _address(server: subprocess.Popen[bytes], runtime: Path) -> str | None:
    """Where a server answers, by its own word (its port might be somebody else's); None when it ended or is mute."""
    end = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < end:
        try:
            told = json.loads((runtime / f"jpserver-{server.pid}.json").read_text())
            address = f"http://127.0.0.1:{told['port']}"
            urllib.request.urlopen(f"{address}/api/status", timeout=5).close()
            return address
        except (
            OSError,
            ValueError,
            urllib.error.URLError,
        ):  # not yet written, half written, not yet listening
            time.sleep(0.1)
    return None


def open_notebook(server: Server, page, app: Literal["lab", "notebook"] = "lab") -> Notebook:
    """A new notebook of a server in a browser page, its kernel started."""
    page.goto(f"{server.address}/{PATHS[app].format(server.new_notebook())}", wait_until="domcontentloaded")
    for condition in (
        "window.jupyterapp !== undefined",
        "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
    ):
        page.wait_for_function(f"() => {condition}", timeout=1000 * PATIENCE)
    return Notebook(page)
