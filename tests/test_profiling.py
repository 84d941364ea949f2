"""wb.profile and step.profile: every node timed, slow ones found, times drawn over the graph."""

from __future__ import annotations

import time

import pytest
import torch

import adkit
from adkit.contract import AdkitError, ConfigError, MemoryLimitError
from adkit.graph.cost import DEVICES, node_costs
from adkit.graph.display import html_of
from adkit.graph.step import Step
from adkit.graph.times import duration
from adkit.passes import PassInfo
from adkit.viz import draw, plots

_LIB = torch.library.Library("adkit_profiling_test", "DEF")
_LIB.define("doze(Tensor x) -> Tensor")
_LIB.impl("doze", lambda x: time.sleep(0.5) or x.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("adkit_profiling_test::doze", torch.empty_like, lib=_LIB)


class Doze(adkit.Pass):
    """Slow one norm down."""

    key = "doze"
    stage = adkit.Stage.PATTERN_MATCHER

    def apply(self, gm, ctx):
        node = next(n for n in gm.graph.nodes if "rmsnorm" in str(n.target))
        with self.site(gm, [node], label="doze") as site:
            same = site.call(node.target, node.args, like=node)
            site.replace(node, site.call(torch.ops.adkit_profiling_test.doze.default, (same,), like=node))
        return PassInfo(num_matches=1)


@pytest.fixture(scope="module")
def wb(exported):
    return exported().run()


def test_every_call_is_timed_and_predicted(wb):
    p = wb.profile(sequences=2, context=9, repeats=2)
    calls = [n.id for n in wb.graph if n.op == "call_function"]
    table = p.table()
    assert list(table.index) == calls
    assert table["share"].sum() == pytest.approx(1)
    assert p.sum == pytest.approx(table["measured_us"].sum() / 1e6)
    assert p.total > 0
    expected = node_costs(wb.graph, "2-core CPU", {"tokens": 2, "sequences": 2, "context": 9})
    assert p.predicted == pytest.approx(sum(c.seconds for c in expected.values()))
    read = {n.target: n.val for n in wb.graph if n.op == "get_attr"}
    whole = sum(v.numel() * v.dtype.itemsize for v in read.values())
    assert table["weight_bytes"].sum() == whole
    ops = p.by_op()
    assert ops["nodes"].sum() == len(calls)
    assert list(ops["measured_us"]) == sorted(ops["measured_us"], reverse=True)
    assert p.batch == "decode of 2 sequences, context 9"


def test_the_slow_op_shows_up(exported):
    wb = exported()
    wb.insert(Doze, after="match_rmsnorm_pattern")
    p = wb.run("pattern_matcher").profile(repeats=1, context=5)
    assert p.by_op().index[0] == "adkit_profiling_test.doze"
    slow = next(i for i, s in p.seconds.items() if s == max(p.seconds.values()))
    assert wb.graph[slow].target_name == "adkit_profiling_test.doze"
    assert p[slow] >= 0.5
    assert p.total >= 0.5
    picture = p.draw().picture
    hottest = max(picture.boxes, key=lambda b: b.heat)
    assert (hottest.title, hottest.heat) == ("adkit_profiling_test.doze", 1.0)
    assert hottest.detail[0].startswith(duration(p[slow]))
    assert "doze" in repr(p).splitlines()[3]
    html = str(html_of(p))
    assert html.index("doze") < html.index("torch_linear_simple")


def test_a_prefill_is_timed_too(wb):
    p = wb.profile(tokens=6, repeats=1)
    assert p.batch == "prefill of 1 sequence, 6 tokens"
    expected = node_costs(wb.graph, "2-core CPU", {"tokens": 6, "sequences": 1, "context": 6})
    assert p.costs == expected
    plain = {b.key for b in draw(wb.graph, depth=0).picture.boxes}
    assert {b.key for b in p.draw(depth=0).picture.boxes} == plain


def test_a_step_is_profiled_as_it_left_the_graph(wb):
    p = wb.steps["match_linear"].profile(context=7, repeats=1)
    assert p.batch == "prefill of 1 sequence, 7 tokens"
    assert p.snapshot is wb.steps["match_linear"].after
    assert "torch_attention" in p.by_op().index
    assert "after match_linear" in repr(p)
    cached = wb.profile("insert_cached_attention", context=7, repeats=1)
    assert cached.batch == "decode of 1 sequence, context 7"


def test_weights_that_do_not_fit_are_not_made(exported, monkeypatch):
    monkeypatch.setattr("adkit.checking.free_bytes", lambda device: 1000)
    monkeypatch.setattr("adkit.checking.load_graph_tensors", None)
    wb = exported().run(until="pattern_matcher")
    with pytest.raises(MemoryLimitError, match=r"weights, and cpu has .* free"):
        wb.profile()


def test_profiling_leaves_the_engine_as_it_was(wb):
    prompt = [1, 5, 9]
    params = adkit.SamplingParams(max_tokens=5, ignore_eos=True)
    before = wb.llm().generate(prompt, params).token_ids
    wb.profile(repeats=1, context=3)
    assert wb.llm().generate(prompt, params).token_ids == before


def test_the_roofline_takes_the_device_from_the_table(wb):
    p = wb.profile(tokens=16, repeats=1)
    figure = p.roofline()
    assert figure.axes[0].get_title(loc="left") == "Roofline on 2-core CPU, float32"
    assert figure.axes[0].get_ylabel() == "measured FLOP/s"
    cost = wb.graph.cost("H100 SXM", tokens=4, context=4)
    by_table, by_name = plots.roofline(cost), plots.roofline(cost, "H100 SXM")
    h100 = DEVICES["H100 SXM"]
    by_numbers = plots.roofline(
        cost, "H100 SXM, bfloat16", peak_flops=h100.flops["bfloat16"], bandwidth=h100.bandwidth
    )
    assert by_table.svg() == by_name.svg() == by_numbers.svg()
    with pytest.raises(ValueError, match="no device is called 'H101'"):
        plots.roofline(cost, "H101")
    with pytest.raises(ValueError, match="needs a device"):
        plots.roofline(cost.reset_index().set_index("id").copy().pipe(_without_attrs))


def _without_attrs(table):
    table.attrs = {}
    return table


@pytest.mark.parametrize("options", [{"sequences": 0}, {"context": 0}, {"tokens": -1}, {"repeats": 0}])
def test_impossible_sizes_are_refused(wb, options):
    [(name, value)] = options.items()
    with pytest.raises(ConfigError, match=rf"profile\({name}={value}\)"):
        wb.profile(**options)


def test_what_cannot_be_profiled_says_why(wb, exported):
    with pytest.raises(ConfigError, match="no device is called 'Cray'; known: H100"):
        wb.profile(device="Cray")
    with pytest.raises(AdkitError, match="no graph yet"):
        exported().profile()
    with pytest.raises(RuntimeError, match="not part of a live Workbench"):
        Step("alone", "export", {}, "").profile()
