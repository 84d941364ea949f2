"""A Workbench's record: what only the pipeline knows, overlays, and the explorer on it."""

from __future__ import annotations

import gc

import pytest

from adkit.contract import AdkitError, ConfigError
from adkit.viz import load_record


@pytest.fixture(scope="module")
def wb(exported):
    return exported().run()


def test_the_record_holds_the_pipeline(wb, tmp_path):
    record = load_record(wb.record(tmp_path / "walk.json.gz"))
    assert [s.name for s in record.steps] == wb.steps.keys()
    assert [s.status for s in record.steps] == [s.status for s in wb.steps]
    assert set(record.versions) == {"adkit", "torch", "transformers"}
    fused = {n.target for n in wb.graph if n.op == "get_attr"} & set(record.weights)
    assert fused
    source = record.steps[wb.steps.keys().index("match_rmsnorm_pattern")].source
    assert source is not None
    assert source.file == "adkit/passes/pattern_matcher/match_rmsnorm_pattern.py"
    assert (
        "class " in source.code.splitlines()[source.line - 1]
        or "@" in source.code.splitlines()[source.line - 1]
    )
    assert [c.name for c in record.costs] == ["prefill of 2048 tokens", "one token after 2048"]
    assert str(tmp_path.parent) not in record.model_dump_json()


def test_a_walk_half_done_is_a_record(exported, tmp_path):
    wb = exported().run("pattern_matcher")
    record = load_record(wb.record(tmp_path / "walk.json"))
    assert record.steps[-1].status == "pending"
    assert record.graphs[-1].size == len(wb.graph)


def test_overlays_are_those_given(wb, tmp_path):
    node = wb.graph.nodes[-1].id
    record = load_record(
        wb.record(tmp_path / "r.json", overlays={"mine": {node: 2}, "shard": {node: "rank 0"}})
    )
    assert [(o.name, o.scale, o.ids) for o in record.overlays] == [
        ("mine", "linear", [node]),
        ("shard", "words", [node]),
    ]
    with pytest.raises(ConfigError, match="overlay 'x'"):
        wb.record(tmp_path / "r.json", overlays={"x": 3})
    with pytest.raises(ConfigError, match="no device is called"):
        wb.record(tmp_path / "r.json", device="abacus")
    with pytest.raises(AdkitError, match=r"\.json"):
        wb.record(tmp_path / "r.txt")


def test_explore_starts_at_the_last_change(wb):
    explorer = wb.explore()
    assert explorer.step_name == [s.name for s in wb.steps if s.changed][-1]
    assert explorer.goto("fuse_gemms").step == wb.steps.keys().index("fuse_gemms")


def test_the_garbage_collector_gets_the_heap_back(wb):
    gc.unfreeze()
    wb.explore()
    with pytest.raises(ConfigError):
        wb.explore(device="abacus")
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        wb.explore()
        assert gc.get_freeze_count() > 0, "somebody else froze it"
    finally:
        gc.unfreeze()


def test_the_report_is_a_page_with_the_completions(wb, tmp_path):
    text = wb.report(tmp_path / "walk.html", [("Hello", " world")]).read_text()
    assert "<pre> world</pre>" in text


def test_a_file_that_cannot_be_written_is_one_clear_error(wb, tmp_path):
    (tmp_path / "x.json").mkdir()
    for write, path in ((wb.report, tmp_path), (wb.record, tmp_path / "x.json")):
        with pytest.raises(AdkitError, match="it is a folder; give a file name in it"):
            write(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdkitError, match=r"cannot write .*page\.html'"):
        wb.report(tmp_path / "file" / "page.html")
