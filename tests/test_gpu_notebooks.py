"""Cells for a GPU are marked so that everybody else passes them over, and recording them touches nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError


@pytest.fixture(scope="module")
def script(repo_root: Path):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_notebooks", repo_root / "scripts" / "gpu_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells_for_a_gpu_have_both_tags_and_say_so(repo_root: Path, script):
    found = 0
    for folder in script.FOLDERS:
        for path in (repo_root / folder).glob("*.ipynb"):
            for cell in nbformat.read(path, as_version=4).cells:
                tags = set(cell.metadata.get("tags", []))
                marks = {"gpu" in tags, "nbval-skip" in tags, cell.source.startswith("# GPU\n")}
                assert len(marks) == 1, f"{path.name}: {cell.source[:60]!r} is marked half"
                found += marks == {True}
    assert found > 0


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """Two cells of which the second is for a GPU and needs the first."""
    cells = [
        nbformat.v4.new_code_cell("x = 20; print('here', x)"),
        nbformat.v4.new_code_cell("# GPU\nimport tempfile\nprint(x + 1, tempfile.gettempdir() + '/abc')\nx"),
    ]
    cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="as a CPU recorded it\n")]
    cells[1].metadata["tags"] = ["gpu", "nbval-skip"]
    cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="old\n")]
    path = tmp_path / "n.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.slow
def test_recording_takes_over_the_outputs_of_gpu_cells_alone(script, notebook):
    made = script.record(notebook, timeout=600)
    assert made.cells[0].outputs[0].text == "as a CPU recorded it\n"
    printed, value = made.cells[1].outputs
    assert printed.text == "21 TEMP\n"
    assert value.data["text/plain"] == "20"
    assert nbformat.read(notebook, as_version=4).cells[1].outputs[0].text == "old\n", "writing is not its job"
    nbformat.validate(made)


@pytest.mark.slow
def test_a_cell_that_fails_records_nothing(script, notebook, monkeypatch, capsys):
    source = notebook.read_text().replace("x + 1", "x + nothing")
    notebook.write_text(source)
    with pytest.raises(CellExecutionError, match="nothing"):
        script.record(notebook, timeout=600)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_notebooks.py", str(notebook)])
    assert script.main() == 1
    assert "left as it was" in capsys.readouterr().out
    assert notebook.read_text() == source


def test_without_a_gpu_it_says_what_to_do_instead(script, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_notebooks.py"])
    assert script.main() == 1
    assert "make notebooks" in capsys.readouterr().out


def test_outputs_lose_this_machines_paths_and_dead_widgets(script):
    out = nbformat.v4.new_output(
        "display_data", {"text/html": f"{script.ROOT}/adkit/x.py", script._WIDGET: {"model_id": "1"}}
    )
    assert script.scrubbed(out).data == {"text/html": "adkit/x.py"}
    assert script.shows(out)
    assert not script.shows(
        nbformat.v4.new_output("display_data", {script._WIDGET: {}, "text/plain": "HTML()"})
    )
    assert script.scrubbed("/opt/x/lib/python3/site-packages/torch/a.py:3") == "torch/a.py:3"
