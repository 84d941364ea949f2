"""Values over nodes, as people give them: by id or node, numbers or words, profiles, overlays made already."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adkit.graph.cost import device_named
from adkit.graph.times import NodeTimes
from adkit.viz.record import RecordError
from adkit.viz.record.overlays import as_overlays, overlay
from tests.graph.samples import snapshot


def test_a_node_is_its_id_or_its_record() -> None:
    nodes = snapshot().nodes[:3]
    by_record = overlay("place", {n: k for k, n in enumerate(nodes)})
    by_id = overlay("place", {np.int64(n.id): k for k, n in enumerate(nodes)})
    assert by_record == by_id
    assert (by_id.ids, by_id.values, by_id.scale) == ([n.id for n in nodes], [0.0, 1.0, 2.0], "linear")


def test_values_are_whatever_is_one_number() -> None:
    made = overlay("x", {1: 2, 2: torch.tensor(0.5), 3: np.float32(1.5), 4: None, 5: math.nan, 6: math.inf})
    assert dict(zip(made.ids, made.values, strict=True)) == {1: 2.0, 2: 0.5, 3: 1.5}


def test_words_are_kept_once() -> None:
    made = overlay("shard", {1: "rank 0", 2: "rank 1", 3: "rank 0"})
    assert (made.scale, made.words, made.values) == ("words", ["rank 0", "rank 1"], [0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1, 2], "is a list"),
        ({"linear_3": 1.0}, "has the key 'linear_3'"),
        ({True: 1.0}, "has the key True"),
        ({-1: 1.0}, "has the key -1"),
        ({1: "rank 0", 2: 3}, "all numbers or all words"),
        ({1: torch.zeros(2)}, "all numbers or all words"),
    ],
)
def test_what_is_no_overlay_is_told(values, said: str) -> None:
    with pytest.raises(RecordError, match=f"overlay 'x' {said}|overlay 'x' .*{said}"):
        overlay("x", values)


def test_a_profile_is_the_time_of_each_node() -> None:
    s = snapshot()
    times = NodeTimes("m", "1 x 8", "this CPU", s, {s.nodes[-1].id: 2e-6}, {}, device_named("H100 SXM"), 1e-5)
    made = overlay("measured", times)
    assert (made.name, made.unit, made.values) == ("measured", "us", [2.0])
    assert made.note == "measured: 1 x 8, this CPU"


def test_overlays_come_by_name_or_made_already() -> None:
    made = overlay("error", {1: 0.5}, scale="log")
    assert as_overlays(made) == as_overlays([made]) == [made]
    (renamed,) = as_overlays({"bf16": made})
    assert (renamed.name, renamed.scale, renamed.ids) == ("bf16", "log", [1])
    with pytest.raises(RecordError, match="without a name is a dict"):
        as_overlays([{1: 0.5}])
