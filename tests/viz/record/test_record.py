"""The record: nothing of the walk is lost, what is wrong with a file is one clear error, the schema is current."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adkit.graph.code import lines
from adkit.graph.history import History
from adkit.graph.step import Step, Steps
from adkit.viz.record import Record, RecordError, RecordWriter, dump_record, load_record, parse_record
from adkit.viz.record.read import graph_rows
from adkit.viz.record.schema import PATH, schema_text
from adkit.viz.record.splice import apply_splices, rising, runs, splices
from tests.graph.samples import sample


@pytest.fixture(scope="module")
def steps() -> Steps:
    return sample("llama")


@pytest.fixture(scope="module")
def record(steps: Steps) -> Record:
    writer = RecordWriter(steps)
    writer.record.name = "tiny"
    writer.costs()
    return writer.complete()


def test_every_graph_comes_back_node_by_node(steps: Steps, record: Record) -> None:
    rows = graph_rows(record)
    for s, told in zip(steps, record.steps, strict=True):
        graph = rows[told.after] if told.after >= 0 else []
        assert [record.rows.node[r] for r in graph] == [n.id for n in s.after]
        assert [record.rows.inputs[r] for r in graph] == [n.inputs() for n in s.after]
        assert [record.texts[record.rows.name[r]] for r in graph] == [n.name for n in s.after]
        assert [record.targets[record.rows.target[r]].name for r in graph] == [n.target_name for n in s.after]
        shapes = [record.values[record.rows.value[r]].shape for r in graph]
        assert shapes == [None if n.shape is None else list(n.shape) for n in s.after]


def test_what_a_step_did_is_what_its_diff_says(steps: Steps, record: Record) -> None:
    for k, s in enumerate(steps):
        told = record.steps[k]
        if not len(s.before):
            continue
        born = [i for i, b in zip(record.nodes.id, record.nodes.born, strict=True) if b == k]
        gone = [i for i, g in zip(record.nodes.id, record.nodes.gone, strict=True) if g == k]
        assert sorted(s.diff.created) == born
        assert sorted(s.diff.erased) == gone
        assert sorted(s.diff.changed) == told.changed
        assert (told.created, told.erased) == (len(born), len(gone))
        assert told.rewrites is not None
        assert [r.text for r in told.rewrites] == [str(r) for r in s.rewrites]
        for r, w in zip(s.rewrites, told.rewrites, strict=True):
            assert list(w.erased_ids) == [list(x.erased) for x in r.sites]
            assert list(w.created_ids) == [list(x.created) for x in r.sites]
            assert w.picture is not None
            assert {b.id for b in w.picture.boxes if b.mark == "created"} <= set(r.sites[0].created) | {-1}


def test_origins_lead_to_the_lines_that_history_names(steps: Steps, record: Record) -> None:
    history = History(steps)
    place = {i: k for k, i in enumerate(record.nodes.id)}
    source = dict(zip(record.rows.node, record.rows.source, strict=True))
    for n in [s for s in steps if len(s.after)][-1].after:
        roots, todo = set(), [n.id]
        while todo:
            i = todo.pop()
            above = record.nodes.origins[place[i]]
            todo += above
            if not above:
                roots.add(i)
        assert sorted(roots) == [r.id for r in history.roots(n.id)]
        for r in history.roots(n.id):
            if r.source is not None:
                t, at = record.sources, source[r.id]
                assert (record.texts[t.file[at]], t.line[at]) == (r.source.file, r.source.line)


def test_source_lines_stand_between_their_neighbours(steps: Steps, record: Record) -> None:
    t = record.sources
    assert t.file
    for code, line, context, first in zip(t.code, t.line, t.context, t.first, strict=True):
        shown = record.texts[context].split("\n")
        assert shown[line - first].strip() == record.texts[code]
        assert (first, len(shown)) == (line - 1, 3)


def test_a_record_of_version_1_is_read(record: Record) -> None:
    old = record.model_dump(mode="json") | {"adkit_record": 1}
    del old["sources"]["context"], old["sources"]["first"]
    read = parse_record(json.dumps(old).encode())
    assert (read.adkit_record, read.sources.context, read.rows) == (1, [], record.rows)
    with pytest.raises(RecordError, match="columns of sources"):
        parse_record(json.dumps(old | {"adkit_record": 2}).encode())


def test_folding_and_program_are_those_of_the_graph(steps: Steps, record: Record) -> None:
    s = [x for x in steps if len(x.after)][-1].after
    view = record.graphs[-1].view
    assert view is not None
    assert [(x.depth, x.text, x.comment) for x in view.code] == [
        (x.depth, x.text, x.comment) for x in lines(s)
    ]

    def spread(flat: list[int]) -> list[int]:
        return [s.nodes[p].id for a, n in zip(flat[::2], flat[1::2], strict=True) for p in range(a, a + n)]

    for told, real in zip(view.folding, s.folding, strict=True):
        assert spread(told.nodes) == list(real.nodes)
        for blocks, variant in zip(told.variants, real.variants, strict=True):
            assert [spread(b.nodes) for b in blocks] == [list(b.nodes) for b in variant.blocks]
            assert [spread(b.leaves) for b in blocks] == [list(b.leaves) for b in variant.blocks]


def test_costs_are_those_of_the_cost_model(steps: Steps, record: Record) -> None:
    from adkit.graph.cost import node_costs

    s = [x for x in steps if len(x.after)][-1].after
    expected = node_costs(s, "H100 SXM", {"batch": 1, "seq": 2048})
    (costs,) = record.costs  # a graph of whole prompts has no single-token workload
    for row in graph_rows(record)[-1]:
        node = record.rows.node[row]
        if node in expected:
            flops, moved, micro, bound = costs.table[costs.rows[row]]
            assert (flops, moved, bound) == (expected[node].flops, expected[node].bytes, expected[node].bound)
            assert micro == pytest.approx(expected[node].seconds * 1e6, rel=1e-5)


@pytest.mark.parametrize("name", ["r.json", "r.json.gz"])
def test_a_record_comes_back_from_a_file(record: Record, tmp_path: Path, name: str) -> None:
    path = dump_record(record, tmp_path / name)
    assert load_record(path) == record
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith("gz")


def test_the_schema_in_the_package_is_current_and_holds(record: Record) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert PATH.read_text() == schema_text()
    jsonschema.Draft202012Validator(json.loads(PATH.read_text())).validate(
        json.loads(record.model_dump_json())
    )


# --- damaged and hostile files


def test_what_is_no_record_is_told(tmp_path: Path, record: Record) -> None:
    with pytest.raises(RecordError, match="no record at"):
        load_record(tmp_path / "missing.json")
    for data, said in (
        (b"", "cut short"),
        (b"[1]", "no adkit_record"),
        (b'{"adkit_run": 1}', "saved run"),
        (b'{"adkit_record": 3, "name": "x"}', "version '3'; this version of adkit reads 1 and 2"),
        (b'{"adkit_record": 1, "name": 3}', "name"),
        (b'{"adkit_record": 1, "name": "x", "more": 1}', "more"),
        (b"[" * 100_000, "not a record"),
        (b"\x1f\x8bnonsense", "damaged"),
        (b"\xff\xfe\x00", "not a record"),
    ):
        with pytest.raises(RecordError, match=said):
            parse_record(data)
    packed = gzip.compress(record.model_dump_json().encode())
    with pytest.raises(RecordError, match="cut short"):
        parse_record(packed[:-20])
    with pytest.raises(RecordError, match="cut short"):
        parse_record(record.model_dump_json().encode()[:-20])


def test_a_bomb_is_not_unpacked() -> None:
    with pytest.raises(RecordError, match="unpacks to more than 1,000 bytes"):
        parse_record(gzip.compress(b" " * 1_000_000), most_bytes=1000)


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(b" " * 2000)
    with pytest.raises(RecordError, match="larger than 1,000"):
        load_record(tmp_path / "r.json", most_bytes=1000)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("rows", "name", 0), 10**6, "texts"),
        (("rows", "target", 0), 10**6, "targets"),
        (("rows", "inputs", "starts", 1), 10**6, "starts"),
        (("graphs", 1, "base"), 3, "later one"),
        (("graphs", 1, "size"), 3, "rows, not the 3"),
        (("graphs", 1, "splices", 0, "drop"), 10**6, "beyond its end"),
        (("graphs", 0, "view", "folding", 0, "nodes"), [0, 10**6], "outside its graph"),
        (("steps", 1, "after"), 99, "graphs"),
        (("costs", 0, "rows"), [1], "another number of rows"),
        (("modules", "parent", 1), 5, "before its parent"),
        (("nodes", "id", 0), 1, "twice"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(
    record: Record, path: tuple[Any, ...], value: Any, said: str
) -> None:
    data = json.loads(record.model_dump_json())
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(RecordError, match=said):
        parse_record(json.dumps(data).encode())


@given(st.data())
@settings(max_examples=60)
def test_any_single_damage_is_an_error_or_harmless(record: Record, data: st.DataObject) -> None:
    raw = bytearray(record.model_dump_json().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse_record(bytes(raw))
    except RecordError:
        return
    assert sum(len(rows) for rows in graph_rows(found)) == sum(g.size for g in found.graphs)


# --- pieces


@given(st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 30), unique=True))
def test_splices_turn_one_list_into_the_other(old: list[int], new: list[int]) -> None:
    edits = splices(old, new)
    assert apply_splices(old, edits) == new
    kept = len(set(old) & set(new))
    assert sum(len(e.rows) for e in edits) >= len(new) - kept


@given(st.lists(st.integers(0, 1000), unique=True, max_size=12))
def test_the_longest_rising_part_is_longest(numbers: list[int]) -> None:
    found = rising(numbers)
    values = [numbers[k] for k in found]
    assert values == sorted(values)
    assert found == sorted(found)
    best = [0] * len(numbers)
    for k, n in enumerate(numbers):
        best[k] = 1 + max([best[j] for j in range(k) if numbers[j] < n], default=0)
    assert len(found) == max(best, default=0)


@given(st.lists(st.integers(0, 40), unique=True))
def test_runs_say_every_place_in_order(places: list[int]) -> None:
    flat = runs(places)
    assert [p for a, n in zip(flat[::2], flat[1::2], strict=True) for p in range(a, a + n)] == places


def test_a_pipeline_that_has_not_run_is_a_record_too() -> None:
    steps = [Step("build_model", "factory", {}, "Build."), Step("export_to_gm", "export", {}, "Export.")]
    record = RecordWriter(steps).complete()
    assert [s.status for s in record.steps] == ["pending", "pending"]
    assert parse_record(record.model_dump_json().encode()) == record
