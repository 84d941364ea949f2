"""check() and bisect(): right passes pass, planted mistakes are found, nothing is called ok unseen."""

from __future__ import annotations

import math

import pytest
import torch

import adkit
from adkit.checking import compare, worst_of
from adkit.contract import AdkitError, ConfigError
from adkit.models.factory import ModelFactory
from tests.zoo import tiny_config

adkit_ops = torch.ops.adkit
LINEAR = adkit_ops.torch_linear_simple.default
NORM = adkit_ops.torch_rmsnorm.default


class Planted(adkit.Pass):
    """Replace each call of an op by the same call, times a factor."""

    key = "planted"
    stage = adkit.Stage.PATTERN_MATCHER
    op = NORM
    factor = 1.01

    def apply(self, gm, ctx):
        found = [n for n in gm.graph.nodes if n.target is self.op]
        for n in found:
            with self.site(gm, [n], label="planted") as s:
                same = s.call(n.target, n.args, n.kwargs, like=n)
                new = s.call(torch.ops.aten.mul.Tensor, (same, self.factor), like=n)
                s.replace(n, new)
        return adkit.PassInfo(num_matches=len(found))


def planted(**fields):
    return type("Variant", (Planted,), fields)


GATE, DOWN = (f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "down"))


class Rescale(adkit.Pass):
    """Multiply one weight by a factor, in place."""

    key = "rescale"
    stage = adkit.Stage.POST_LOAD_FUSION
    weight, factor = GATE, 1.5

    def apply(self, gm, ctx):
        gm.get_parameter(self.weight).data.mul_(self.factor)
        return adkit.PassInfo(num_matches=1)


def rescale(**fields):
    return type("Variant", (Rescale,), fields)


class DropWindow(adkit.Pass):
    """Forget the attention window, by changing the node in place."""

    key = "drop_window"
    stage = adkit.Stage.PATTERN_MATCHER

    def apply(self, gm, ctx):
        for n in gm.graph.nodes:
            if n.target is adkit_ops.torch_attention.default:
                n.kwargs = {**n.kwargs, "window": None}
        return adkit.PassInfo(num_matches=1)


@pytest.fixture(scope="module")
def done(exported):
    return exported().run()


@pytest.fixture(scope="module")
def shapes():
    """A model without weights."""
    return adkit.Workbench(
        tiny_config("mistral"), device="cpu", max_seq_len=64, page_size=4, progress=False
    ).run()


@pytest.mark.parametrize("how", ["whole", "sites"])
@pytest.mark.parametrize("weights", ["loaded", "checkpoint", "random"])
def test_every_step_of_the_pipeline_is_right(done, how, weights):
    checks = done.check(how=how, weights=weights)
    assert len(checks) > 8
    assert checks.ok, checks
    assert all(math.isfinite(c.rmse_ratio) for c in checks)


def test_the_result_says_what_was_compared(done):
    result = done.steps["insert_cached_attention"].check()
    assert result
    assert result.how == "whole graph"
    assert result.weights == "loaded"
    assert 0 < result.rmse_ratio <= result.tolerance
    assert "insert_cached_attention: ok, rmse ratio" in repr(result)
    assert done.check("compile_model").how == "whole graph", "the compiled model against the graph"
    sites = done.check("match_rmsnorm_pattern", how="sites")
    assert sites.how == "1 site"
    assert "torch_rmsnorm" in sites.sites[0][0]
    assert done.check("match_repeat_kv").how == "nothing changed"
    assert done.bisect() is None


@pytest.mark.parametrize("how", ["whole", "sites"])
@pytest.mark.parametrize("factor", [1.01, math.nan])
def test_a_wrong_pass_differs(exported, how, factor):
    wb = exported().insert(planted(factor=factor)).run(until="pattern_matcher")
    result = wb.check("planted", how=how)
    assert not result
    assert not result.ok
    assert "DIFFERS" in repr(result)
    assert math.isnan(result.rmse_ratio) if math.isnan(factor) else result.rmse_ratio > 100 * result.tolerance
    assert not wb.check(how=how).ok
    assert wb.check("match_linear", how=how).ok if not math.isnan(factor) else True


@pytest.mark.parametrize("weights", ["auto", "random"])
def test_bisect_finds_the_bad_step_among_many(exported, weights):
    wb = exported().insert(planted(op=LINEAR), before="fuse_swiglu").run()
    assert wb.bisect(weights=weights) is wb.steps["planted"]


@pytest.fixture(scope="module")
def rescaled(exported):
    """A weight changed in place that a later step fuses with another."""
    return exported().insert(Rescale, before="fuse_gemms").run()


