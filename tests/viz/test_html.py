"""Objects in a notebook: HTML that stands alone, and text where there is none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import adkit.viz
from adkit.graph.display import html_of, mimebundle
from adkit.graph.step import PassInfo, Step, Steps
from adkit.viz import dot, plots
from adkit.viz.widgets import TABS, StepBrowser
from tests.graph.samples import sample


def objects() -> list[object]:
    steps = sample("llama")
    step = steps["match_rmsnorm_pattern"]
    texts = [step.explain(), step.after.code(layer=1)]
    return [steps, step, step.diff, step.rewrites[0], step.after, *texts, *steps]


def test_every_object_has_text_and_html_without_scripts_or_network() -> None:
    assert adkit.viz.html is not None
    for obj in objects():
        bundle = mimebundle(obj)
        assert bundle["text/plain"]
        assert "<script" not in bundle["text/html"]
        assert not re.search(r"(src|href)=.https?:", bundle["text/html"])


def test_html_is_the_same_each_time() -> None:
    assert [html_of(o) for o in objects()] == [html_of(o) for o in objects()]


def test_html_works_without_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dot, "_pipe", lambda source, kind: None)
    assert "apt-get install graphviz" in str(html_of(sample("llama")["match_rmsnorm_pattern"]))


def test_a_step_tells_its_rewrites_and_code_change() -> None:
    step = sample("llama")["match_rmsnorm_pattern"]
    html = str(html_of(step))
    assert "9 ×" in html
    assert "torch_rmsnorm" in html
    assert '<span class="a">+' in html
    assert f"{len(step.before)} → {len(step.after)}" in html


def test_a_workbench_heading_and_stages_to_come_are_one_line() -> None:
    stages = {"now": "export", "later": "compile", "last": "compile"}
    steps = [Step(name, stage, {}, "d") for name, stage in stages.items()]
    html = str(html_of(Steps(steps, heading="Workbench 'x'\n0 of 3 steps run")))
    assert '<span class="ak-name">Workbench &#39;x&#39;</span>' in html
    assert '<span class="ak-fact">0 of 3 steps run</span>' in html
    assert ">later, last</td>" in html
    assert ">now</td>" in html


def test_docstring_literals_are_code() -> None:
    assert "one <code>a&lt;b</code>." in str(html_of(Step("s", "export", {}, "Make one ``a<b``.")))


def test_steps_tell_what_changed_and_what_is_next() -> None:
    html = str(html_of(sample("llama")))
    assert re.search(r'class="changed">\s*<td class="ak-key">match_rmsnorm_pattern', html)
    assert re.search(r'class="pending next">\s*<td class="ak-key">insert_cached_attention', html)
    assert "no checkpoint: shapes only" in html


def test_text_from_a_pass_is_escaped() -> None:
    info = PassInfo(reason="a < b")
    step = Step("evil", "export", {"x": "</pre><script>"}, "<script>alert(1)</script>", "failed", info=info)
    html = str(html_of(step)) + str(html_of(Steps([step])))
    assert "<script>" not in html
    assert "a &lt; b" in html


def test_plots_are_figures_that_show_themselves_the_same_each_time() -> None:
    import pandas as pd

    steps = list(sample("llama"))
    costs = pd.DataFrame({"op": ["linear", "add"], "flops": [2e9, 1e6], "bytes": [3e7, 6e6]})
    for make in (
        lambda: plots.nodes_by_stage(steps), lambda: plots.time_by_pass(steps), lambda: plots.memory(steps),
        lambda: plots.roofline(costs, peak_flops=989e12, bandwidth=3.35e12, device="H100"),
    ):  # fmt: skip
        figure = make()
        bundle = figure._repr_mimebundle_()
        assert bundle["image/svg+xml"].startswith("<svg")
        assert bundle == make()._repr_mimebundle_()
    lengths = [bar.get_width() for bar in plots.nodes_by_stage(steps).axes[0].patches]
    assert lengths[0] == len(sample("llama")["export_to_gm"].after)


def test_step_browser_fills_tabs_and_explains_a_rewrite() -> None:
    browser = StepBrowser(sample("llama"))
    assert browser.selected == "export_to_gm"
    browser.selected = "match_rmsnorm_pattern"
    for index in range(len(TABS)):
        assert "adkit" in browser.tab(index)
    assert "9 x [7 nodes" in browser.explain(0)
    assert "> + match_rmsnorm_pattern" in repr(browser)
    bundle = browser._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    browser._tabs.selected_index = TABS.index("rewrites")
    browser._buttons.children[0].click()
    assert "torch_rmsnorm" in browser._explained.value


def test_step_browser_without_ipywidgets_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    browser = StepBrowser(sample("llama"))
    bundle = browser._repr_mimebundle_()
    assert set(bundle) == {"text/plain"}
    assert "pip install ipywidgets" in bundle["text/plain"]


def test_a_rewrite_class_draws_its_first_site() -> None:
    rewrite = sample("llama")["match_rmsnorm_pattern"].rewrites[0]
    drawn = html_of(rewrite)
    assert drawn is not None
    assert "torch_rmsnorm" in drawn
    assert "svg" in drawn
    alone = html_of(replace(rewrite, diff=None))  # one that nobody's diff made has nothing to draw
    assert alone is not None
    assert "svg" not in alone.split("</style>")[-1]
