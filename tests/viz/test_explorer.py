"""The widget's Python side, the standalone page, comparison and export."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import traitlets

from adkit.graph.step import PassInfo, Step
from adkit.viz import RecordError, compare, export, write_page
from adkit.viz.explorer import Explorer
from adkit.viz.exports import model_explorer
from adkit.viz.page import page
from adkit.viz.record import Record, RecordWriter, parse_record
from adkit.viz.record.read import graph_rows
from adkit.viz.static import static_html
from tests.graph.samples import sample


def make(layers: int = 4) -> Record:
    writer = RecordWriter(sample("llama", layers))
    writer.record.name = f"tiny {layers}"
    writer.costs()
    return writer.complete()


@pytest.fixture(scope="module")
def record() -> Record:
    return make()


def test_the_browser_gets_the_record_whole(record: Record) -> None:
    assert parse_record(Explorer(record).record) == record


def test_goto_and_selection(record: Record) -> None:
    explorer = Explorer(record)
    node = record.nodes.id[-1]
    explorer.goto("match_rmsnorm_pattern", node, compare_to=1)
    assert explorer.step_name == "match_rmsnorm_pattern"
    assert (explorer.selection, explorer.against, explorer.mode) == ([node], 1, "compare")
    seen: list[list[int]] = []
    explorer.observe(lambda change: seen.append(change["new"]), names="selection")
    explorer.set_state({"selection": [record.nodes.id[0]]})  # as the browser sends it
    assert seen == [[record.nodes.id[0]]]
    with pytest.raises(KeyError, match="no step 'match_rmsnorm' in this record; did you mean 'match_rmsnorm_pattern'"):
        explorer.goto("match_rmsnorm")
    with pytest.raises(traitlets.TraitError, match="no node with id"):
        explorer.selection = [10**9]
    with pytest.raises(traitlets.TraitError, match="no step 99"):
        explorer.step = 99


def test_an_overlay_added_is_shown(record: Record) -> None:
    explorer = Explorer(record.model_copy())
    explorer.add_overlay("mine", {record.nodes.id[0]: 2.0}, unit="x")
    assert explorer.overlay == "mine"
    assert [o.name for o in parse_record(explorer.record).overlays] == ["mine"]


def test_where_no_widget_runs_there_is_a_table(record: Record) -> None:
    bundle, _ = Explorer(record)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"] == static_html(record)
    assert all(s.name in bundle["text/html"] for s in record.steps)


def test_the_page_is_one_file_without_network(record: Record, tmp_path: Path) -> None:
    path = write_page(record, tmp_path / "walk.html", completions=[("What is <27>?", " 72")])
    text = path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["walk.html"]
    assert not re.search(r"(src|href)=.https?:", text)
    assert "What is &lt;27&gt;?" in text
    assert "script-src 'sha256-" in text


def test_a_page_that_fails_leaves_the_old_file(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "walk.html"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_page(record, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["walk.html"]


EVIL = "</script><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"


def hostile() -> Record:
    steps = [Step(EVIL, EVIL, {EVIL: EVIL}, EVIL, "failed", info=PassInfo(reason=EVIL)), *sample("llama")]
    record = RecordWriter(steps).complete()
    record.name = record.note = record.config = EVIL
    record.texts = [t + EVIL if t else t for t in record.texts]
    return parse_record(record.model_dump_json().encode())


def test_markup_in_names_stays_text() -> None:
    text = page(hostile(), completions=[(EVIL, EVIL)])
    assert "<img" not in text
    assert "<script>" not in text
    assert text.count("<script") == 2  # the record and the bundle


@pytest.mark.browser
@pytest.mark.slow
def test_nothing_in_a_hostile_record_runs(chromium, tmp_path: Path) -> None:
    path = write_page(hostile(), tmp_path / "evil.html", title="calm")
    tab = chromium.new_page()
    errors: list[str] = []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.goto(path.as_uri())
    tab.wait_for_selector("#adkit-explorer button")
    assert tab.title() == "calm"
    assert tab.evaluate("document.querySelectorAll('img').length") == 0
    assert errors == []
    tab.close()


# --- comparison and export


def test_equal_records_do_not_differ(record: Record) -> None:
    other = make()
    other.versions = {"torch": "9"}
    for s in other.steps:
        s.seconds += 1
    found = compare(record, other)
    assert not found
    assert "no difference" in repr(found)
    assert ("torch", "-", "9") in found.facts


def test_records_of_other_depth_differ(record: Record) -> None:
    found = compare(record, make(2), ("four", "two"))
    assert found
    assert ("match_rmsnorm_pattern: matches", "9", "5") in found.differences
    assert any(what == "program at the end" for what, _, _ in found.differences)


def test_model_explorer_gets_every_graph_with_its_edges(record: Record, tmp_path: Path) -> None:
    path = export(record, tmp_path / "x.json")
    data = json.loads(path.read_text())
    assert data == model_explorer(record)
    rows = graph_rows(record)
    assert [len(g["nodes"]) for g in data["graphs"]] == [len(r) for r in rows]
    last = {n["id"]: n for n in data["graphs"][-1]["nodes"]}
    for row in rows[-1]:
        node = last[str(record.rows.node[row])]
        assert [e["sourceNodeId"] for e in node["incomingEdges"]] == [str(i) for i in record.rows.inputs[row]]
        assert all(e["sourceNodeId"] in last for e in node["incomingEdges"])


@pytest.mark.dot
def test_dot_reads_what_is_exported(record: Record, tmp_path: Path) -> None:
    import subprocess

    path = export(record, tmp_path / "x.dot")
    done = subprocess.run(["dot", "-Tcanon", path], capture_output=True, text=True, check=True)
    rows = graph_rows(record)[-1]
    assert len(set(re.findall(r"^\s*n\d+\s+\[", done.stdout, re.M))) == len(rows)


def test_other_names_are_refused(record: Record, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"\.dot, or \.json"):
        export(record, tmp_path / "x.png")