@pytest.mark.parametrize("weights", ["auto", "checkpoint"])
def test_bisect_names_a_step_that_changed_a_weight_which_was_fused_since(rescaled, weights):
    with pytest.warns(UserWarning, match="one of 'rescale', 'fuse_gemms'"):
        assert rescaled.bisect(weights=weights) is rescaled.steps["rescale"]


def test_random_weights_do_not_clear_a_step_that_changed_weights(rescaled, exported):
    for wb in (rescaled, exported().insert(rescale(weight=DOWN), before="fuse_gemms").run()):
        with pytest.raises(AdkitError, match=r"step 'rescale' changed the data of 'model\.layers\.1\.mlp"):
            wb.bisect(weights="random")
        with pytest.raises(AdkitError, match=r"step 'rescale' changed the data .* random weights"):
            wb.check("rescale", weights="random")
        bad = wb.insert(planted(), after="match_linear").run()
        assert bad.bisect(weights="random") is bad.steps["planted"], "what came before it is judged"
        wb.disable("planted").run()


def test_what_lost_its_weights_is_a_row_that_says_so_and_the_others_are_checked(rescaled):
    checks = rescaled.check()
    assert not checks.ok
    assert [c.name for c in checks if not c.ok] == ["rescale", "fuse_gemms"]
    assert {c.name for c in checks if c.ok} > {"match_linear", "insert_cached_attention"}
    lost = next(c for c in checks if c.name == "rescale")
    assert lost.how == "not run"
    assert f"step 'rescale' changed the data of '{GATE}', and step 'fuse_gemms'" in lost.note
    assert "NOT COMPARED" in repr(checks)
    with pytest.raises(AdkitError, match=r"wb.rewind\('fuse_gemms'\) and check there"):
        rescaled.check("rescale")


def test_bisect_by_sites_does_not_clear_a_step_that_changed_weights(rescaled, monkeypatch):
    monkeypatch.setattr("adkit.checking.WHOLE_LIMIT", 0)
    with pytest.raises(AdkitError, match=r"step 'rescale' changed the data .* sites cannot judge"):
        rescaled.bisect()


def test_the_advice_for_lost_weights_helps(exported):
    wb = exported().insert(Rescale, before="fuse_gemms").run()
    left = wb.steps["rescale"]
    wb.rewind("fuse_gemms")
    assert not wb.check("rescale").ok
    assert wb.check("rescale").rmse_ratio > 1e-3
    assert wb.bisect() is wb.steps["rescale"]
    with pytest.raises(AdkitError, match=r"'rescale' changed the data .* has gone back since"):
        wb.check(left)


def test_a_weight_changed_twice_names_both_steps(exported):
    wb = exported().insert(rescale(weight=DOWN), before="fuse_gemms")
    wb.insert(rescale(weight=DOWN, key="again"), after="rescale").run()
    with pytest.warns(
        UserWarning, match="one of 'rescale', 'again', and .* step 'again' changed or freed it"
    ):
        assert wb.bisect() is wb.steps["rescale"]
    assert wb.check("fuse_gemms").ok, "the data that it read stands"


def test_a_change_outside_the_pipeline_is_told_from_a_step_s(exported):
    wb = exported().insert(rescale(weight=DOWN), before="fuse_gemms").run()
    with torch.no_grad():
        wb.module.get_parameter(DOWN).mul_(2)
    with pytest.raises(AdkitError, match=r"'rescale' .* something outside the pipeline"):
        wb.bisect()


def test_a_fused_weight_made_of_changed_ones_is_not_read_from_the_checkpoint_on_going_back(exported):
    fused = "model.layers.1.mlp.gate_up_proj_fused.weight"
    wb = exported().insert(Rescale, before="fuse_gemms").run(until="fuse_gemms")
    expected = wb.module.get_parameter(fused).clone()
    wb.insert(rescale(weight=fused, key="again"), after="fuse_gemms").run()
    wb.rewind("again")
    assert torch.equal(wb.module.get_parameter(fused), expected)


def test_a_step_that_has_not_run_or_failed_says_so(exported):
    class Fails(adkit.Pass):
        """Fail."""

        key = "fails"
        stage = adkit.Stage.PATTERN_MATCHER

        def apply(self, gm, ctx):
            raise RuntimeError("not today")

    wb = exported().insert(Fails).configure("fails", skip_on_error=True).run(until="pattern_matcher")
    with pytest.raises(AdkitError, match="'fuse_gemms' has not run yet"):
        wb.check("fuse_gemms")
    with pytest.raises(AdkitError, match=r"'fails' failed, .* RuntimeError: not today"):
        wb.check("fails")


