"""Pictures of virtual ranks tell what the ranks hold."""

from __future__ import annotations

from typing import Any

import pytest

from adkit.contract import ConfigError
from adkit.graph.placement import PARTIAL, REPLICATED
from adkit.sharding.agreement import Agreement
from adkit.sharding.pictures import held_slices, placements
from tests.sharding.models import bench
from tests.sharding.stacked import saved_stacked


@pytest.mark.parametrize(("kind", "tp", "moe_ep"), [("llama", 4, None), ("gpt_oss", 4, 2), ("phi3", 2, None)])
def test_slices_of_all_ranks_are_the_whole_weight(models, kind, tp, moe_ep) -> None:
    v = models.shard(kind, tp, moe_ep=moe_ep)
    sizes = {
        n.target: n.val.numel() for n in v.whole if n.op == "get_attr" and n.layer == 0 and n.val is not None
    }
    tensors = held_slices(v, 0)
    assert len(tensors) == len(sizes)
    for t in tensors:
        held = 0
        for s in t.slices:
            part = 1
            for d, size in enumerate(t.shape):
                part *= sum(b - a for a, b in s.ranges.get(d, [(0, size)]))
            held += part
        whole = 1
        for size in t.shape:
            whole *= size
        assert held == whole, t
    cut = {t.name for t in tensors if len(t.slices) > 1}
    assert any("down_proj" in name for name in cut)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("qwen3_moe", {"moe_ep": 2}),
        ("cohere2", {}),
        ("qwen3_moe", {"attention_dp": True}),
        ("mixtral", {"attention_dp": True, "moe_ep": 2, "shard_layers": ["moe", "mlp", "vocab"]}),
        ("phi3", {"attention_dp": True, "shard_layers": ["moe", "mlp", "vocab"]}),
    ],
)
def test_placements_read_off_shapes_are_those_that_numbers_prove(models, monkeypatch, kind, options) -> None:
    proves(models.shard(kind, 4, **options), monkeypatch)


def test_placements_of_stacked_matrices_are_those_that_numbers_prove(tmp_path, monkeypatch) -> None:
    proves(bench(saved_stacked(tmp_path)).shard(2), monkeypatch)


def proves(v: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Agreement] = []
    init = Agreement.__init__

    def keep(self, *args, **kwargs) -> None:
        init(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(Agreement, "__init__", keep)
    assert v.check().ok
    told = placements(v, v.ranks[0].graph)
    proved = seen[0].held
    assert {PARTIAL, REPLICATED} & set(proved.values())
    assert len(set(proved.values())) > 1
    assert {i: told[i] for i in proved} == proved


def test_a_layer_tells_decisions_and_exchanges(models) -> None:
    v = models.shard("llama", 2)
    boxes = v.layer(0).picture.boxes
    details = [b.detail[0] for b in boxes if b.detail]
    assert "colwise, cut(2)" in details
    assert "rowwise, partial" in details
    exchanges = [b for b in boxes if b.category == "communication" and not b.mark]
    assert len(exchanges) == 2
    assert all(b.detail == ("384 B a token",) for b in exchanges)  # D = 96 in float32


def test_figures_show_themselves(models) -> None:
    v = models.shard("gpt_oss", 2)
    table = v.scaling((1, 2))
    for figure in (v.plots.mesh(), v.plots.memory(), v.plots.comm(64), v.plots.scaling(table=table)):
        assert figure._repr_mimebundle_()["image/svg+xml"].startswith("<svg")
    bars = v.plots.memory(cache=False).axes[0].patches
    assert sum(b.get_width() for b in bars) * 1e6 == pytest.approx(v.memory()["weights"].sum())
    assert repr(v.plots).startswith("v.plots.mesh()")
    with pytest.raises(ConfigError, match="no weights in layer 99"):
        v.plots.mesh(99)


def test_the_explorer_opens_on_placements(models) -> None:
    v = models.shard("llama", 2)
    explorer = v.explore()
    assert explorer.overlay == "placement"
    assert explorer.step_name == "apply_sharding_hints"
    made = explorer.data.overlays[-1]
    assert set(made.words) == {"replicated", "cut(2)", "partial", "all_reduce", "all_gather"}
    known = set(v.ranks[0].graph.by_id)
    assert set(made.ids) <= known
    assert explorer not in models("llama").watching._explorers  # a rank's walk is its own


def test_everything_draws_itself(models) -> None:
    v = models.shard("qwen3_moe", 2)
    for thing in (v.plan, v.comm, v.ranks[1].memory, v.check()):
        bundle = thing._repr_mimebundle_()
        assert bundle["text/plain"] == repr(thing)
        assert "<table" in bundle["text/html"]
