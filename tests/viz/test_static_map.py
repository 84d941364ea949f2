"""The picture for where no script runs tells what the explorer was set to: step, choice, overlay."""

from __future__ import annotations

import re

import pytest

from adkit.viz.record import Record, RecordWriter
from adkit.viz.record.overlays import overlay
from adkit.viz.record.read import graph_rows
from adkit.viz.static import walk_svg
from adkit.viz.static_map import Chip, Colours, Looked, Module, is_light, point
from tests.graph.samples import sample


@pytest.fixture(scope="module")
def record() -> Record:
    writer = RecordWriter(sample("llama", 4))
    writer.costs()
    return writer.complete()


def chips(m: Module) -> list[Chip]:
    return [c for i in m.items for c in (chips(i) if isinstance(i, Module) else [i])]


def modules(m: Module) -> list[Module]:
    return [m, *(x for i in m.items if isinstance(i, Module) for x in modules(i))]


def changing(record: Record) -> list[int]:
    """Steps that made and erased nodes."""
    return [k for k, s in enumerate(record.steps) if s.created and s.erased and s.before >= 0]


def test_it_shows_the_step_asked_for_and_what_it_made(record: Record) -> None:
    (k, *_) = changing(record)
    s = record.steps[k]
    shown = point(record, Looked(k))
    assert shown.graph is record.graphs[s.after]
    assert (shown.created, shown.erased) == (s.created, s.erased)
    assert any(c.mark == "created" for c in chips(shown.root))
    assert any(m.erased for m in modules(shown.root))
    svg = walk_svg(record, Looked(k))
    assert f"after {s.name}" in svg
    assert f"+{s.created}" in svg
    assert f"\u2212{s.erased}" in svg
    assert svg != walk_svg(record)


def test_compared_with_an_earlier_step_it_tells_of_all_in_between(record: Record) -> None:
    first, *_, last = changing(record)
    rows = graph_rows(record)
    at = [{record.rows.node[r] for r in rows[record.steps[k].after]} for k in (first, last)]
    shown = point(record, Looked(last, against=first))
    assert (shown.created, shown.erased) == (len(at[1] - at[0]), len(at[0] - at[1]))
    assert point(record, Looked(last)).created == record.steps[last].created
    assert f"against {record.steps[first].name}" in walk_svg(record, Looked(last, against=first))


def test_a_repeated_layer_tells_of_its_own_nodes_alone(record: Record) -> None:
    for k in changing(record):
        s = record.steps[k]
        told = sum(m.erased for m in modules(point(record, Looked(k)).root))
        assert told <= s.erased
        layers = [m for m in modules(point(record, Looked(k)).root) if m.title.startswith("layers")]
        assert all(m.erased == 0 for m in layers), (
            "what went from a layer that is not drawn is not said of all"
        )


def test_a_choice_in_any_of_equal_layers_stands_out_in_the_one_drawn(record: Record) -> None:
    at = len(record.steps) - 1
    r = record.rows
    linears = [
        r.node[row]
        for row in graph_rows(record)[record.steps[at].after]
        if "linear" in record.targets[r.target[row]].short
    ]
    for chosen in (linears[0], linears[len(linears) // 2]):
        found = [c for c in chips(point(record, Looked(at, (chosen,))).root) if c.chosen]
        assert [c.count for c in found] == [1]
        assert "linear" in found[0].text


def test_an_overlay_gives_the_colours_and_the_scale(record: Record) -> None:
    (phase, *_) = record.costs
    name = f"roofline time ({phase.name})"
    shown = point(record, Looked(overlay=name))
    assert shown.overlay is not None
    values = [c.value for c in chips(shown.root) if c.value is not None]
    assert values
    assert max(values) == max(shown.overlay.values)
    colours = Colours(shown.overlay)
    svg = walk_svg(record, Looked(overlay=name))
    assert all(colours.of(v) in svg for v in values)
    assert name in svg
    assert all(end in svg for end in colours.ends)
    assert point(record, Looked(overlay="no such")).overlay is None


def test_words_have_colours_of_their_own(record: Record) -> None:
    laid = overlay("place", {i: ("here", "there")[i % 2] for i in record.nodes.id})
    made = record.model_copy(update={"overlays": [laid]})
    svg = walk_svg(made, Looked(overlay="place"))
    fills = set(re.findall(r'fill="(#[0-9a-f]{6})"', svg))
    assert {Colours(laid).of(0), Colours(laid).of(1)} <= fills
    assert ">here<" in svg
    assert ">there<" in svg


@pytest.mark.parametrize(("colour", "light"), [("#ffffff", True), ("#fdea45", True), ("#00224e", False)])
def test_text_can_be_read_on_every_colour(colour: str, light: bool) -> None:
    assert is_light(colour) is light
