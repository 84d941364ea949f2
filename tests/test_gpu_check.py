"""The check for machines with a GPU: it goes on where it stopped, keeps within its time, and tells what failed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forked_ranks import gone


@pytest.fixture(scope="module")
def script(repo_root: Path):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", repo_root / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(script, tmp_path, monkeypatch, capsys):
    """``check(pieces, *arguments)``: exit status, what was printed, what is on record."""

    def go(pieces, *arguments):
        monkeypatch.setattr(script, "pieces", lambda options: pieces)
        monkeypatch.setattr(
            sys, "argv", ["gpu_check.py", "--only", "tests", "--tiny", "--out", str(tmp_path), *arguments]
        )
        status = script.main()
        file = tmp_path / "h100_check.json"
        return (
            status,
            capsys.readouterr().out,
            json.loads(file.read_text())["pieces"] if file.exists() else {},
        )

    return go


def piece(script, name, code, **options):
    return script.Piece(f"tests:{name}", (sys.executable, "-c", code), 60, **options)


def test_what_passed_is_not_run_again_and_what_failed_is(script, check, tmp_path):
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    todo = [piece(script, "good", f"{note}('g')"), piece(script, "bad", f"{note}('b'); raise SystemExit(3)")]
    status, printed, found = check(todo)
    assert status == 1
    assert found["tests:good"]["passed"] is True
    assert (found["tests:bad"]["passed"], found["tests:bad"]["status"]) == (False, 3)
    assert "1 of 2 passed" in printed
    check(todo)
    assert (tmp_path / "ran").read_text() == "gbb"
    check(todo, "--fresh")
    assert (tmp_path / "ran").read_text() == "gbbgb"
    assert "raise SystemExit(3)" in (tmp_path / "h100_check.log").read_text()


def test_other_code_is_checked_anew(script, check, monkeypatch, tmp_path):
    todo = [piece(script, "good", f"open({str(tmp_path / 'ran')!r}, 'a').write('g')")]
    assert check(todo)[0] == 0
    monkeypatch.setattr(script, "code", lambda: "another")
    assert "with other code" in check(todo, "--list")[1]
    assert check(todo, "--list")[0] == 1
    assert check(todo)[0] == 0
    assert (tmp_path / "ran").read_text() == "gg"


def test_a_piece_that_hangs_is_stopped(script, check):
    hung = script.Piece("tests:hung", (sys.executable, "-c", "import time; time.sleep(600)"), 1)
    status, printed, found = check([hung])
    assert status == 1
    assert found["tests:hung"]["status"] == "took more than 1 s"
    assert "FAILED: took more than 1 s" in printed


def test_what_a_stopped_piece_started_ends_with_it(script, tmp_path):
    note = tmp_path / "pid"
    asleep = "import time; time.sleep(600)"
    child = f"""
import os, subprocess, sys, time
p = subprocess.Popen([sys.executable, "-c", {asleep!r}])
open({str(note)!r} + "~", "w").write(str(p.pid))
os.rename({str(note)!r} + "~", {str(note)!r})
{asleep}
"""
    process = subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    try:
        until(note.exists)
    finally:
        script.end(process)
    assert process.returncode == -9
    assert gone([int(note.read_text())])


def until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_time_nothing_is_begun(script, check):
    status, printed, found = check([piece(script, "good", "pass")], "--minutes", "0.1")
    assert (status, found) == (1, {})
    assert "no time left" in printed
    assert "not run" in printed


def test_tests_are_counted_and_those_that_failed_named(script, check, tmp_path):
    file = tmp_path / "test_three.py"
    file.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file))
    status, printed, found = check([script.Piece("tests", command, 60, counts=True)])
    row = found["tests"]
    assert status == 1
    assert [row[f"tests_{how}"] for how in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert "test_b" in row["failed"][0]
    assert "1 passed, 1 failed, 1 skipped" in printed
    command += ("-k", "test_c")
    assert check([script.Piece("tests", command, 60, counts=True)])[0] == 1, "what was skipped proves nothing"


def test_a_wrong_name_and_a_machine_without_a_gpu_are_told(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--only", "speeed"])
    with pytest.raises(SystemExit):
        script.main()
    assert (
        "nothing is called speeed; known: tests, kernels, accuracy, speed, kernels:"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(script, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert script.main() > 10
    assert "No CUDA device" in capsys.readouterr().out


def test_suites_and_the_tests_that_wrap_them_are_there(script, repo_root):
    for suite, test in script.SUITES.items():
        file, _, name = test.partition("::")
        wrapper = (repo_root / "tests" / "ops" / file).read_text()
        assert f"def {name}(" in wrapper
        assert f"{suite}.py" in wrapper
        assert (repo_root / "tests" / "ops" / f"{suite}.py").exists()