def test_bisect_does_not_judge_by_a_reference_of_nan(exported, monkeypatch):
    original = ModelFactory.load

    def load(self, *args, **kwargs):
        return ((name, torch.full_like(t, math.nan)) for name, t in original(self, *args, **kwargs))

    monkeypatch.setattr(ModelFactory, "load", load)
    wb = exported().run(until="fuse_gemms")
    with pytest.raises(AdkitError, match="not finite as exported"):
        wb.bisect()
    assert not wb.check().ok


def test_half_precision_is_looked_at_site_by_site_too(llama_dir):
    wb = adkit.Workbench(
        llama_dir, device="cpu", dtype="bfloat16", max_seq_len=64, page_size=4, progress=False
    )
    wb.insert(planted(op=LINEAR, factor=1.015625)).run()
    assert wb.check("match_rmsnorm_pattern").ok
    assert wb.check("insert_cached_attention").ok
    assert not wb.check("planted").ok


def test_a_model_without_weights_is_checked_on_shapes(shapes):
    checks = shapes.check()
    assert checks.ok
    assert {c.weights for c in checks} == {"random"}
    sites = shapes.check(how="sites")
    assert sites.ok, sites
    assert shapes.bisect() is None
    wrong = shapes.insert(DropWindow, after="match_linear").run()
    assert not wrong.check("drop_window", how="sites").ok, "a node changed in place is compared as well"
    assert not wrong.check("drop_window").ok
    shapes.disable("drop_window").run()


@pytest.mark.slow
def test_a_bundled_model_is_checked_by_sites():
    wb = adkit.Workbench("llama-3.2-1b", device="cpu", progress=False)
    wb.configure("compile_model", enabled=False)
    wb.run()
    checks = wb.check()
    assert {c.how for c in checks if "site" in c.how}, "too large to run whole"
    assert checks.ok, checks
    wb.insert(planted(op=LINEAR), after="match_linear").run(until="planted")
    assert not wb.check("planted").ok
    assert wb.bisect() is wb.steps["planted"]


def test_what_cannot_be_run_is_not_called_ok(exported):
    @torch.library.custom_op("adkit_test::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not here")

    opaque.register_fake(torch.empty_like)

    class Opaque(Planted):
        """Put an op that cannot run into the graph."""

        key = "opaque"

        def apply(self, gm, ctx):
            n = next(n for n in gm.graph.nodes if n.target is NORM)
            with self.site(gm, [n], label="opaque") as s:
                s.replace(n, s.call(torch.ops.adkit_test.opaque.default, (n.args[0],), like=n))
            return adkit.PassInfo(num_matches=1)

    wb = exported().insert(Opaque).run(until="opaque")
    result = wb.check("opaque", how="sites")
    assert not result.ok
    assert result.how == "not run"
    assert "could not be run alone" in result.note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "site"}, "did you mean 'sites'"),
        ({"weights": "loded"}, "did you mean 'loaded'"),
    ],
)
def test_unknown_options_are_refused(done, options, message):
    with pytest.raises(ConfigError, match=message):
        done.check("fuse_gemms", **options)


def test_weights_that_are_not_there_are_refused(shapes, exported):
    with pytest.raises(AdkitError, match="no checkpoint"):
        shapes.check("match_linear", weights="checkpoint")
    with pytest.raises(AdkitError, match="no weights are loaded yet"):
        exported().run(until="pattern_matcher").check("match_linear", weights="loaded")


def test_a_step_of_a_saved_run_cannot_be_checked(done, tmp_path):
    done.save(tmp_path / "run.json")
    with pytest.raises(RuntimeError, match="not part of a live Workbench"):
        adkit.Workbench.load(tmp_path / "run.json").steps["match_linear"].check()


def test_comparing_numbers():
    one = torch.tensor([1.0, -2.0, math.inf])
    assert compare(one, one) == (0.0, 0.0)
    assert math.isnan(compare(one, torch.tensor([1.0, math.nan, math.inf]))[1])
    assert math.isnan(compare(torch.tensor([math.nan]), torch.tensor([math.nan]))[1])
    assert not compare(torch.tensor([math.inf]), torch.tensor([1.0]))[1] <= 1e9
    assert compare(torch.zeros(3), torch.ones(3))[1] == math.inf
    assert math.isnan(worst_of([(0.0, 0.0), (0.0, math.nan)])[1])
    with pytest.raises(AdkitError, match="different shapes"):
        compare(torch.zeros(2), torch.zeros(3))
