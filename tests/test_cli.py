"""The adkit command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings

import pytest
import yaml
from typer.testing import CliRunner

import adkit
from adkit import cli
from adkit.contract import Completion, Completions

SMALL = ["--set", "max_seq_len=64", "--set", "device=cpu"]


def call(*args):
    return CliRunner().invoke(cli.app, list(map(str, args)), catch_exceptions=True)


def main(monkeypatch, capsys, *args):
    """Exit status and stderr of the entry point."""
    monkeypatch.setattr(sys, "argv", ["adkit", *map(str, args)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


def test_run_prints_a_line_a_stage_and_writes_what_it_is_asked_for(llama_dir, tmp_path):
    fragment = tmp_path / "extra.yaml"
    fragment.write_text("transforms:\n  fuse_moe: {enabled: false}\n")
    report, record = tmp_path / "walk.html", tmp_path / "run.json"
    result = call(
        "run",
        llama_dir,
        *SMALL,
        "--set",
        "transforms.fuse_gemms.enabled=false",
        "--config",
        fragment,
        "--report",
        report,
        "--save",
        record,
    )
    assert result.exit_code == 0, result.output
    # stdout alone: on a slow machine bars come between, on stderr
    stages = [line[1:17].strip() for line in result.stdout.splitlines() if line.startswith("[")]
    assert stages == [s.value for s in adkit.Stage]
    assert "match_rmsnorm_pattern x5" in result.output
    assert "insert_cached_attention x2" in result.output
    assert report.read_text().startswith("<!")
    steps = adkit.Workbench.load(record).steps
    assert steps["fuse_gemms"].status == steps["fuse_moe"].status == "disabled"


def test_until_stops_and_a_prompt_needs_all(monkeypatch, capsys, llama_dir):
    result = call("run", llama_dir, *SMALL, "--until", "post_export")
    assert result.exit_code == 0
    assert "[post_export" in result.output
    assert "[pattern_matcher" not in result.output
    code, err = main(monkeypatch, capsys, "run", llama_dir, "--until", "export", "--prompt", "x")
    assert (code, err) == (1, "adkit: --prompt needs the whole pipeline: leave out --until\n")


def test_passes_lists_and_explains(monkeypatch, capsys):
    result = call("passes")
    lines = result.output.splitlines()
    assert len(lines) >= 25
    assert any(line.startswith("pattern_matcher   match_rmsnorm_pattern") for line in lines)
    text = call("passes", "export_to_gm").output
    assert "stage export" in text
    assert "before:" in text
    assert "attention" in text
    assert "= 'interface'" in text
    code, err = main(monkeypatch, capsys, "passes", "export_gm")
    assert code == 1
    assert "did you mean 'export_to_gm'" in err


def test_config_prints_what_can_be_given_back(tmp_path):
    first = call("config", "demo", *SMALL)
    assert yaml.safe_load(first.output)["max_seq_len"] == 64
    path = tmp_path / "again.yaml"
    path.write_text(first.output)
    assert call("config", "demo", "--config", path).output == first.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "lama-3.1-8b"], "did you mean 'llama-3.1-8b'"),
        (["run", "demo", "--until", "exprt"], "did you mean 'export'"),
        (["run", "demo", "--set", "max_seq_len=0"], "max_seq_len = 0"),
        (["run", "demo", "--set", "transforms.fuse_gems.enabled=false"], "did you mean 'fuse_gemms'"),
        (["run", "demo", "--set", "oops"], "not of the form a.b.c=value"),
        (["run", "demo", "--config", "nowhere.yaml"], "no configuration file 'nowhere.yaml'"),
        (["run", "llama-3.2-1b", "--until", "factory", "--save", "/no/such/folder/x.json"], "does not exist"),
        (["config", "qwen3-8c"], "did you mean 'qwen3-8b'"),
        (["run", "demo", "--prompt", ""], "--prompt is empty"),
        (["run", "demo", "--prompt", "x", "--max-tokens", "0"], "max_tokens is 0"),
    ],
)
def test_an_error_is_one_line_and_status_1(monkeypatch, capsys, args, message):
    code, err = main(monkeypatch, capsys, *args)
    assert code == 1
    assert err.startswith("adkit: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--report", "", "is a folder; give a file name in it"),
        ("--save", "", "is a folder; give a file name in it"),
        ("--save", "no/such/run.json", "its folder does not exist"),
        ("--record", "walk.txt", "must end in .json or .json.gz"),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_runs(
    monkeypatch, capsys, tmp_path, option, name, message
):
    monkeypatch.setattr(adkit.Workbench, "__init__", lambda *a, **kw: pytest.fail("it began to work"))
    status, error = main(monkeypatch, capsys, "run", "demo", option, tmp_path / name)
    assert status == 1
    assert message in error
    assert len(error.splitlines()) == 1


def test_an_interrupt_is_told_in_a_line(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(adkit.Workbench, "__init__", interrupted)
    assert main(monkeypatch, capsys, "run", "demo") == (130, "adkit: interrupted\n")


def test_a_prompt_without_weights_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(adkit.Workbench, "run", None)
    code, err = main(monkeypatch, capsys, "run", "llama-3.1-405b", "--prompt", "x")
    assert code == 1
    assert "has none" in err
    assert "--random-weights" in err


@pytest.mark.filterwarnings("error")
def test_a_prompt_without_a_tokenizer_is_refused_before_anything_runs(
    monkeypatch, capsys, llama_dir, tmp_path
):
    monkeypatch.setattr(adkit.Workbench, "run", None)
    status, error = main(monkeypatch, capsys, "run", llama_dir, *SMALL, "-p", "hi")
    assert status == 1
    assert "has no tokenizer files (tokenizer.json and the like)" in error
    assert error.endswith("or leave out --prompt\n")
    assert len(error.splitlines()) == 1
    broken = shutil.copytree(llama_dir, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    status, error = main(monkeypatch, capsys, "run", broken, *SMALL, "-p", "hi")
    assert status == 1
    assert "--prompt needs a tokenizer, and the tokenizer in" in error
    assert "cannot be read" in error


@pytest.mark.filterwarnings("error")
def test_a_model_that_makes_nan_is_an_error(monkeypatch, capsys, exported, tmp_path):
    def failed(prompts, *args, **options):
        # what a prompt comes to whose logits are not finite (tests/runtime has the engine's part)
        warnings.warn(f"1 of {len(prompts)} requests failed; ...", stacklevel=2)
        fine = Completion("fine", (5,), "stop")
        return Completions([fine, Completion("", (), "error", error="logits were not finite")])

    wb = exported()
    monkeypatch.setattr(adkit, "Workbench", lambda **settings: wb)
    monkeypatch.setattr(wb.factory, "tokenizer", lambda: None)
    monkeypatch.setattr(wb.llm(), "generate", failed)
    monkeypatch.setattr(wb.factory, "tokenizer", object)
    record = tmp_path / "run.json"
    status, error = main(monkeypatch, capsys, "run", "x", "-p", "a", "-p", "b", "--save", record)
    assert (status, error) == (1, "adkit: 1 of 2 prompts failed: logits were not finite\n")
    assert record.exists()


@pytest.mark.slow
def test_as_a_process(llama_dir):
    command = [
        sys.executable,
        "-c",
        "from adkit.cli import main; main()",
        "run",
        str(llama_dir),
        *SMALL,
        "--until",
        "export",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "[export" in done.stdout


def test_records_are_written_compared_and_viewed(monkeypatch, capsys, llama_dir, tmp_path):
    one, two = tmp_path / "one.json.gz", tmp_path / "two.json"
    assert call("run", llama_dir, *SMALL, "--record", one).exit_code == 0
    assert (
        call(
            "run", llama_dir, *SMALL, "--set", "transforms.match_linear.enabled=false", "--record", two
        ).exit_code
        == 0
    )
    same = call("diff", one, one)
    assert same.exit_code == 0
    assert "no difference" in same.output
    other = call("diff", one, two)
    assert other.exit_code == 1
    assert "match_linear: status" in other.output
    page, graphs = tmp_path / "one.html", tmp_path / "graphs.json"
    assert call("view", one, "--no-browser").exit_code == 0
    assert page.read_text().startswith("<!")
    assert call("view", one, "--out", graphs).exit_code == 0
    assert '"graphs"' in graphs.read_text()
    # An export never takes the place of what it is made from.
    kept = two.read_bytes()
    code, err = main(monkeypatch, capsys, "view", two, "--out", tmp_path / "." / "two.json")
    assert code == 1
    assert "is the record itself" in err
    assert two.read_bytes() == kept
