"""Saved runs: what comes back, and what a damaged file says."""

from __future__ import annotations

import json
import os

import pytest
import torch

import adkit
from adkit.contract import AdkitError
from adkit.saving import write_text
from adkit.viz import RecordError, load_record


@pytest.fixture(scope="module")
def wb(exported):
    return exported().run()


@pytest.fixture
def saved(wb, tmp_path):
    return wb.save(tmp_path / "run.json")


def test_everything_to_look_at_comes_back(wb, saved):
    run = adkit.Workbench.load(saved)
    assert run.name == wb.name
    assert run.steps.keys() == wb.steps.keys()
    for old, new in zip(wb.steps, run.steps, strict=True):
        assert (new.name, new.stage, new.status, new.info, new.doc) == (
            old.name,
            old.stage,
            old.status,
            old.info,
            old.doc,
        )
        assert repr(new) == repr(old)
        assert [repr(r) for r in new.rewrites] == [repr(r) for r in old.rewrites]
        assert (new.diff.created, new.diff.erased, new.diff.changed) == (
            old.diff.created,
            old.diff.erased,
            old.diff.changed,
        )
        assert new.explain() == old.explain()
    for old, new in (
        (wb.graph, run.graph),
        (wb.steps["match_linear"].before, run.steps["match_linear"].before),
    ):
        assert new.code() == old.code()
        assert [(n.id, n.target, n.module_path, str(n.source), n.origins) for n in new] == [
            (n.id, n.target, n.module_path, str(n.source), n.origins) for n in old
        ]
        assert [str(n.dtype) for n in new] == [str(n.dtype) for n in old]
    assert "SavedRun of 'tiny-llama'" in repr(run)
    assert adkit.__version__ == run.versions["adkit"]


def test_nothing_of_this_machine_is_inside(wb, saved, llama_dir):
    text = saved.read_text()
    for path in (str(llama_dir), os.path.dirname(torch.__file__), os.getcwd(), "site-packages"):
        assert path not in text
    assert "/tmp/" not in text


def test_a_failed_step_is_saved_without_paths(exported, tmp_path):
    class Fails(adkit.Pass):
        """Fail."""

        key = "fails"
        stage = adkit.Stage.POST_EXPORT

        def apply(self, gm, ctx):
            raise OSError(f"cannot read {tmp_path}/file")

    wb = exported().insert(Fails({"skip_on_error": True}))
    wb.run(until="fails")
    run = adkit.Workbench.load(wb.save(tmp_path / "run.json"))
    assert run.steps["fails"].status == "failed"
    assert str(tmp_path) not in (tmp_path / "run.json").read_text()


@pytest.mark.parametrize("damage", ["cut", "not json", "list", "missing", "operator", "size", "format"])
def test_a_damaged_file_is_one_clear_error(saved, damage):
    data = json.loads(saved.read_text())
    match damage:
        case "cut":
            text = saved.read_text()[:-100]
        case "not json":
            text = "\x00\x01"
        case "list":
            text = "[1, 2]"
        case "missing":
            del data["graphs"]["texts"]
        case "operator":
            next(r for r in data["graphs"]["records"] if "::" in str(r["target"]))["target"] = (
                "py::operator.methodcaller"
            )
        case "size":
            next(r for r in data["graphs"]["records"] if r["val"] and r["val"].get("shape"))["val"]["shape"][
                0
            ] = "s0("
        case "format":
            data["adkit_run"] = 2
    saved.write_text(text if damage in ("cut", "not json", "list") else json.dumps(data))
    with pytest.raises(AdkitError, match=r"run\.json (is not a run|was saved in format 2)"):
        adkit.Workbench.load(saved)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AdkitError, match="no saved run at"):
        adkit.Workbench.load(tmp_path / "none.json")
    with pytest.raises(AdkitError, match="cannot be read"):
        adkit.Workbench.load(tmp_path)


def test_a_record_is_not_taken_for_a_damaged_run(exported, tmp_path):
    with pytest.raises(AdkitError, match=r"walk\.json is a record.*written by wb\.save"):
        adkit.Workbench.load(exported().record(tmp_path / "walk.json"))


def test_a_run_is_not_taken_for_a_damaged_record(saved):
    with pytest.raises(RecordError, match=r"run\.json is a saved run, .* Workbench\.load\(path\) reads it"):
        load_record(saved)


def test_nothing_half_written_stays(wb, tmp_path, monkeypatch):
    target = tmp_path / "run.json"
    target.write_text("old")
    monkeypatch.setattr(
        os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(AdkitError, match="No space left"):
        wb.save(target)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]
    monkeypatch.undo()
    with pytest.raises(AdkitError, match="it is a folder"):
        wb.save(tmp_path)
    with pytest.raises(AdkitError, match="does not exist"):
        wb.save(tmp_path / "no" / "run.json")


def test_behind_a_symlink_the_file_itself_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/run.json")
    for text in ("first", "second"):  # the link leads nowhere at first
        assert write_text(tmp_path / "link", text) == tmp_path / "link"
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "far" / "run.json").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["far", "link"]
    assert os.listdir(tmp_path / "far") == ["run.json"]


def test_what_is_no_regular_file_is_written_into(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    reader = os.open(
        tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK
    )  # so that the writer need not wait for one
    try:
        for name in ("pipe", "link"):
            write_text(tmp_path / name, name)
            assert os.read(reader, 100) == name.encode()
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_a_function_of_the_notebook_cannot_be_saved_and_the_error_says_what_to_do(exported, tmp_path):
    def double(x):
        return x * 2

    class Inserts(adkit.Pass):
        """Call a plain function."""

        key = "inserts"
        stage = adkit.Stage.POST_EXPORT

        def apply(self, gm, ctx):
            n = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
            with self.site(gm, [n], label="double", before=n) as s:
                n.replace_input_with(n.args[0], s.call(double, (n.args[0],), like=n.args[0]))
            return adkit.PassInfo(num_matches=1)

    wb = exported().insert(Inserts).run(until="inserts")
    with pytest.raises(AdkitError, match=r"'inserts' cannot be saved.*torch\.library"):
        wb.save(tmp_path / "run.json")
    assert os.listdir(tmp_path) == []


def test_how_a_rank_was_cut_comes_back_and_cuts_again(exported, tmp_path):
    v = exported().shard(2, manual_config={"model.embed_tokens": "whole", "lm_head": "whole"})
    rank = v.ranks[1].wb
    saved = adkit.Workbench.load(rank.save(tmp_path / "rank.json"))
    assert saved.plan == v.plan
    assert saved.local == v.ranks[1].local
    assert saved.local["model.layers.0.self_attn.o_proj.weight"].cuts[0].dim == 1
    assert v.plan.summary in repr(saved)
    again = exported().shard(2, plan=saved.plan)
    assert again.plan == v.plan
    assert again.ranks[1].local == saved.local


def test_a_run_on_one_device_has_no_plan_and_names_what_was_fused(exported, tmp_path):
    wb = exported().enable("fuse_gemms").run()
    saved = adkit.Workbench.load(wb.save(tmp_path / "one.json"))
    assert (saved.plan, saved.local) == (None, {})
    qkv = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    assert tuple(qkv) in saved.fused.values()


def test_runs_that_were_saved_without_records_are_read(saved):
    data = json.loads(saved.read_text())
    del data["records"]
    saved.write_text(json.dumps(data))
    assert adkit.Workbench.load(saved).plan is None
