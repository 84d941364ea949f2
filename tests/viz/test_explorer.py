"""The widget's Python side, the standalone page, comparison and export."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import traitlets
from pydantic import TypeAdapter
from torch.fx import Graph

from adkit.graph.step import PassInfo, Step
from adkit.viz import RecordError, compare, export, write_page
from adkit.viz.explorer import Explorer
from adkit.viz.exports import model_explorer
from adkit.viz.page import page
from adkit.viz.record import Record, RecordWriter, dump_record, parse_record
from adkit.viz.record.format import OPS, Costs, Rewrite, View
from adkit.viz.record.read import graph_rows
from adkit.viz.static import static_html, walk_svg
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
    with pytest.raises(
        KeyError, match="no step 'match_rmsnorm' in this record; did you mean 'match_rmsnorm_pattern'"
    ):
        explorer.goto("match_rmsnorm")
    with pytest.raises(traitlets.TraitError, match="no node with id"):
        explorer.selection = [10**9]
    with pytest.raises(traitlets.TraitError, match="no step 99"):
        explorer.step = 99


def test_goto_takes_what_python_holds(record: Record) -> None:
    explorer, steps = Explorer(record), sample("llama")
    step = steps["match_rmsnorm_pattern"]
    rewrite = step.rewrites[0]
    assert explorer.goto(step, step.after.nodes[-2]).selection == [step.after.nodes[-2].id]
    assert explorer.step_name == step.name
    assert explorer.goto("match_rmsnorm_pattern", rewrite.sites[1]).selection == list(
        rewrite.sites[1].created
    )
    assert explorer.goto(-3, rewrite).selection == [i for s in rewrite.sites for i in s.created]
    dropped = steps["strip_asserts"].rewrites[0].sites[0]
    assert explorer.goto("strip_asserts", dropped, compare_to="export_to_gm").selection == list(
        dropped.erased
    )
    assert explorer.goto("pattern_matcher").step_name == "match_moe_pattern"


def test_nodes_are_named_by_the_graphs_shown(record: Record) -> None:
    explorer, steps = Explorer(record), sample("llama", 4)
    before, after = (getattr(steps["match_rmsnorm_pattern"], side) for side in ("before", "after"))
    made = next(n for n in after if n.id not in before.by_id)
    gone = next(n for n in before if n.id not in after.by_id)
    assert explorer.goto("match_rmsnorm_pattern", made.name).selection == [made.id]
    explorer.selection = [after.nodes[0].id, made.name]
    assert explorer.selection == [after.nodes[0].id, made.id]
    explorer.selection = made.name
    assert explorer.selection == [made.id]
    # What a step erased is in the graph beside it alone.
    with pytest.raises(
        traitlets.TraitError, match=f"no node '{gone.name}' after step 'match_rmsnorm_pattern'; there is one"
    ):
        explorer.goto("match_rmsnorm_pattern", gone.name)
    assert explorer.goto("match_rmsnorm_pattern", gone.name, compare_to="export_to_gm").selection == [gone.id]
    explorer.against = -1
    explorer.selection = gone.name
    assert explorer.selection == [gone.id]
    for wrong, said in (
        (made.name + "x", f"after step 'match_rmsnorm_pattern'; did you mean '{made.name}'"),
        ([1.5], "1.5 is a float, no node: give an id, a name"),
        ([True], "True is a bool, no node"),
        (Graph().placeholder("x"), "no FX node 'x' here: this explorer was not made of an FX graph"),
    ):
        with pytest.raises(traitlets.TraitError, match=re.escape(said)):
            explorer.selection = wrong
    assert explorer.selection == [gone.id]


def test_an_overlay_added_is_shown(record: Record) -> None:
    explorer = Explorer(record.model_copy())
    explorer.add_overlay("mine", {record.nodes.id[0]: 2.0}, unit="x")
    assert explorer.overlay == "mine"
    assert [o["name"] for o in unpacked(explorer.overlays)] == ["mine"]
    assert parse_record(explorer.record).overlays == []  # the record is not sent again for it


def unpacked(data: bytes) -> Any:
    return json.loads(gzip.decompress(data))


def test_panes_from_python(record: Record) -> None:
    explorer = Explorer(record)
    names = [s.name for s in record.steps]
    explorer.panes = ["export_to_gm", "match_rmsnorm_pattern", -1]
    assert explorer.panes == [
        names.index("export_to_gm"),
        names.index("match_rmsnorm_pattern"),
        len(names) - 1,
    ]
    assert (explorer.mode, explorer.step) == ("compare", len(names) - 1)
    explorer.goto(2)  # takes the place of the pane that was looked at
    assert explorer.panes[2] == explorer.step == 2
    explorer.goto(explorer.panes[0])  # one of them already: only looked at
    assert len(set(explorer.panes)) == 3
    explorer.goto("match_rmsnorm_pattern", compare_to=1)
    assert (explorer.panes, explorer.against) == ([], 1)
    for wrong in ([1], [1, 1], [0, 1, 2, 3, 4]):
        with pytest.raises(traitlets.TraitError, match="2 to 4 different steps"):
            explorer.panes = wrong
    with pytest.raises(traitlets.TraitError, match="did you mean 'export_to_gm'"):
        explorer.panes = ["exports", "match_rmsnorm_pattern"]
    assert explorer.panes == []


def test_fold_state_and_search_are_readable_and_settable(record: Record) -> None:
    explorer = Explorer(record)
    assert explorer.unfolded is None
    explorer.unfolded = ["model", "model.layers", "model.layers.0"]
    explorer.set_state({"unfolded": ["model"], "search": "rmsnorm"})  # as the browser sends it
    assert (explorer.unfolded, explorer.search) == (["model"], "rmsnorm")
    with pytest.raises(traitlets.TraitError, match=r"no module 'model.layer'.*did you mean 'model.layers'"):
        explorer.unfolded = ["model.layer"]


class Wire:
    """What goes to the browser, and what the browser says."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.sent: list[tuple[dict[str, Any], Any]] = []
        explorer.send = lambda content, buffers=None: self.sent.append((content, buffers))  # type: ignore[method-assign]

    def ask(self, **content: Any) -> tuple[dict[str, Any], Any]:
        self.explorer._handle_custom_msg(content, [])
        return self.sent.pop()


