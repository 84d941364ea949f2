"""Pass registry, running order, and the pipeline cache."""

from __future__ import annotations

import json
import logging

import pytest
import torch

import adkit
from adkit.contract import ConfigError
from adkit.passes import Pass, Stage, all_passes, get_pass, register, registry
from adkit.passes.pipeline_cache import _code_of


def test_every_pass_is_listed_once_and_explains_itself():
    passes = all_passes()
    assert len(passes) >= 25
    for key, cls in passes.items():
        assert cls.key == key
        assert cls.__doc__
        assert cls().config.stage in Stage
    with pytest.raises(ConfigError, match="did you mean 'match_linear'"):
        get_pass("match_linea")


def test_registering_wants_a_key_a_stage_and_a_docstring(monkeypatch):
    monkeypatch.setattr(registry, "_PASSES", dict(registry._PASSES))
    with pytest.raises(TypeError, match="'key'"):
        register(type("NoKey", (Pass,), {"stage": Stage.EXPORT, "__doc__": "Text."}))
    with pytest.raises(TypeError, match="docstring"):
        register(type("NoDoc", (Pass,), {"key": "no_doc", "stage": Stage.EXPORT}))
    mine = type("Mine", (Pass,), {"key": "match_linear", "stage": Stage.PATTERN_MATCHER, "__doc__": "Mine."})
    register(mine)
    assert get_pass("match_linear") is mine


class Edited(adkit.Pass):
    """A pass that its user goes on working on."""

    key = "edited"
    stage = adkit.Stage.POST_EXPORT
    apply = lambda self, gm, ctx: adkit.PassInfo(num_matches=1)  # noqa: E731


class EditedAgain(Edited):
    """The same after an edit."""

    apply = lambda self, gm, ctx: adkit.PassInfo(num_matches=2)  # noqa: E731


EditedAgain.__qualname__ = Edited.__qualname__


def test_what_a_users_pass_does_is_part_of_the_cache_key():
    assert _code_of(Edited) != _code_of(EditedAgain)
    assert _code_of(Edited) == _code_of(Edited)


@pytest.fixture
def bench(llama_dir, tmp_path):
    def make(stage="pattern_matcher", model=llama_dir, **options):
        config = {
            "transforms": {
                "pipeline_cache": {"enabled": True, "root": str(tmp_path / "cache"), "stage": stage}
            }
        }
        return adkit.Workbench(
            model, config=config, device="cpu", max_seq_len=64, page_size=4, progress=False, **options
        )

    return make


@pytest.fixture
def exports(monkeypatch):
    import adkit.passes.export.export_to_gm as home

    calls = []
    original = home.export_model
    monkeypatch.setattr(home, "export_model", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def answer(wb):
    return wb.llm().generate([5, 6, 7], adkit.SamplingParams(max_tokens=8, logprobs=2), progress=False)


@pytest.mark.parametrize("stage", ["pattern_matcher", "cache_init"])
def test_a_second_run_starts_from_the_cache(bench, exports, stage, tmp_path):
    first = bench(stage).run()
    assert first.steps["pipeline_cache"].info.num_matches == 1
    expected = answer(first)
    exports.clear()
    second = bench(stage).run()
    assert exports == []
    assert second.steps["export_to_gm"].status == "skipped"
    assert "restored from the pipeline cache" in second.steps["export_to_gm"].info.reason
    assert answer(second) == expected
    assert [n.target_name for n in second.graph] == [n.target_name for n in first.graph]
    assert second.check().ok
    assert not list(tmp_path.rglob("*.pkl"))
    names = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {"graph.json", "constants.safetensors"}
    second.disable("match_linear").run()  # going back before the cache exports after all
    assert exports == [1]
    assert answer(second).token_ids == expected.token_ids


def test_another_model_setting_or_transform_is_another_entry(bench, exports, tmp_path):
    from tests.zoo import tiny_config

    bench().run(until="pattern_matcher")
    exports.clear()
    bench(overrides=["transforms.match_linear.enabled=false"]).run(until="pattern_matcher")
    bench(model=tiny_config("llama")).run(until="pattern_matcher")
    changed = bench()
    changed.insert(Edited).run(until="pattern_matcher")
    changed = bench()
    changed.insert(EditedAgain).run(until="pattern_matcher")
    assert len(exports) == 4
    bench(overrides=["transforms.fuse_gemms.enabled=false"]).run(until="pattern_matcher")
    assert len(exports) == 4, "what comes later does not matter"


@pytest.mark.parametrize("damage", ["graph", "constants"])
def test_a_damaged_entry_is_logged_and_made_again(bench, exports, caplog, tmp_path, damage):
    expected = answer(bench())
    entry = next((tmp_path / "cache").iterdir())
    if damage == "graph":
        (entry / "graph.json").write_text((entry / "graph.json").read_text()[:1000])
    else:
        (entry / "constants.safetensors").write_bytes(b"\x00")
    exports.clear()
    with caplog.at_level(logging.WARNING):
        wb = bench()
        assert answer(wb) == expected
    assert exports == [1]
    assert "cannot be read" in caplog.text
    assert "written again" in wb.steps["pipeline_cache"].log[0]
    json.loads((entry / "graph.json").read_text())
    exports.clear()
    assert answer(bench()) == expected
    assert exports == []


def test_a_cache_that_cannot_be_written_does_not_stop_the_run(bench, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    wb = bench().run()
    assert wb.steps["pipeline_cache"].status == "failed"
    assert answer(wb).token_ids


def test_changed_weights_are_not_stored_as_if_they_were_the_checkpoints(bench):
    class Halve(adkit.Pass):
        """Halve a norm."""

        key = "halve"
        stage = adkit.Stage.WEIGHT_LOAD

        def apply(self, gm, ctx):
            with torch.no_grad():
                gm.get_parameter("model.norm.weight").mul_(0.5)
            return adkit.PassInfo(num_matches=1)

    wb = bench("post_load_fusion").insert(Halve)
    wb.run(until="pipeline_cache")
    assert wb.steps["pipeline_cache"].status == "skipped"
    assert "model.norm.weight" in wb.steps["pipeline_cache"].info.reason
