"""scripts/check_leaks.py finds a machine's traces, lets ordinary text pass, and holds for this checkout."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def check_leaks(repo_root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_leaks", repo_root / "scripts" / "check_leaks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patterns(check_leaks: ModuleType) -> dict[str, str]:
    return check_leaks.machine_patterns(Path(path("seat", "desk", "adkit")))


def path(*parts: str) -> str:
    """An absolute path that this file does not itself contain."""
    return "/".join(["", *parts])


def findings(check_leaks: ModuleType, patterns: dict[str, str], file: Path, text: str) -> list[str]:
    file.write_text(text, encoding="utf-8")
    return list(check_leaks.find_leaks(file, patterns))


def notebook(*outputs: dict, source: str = "1", count: int | None = 1) -> str:
    code = {"cell_type": "code", "source": source, "execution_count": count, "outputs": list(outputs)}
    return json.dumps({"cells": [{"cell_type": "markdown", "source": ["# A walk"]}, code], "nbformat": 4})


def shows(**data: object) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": data}


def prints(text: str) -> dict:
    return {"output_type": "stream", "name": "stdout", "text": [text]}


@pytest.mark.parametrize(
    "leak",
    [
        path("home", "ada", "adkit", "x.py"),
        path("Users", "ada", "x.py"),
        path("root", ".cache", "huggingface"),
        path("tmp", "pytest-0", "x"),
        f"file://{path('home', 'ada', 'x.py')}",
        f"<td>{path('home', 'ada', 'x.py')}</td>",
        f"'{path('seat', 'desk', 'adkit', 'adkit', 'graph.py')}', line 3",
        path("seat", "other", "notes.md"),
        "https://" + path("index.example", "simple", "torch").lstrip("/"),
    ],
)
def test_traces_of_a_machine_are_found(check_leaks, patterns, tmp_path, leak):
    assert findings(check_leaks, patterns, tmp_path / "notes.md", f"see {leak} for more\n")


def test_hosts_of_the_package_index_are_found(check_leaks, patterns, tmp_path):
    hosts = check_leaks.index_hosts()
    if not hosts:
        pytest.skip("this pip does not say where it installs from")
    for host in hosts:
        assert findings(check_leaks, patterns, tmp_path / "notes.md", f"from https://{host}/project\n")


@pytest.mark.parametrize(
    "text",
    [
        "adkit/graph/diff.py and ../reference/autodeploy.md",
        "https://github.com/huggingface/transformers/tree/main/home/page",
        "model.layers/root/weight",
        "docs/tmp/x, ~/tmp/x, $HOME/x",
        "the seat at the desk",
        "path/seat/desk",
        "a simple/plain thing",
        "/usr/bin/env bash",
    ],
)
def test_ordinary_text_passes(check_leaks, patterns, tmp_path, text):
    assert findings(check_leaks, patterns, tmp_path / "notes.md", text) == []


def test_binary_files_pass(check_leaks, patterns, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"\0\1" + path("home", "ada", "x").encode())
    assert list(check_leaks.find_leaks(file, patterns)) == []


def test_notebook_that_ran_passes(check_leaks, patterns, tmp_path):
    text = notebook(prints("ok\n"), shows(**{"text/plain": ["<Step>"], "image/png": path("tmp", "abcd")}))
    assert findings(check_leaks, patterns, tmp_path / "walk.ipynb", text) == []


@pytest.mark.parametrize(
    "output",
    [
        prints(f"saved {path('home', 'ada', 'walk.html')}\n"),
        shows(**{"text/html": [f"<a href='{path('tmp', 'abc')}'>"]}),
        shows(**{"application/json": {"file": path("tmp", "abc")}}),
    ],
)
def test_notebook_outputs_are_searched(check_leaks, patterns, tmp_path, output):
    assert findings(check_leaks, patterns, tmp_path / "walk.ipynb", notebook(output))


def test_inlined_pictures_are_not_searched(check_leaks, patterns, tmp_path):
    html = f"<img src='data:image/png;base64,iVBORw0KGgo+{path('tmp', 'abcd')}=='>"
    text = notebook(shows(**{"text/html": html}))
    assert findings(check_leaks, patterns, tmp_path / "walk.ipynb", text) == []


def test_notebook_without_outputs_is_refused(check_leaks, patterns, tmp_path):
    (finding,) = findings(check_leaks, patterns, tmp_path / "walk.ipynb", notebook())
    assert "without outputs" in finding


def test_notebook_with_a_cell_that_never_ran_is_refused(check_leaks, patterns, tmp_path):
    (finding,) = findings(check_leaks, patterns, tmp_path / "walk.ipynb", notebook(prints("1"), count=None))
    assert "never run" in finding


def test_notebook_with_an_error_is_refused(check_leaks, patterns, tmp_path):
    error = {"output_type": "error", "ename": "KeyError", "evalue": "", "traceback": []}
    (finding,) = findings(check_leaks, patterns, tmp_path / "walk.ipynb", notebook(error))
    assert "KeyError" in finding


def test_exit_status_says_whether_there_was_a_finding(check_leaks, tmp_path, capsys):
    clean, leaking = tmp_path / "a.md", tmp_path / "b.md"
    clean.write_text("fine")
    leaking.write_text(path("home", "ada", "x"))
    assert check_leaks.main([str(clean)]) == 0
    assert check_leaks.main([str(clean), str(leaking)]) == 1
    assert "b.md: home folder" in capsys.readouterr().out


def test_this_checkout_carries_no_trace(check_leaks, capsys):
    try:
        check_leaks.tracked_files()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    assert check_leaks.main([]) == 0, capsys.readouterr().out