def test_a_light_record_is_completed_part_by_part(record: Record) -> None:
    writer = RecordWriter(sample("llama", 4))
    explorer = Explorer(writer)
    light = parse_record(explorer.record)
    assert explorer.parts
    assert any(g.view is None for g in light.graphs)
    assert light.graphs[light.steps[explorer.step].after].view is not None, (
        "the first picture needs no asking"
    )
    wire = Wire(explorer)
    for k, g in enumerate(record.graphs):
        told, (data,) = wire.ask(want="view", index=k, edition=0)
        assert told == {"part": "view", "index": k, "edition": 0}
        light.graphs[k].view = View.model_validate(unpacked(data))
        assert light.graphs[k].view == g.view
    for k, s in enumerate(record.steps):
        _, (data,) = wire.ask(want="rewrites", index=k, edition=0)
        light.steps[k].rewrites = TypeAdapter(list[Rewrite]).validate_python(unpacked(data))
        assert light.steps[k].rewrites == s.rewrites
    _, (data,) = wire.ask(want="costs", edition=0)
    assert TypeAdapter(list[Costs]).validate_python(unpacked(data)) == record.costs


def test_a_part_that_fails_says_so_and_one_of_an_old_record_is_not_sent() -> None:
    explorer = Explorer(RecordWriter(sample("llama", 4)))
    wire = Wire(explorer)
    explorer._writer.view = lambda k: 1 / 0  # type: ignore[union-attr, method-assign]
    with pytest.raises(ZeroDivisionError):
        explorer._asked(explorer, {"want": "view", "index": 0, "edition": 0}, [])
    assert wire.sent.pop()[0]["failed"] == "ZeroDivisionError: division by zero"
    explorer._handle_custom_msg({"want": "view", "index": 0, "edition": 7}, [])
    assert wire.sent == []


def test_a_walk_that_went_on_is_made_anew_when_asked_for() -> None:
    steps = list(sample("llama", 4))
    half = len(steps) // 2
    made = [RecordWriter(steps[:half]), RecordWriter(steps)]
    explorer = Explorer(made[0], again=lambda: made[1])
    explorer.add_overlay("mine", {made[0].record.nodes.id[0]: 1.0})
    kept = made[0].record.nodes.id[0]
    explorer.selection = [kept]
    explorer.tell({"running": "x", "heads": []}, changed=True)
    assert explorer.live["edition"] == explorer.edition + 1
    assert len(parse_record(explorer.record).steps) == half
    Wire(explorer).explorer._handle_custom_msg({"want": "record"}, [])
    assert len(parse_record(explorer.record).steps) == len(steps)
    assert explorer.edition == explorer.live["edition"]
    assert explorer.step_name == [s.name for s in steps if s.changed][-1], (
        "who looked at the end does so again"
    )
    assert explorer.selection == [kept]
    assert [o["name"] for o in unpacked(explorer.overlays)] == ["mine"]


def test_where_no_widget_runs_there_are_a_table_and_a_map(record: Record) -> None:
    bundle, _ = Explorer(record)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/html"] == static_html(record)
    assert all(s.name in bundle["text/html"] for s in record.steps)
    assert bundle["image/svg+xml"] == walk_svg(record) in bundle["text/html"]


def test_the_static_map_draws_a_repeated_layer_once(record: Record) -> None:
    svg = ElementTree.fromstring(walk_svg(record))
    told = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "model" in told
    assert (
        sum(t.endswith("×3") and "DecoderLayer" in t for t in told if t)
        + sum(t.endswith("×4") and "DecoderLayer" in t for t in told if t)
        == 1
    )
    graph = record.graphs[record.steps[-1].after]
    calls = [
        record.targets[record.rows.target[r]].short
        for r in graph_rows(record)[-1]
        if OPS[record.rows.op[r]] == "call_function"
    ]
    assert {c for c in calls if "attention" in c} <= set(told)
    assert svg.attrib["role"] == "img"
    assert str(graph.size) in svg.attrib["aria-label"]
    assert walk_svg(hostile()).count("<script") == 0
    ElementTree.fromstring(walk_svg(hostile()))


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
    tab.set_default_timeout(90_000)
    errors: list[str] = []
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.goto(path.as_uri())
    tab.wait_for_selector("#adkit-explorer button")
    assert tab.title() == "calm"
    assert tab.evaluate("document.querySelectorAll('img').length") == 0
    assert errors == []
    tab.close()


# --- comparison and export


def test_files_are_compared_as_records(record: Record, tmp_path: Path) -> None:
    paths = [dump_record(r, tmp_path / f"{k}.json") for k, r in enumerate((record, make(3)))]
    assert compare(*paths).differences == compare(record, make(3)).differences != []
    with pytest.raises(RecordError, match="no record at"):
        compare(record, tmp_path / "missing.json")


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
