"""The Workbench: running, looking, going back, changing the pipeline, failing."""

from __future__ import annotations

import pytest
import torch

import adkit
from adkit.contract import AdkitError, ConfigError, EngineError, MemoryLimitError, ModelError, PassError
from adkit.models.factory import ModelFactory

PROMPTS = ([5, 6, 7, 8, 9], [11, 12])
ORDER = [s.value for s in adkit.Stage]


@pytest.fixture
def wb(exported):
    return exported()


@pytest.fixture
def loads(monkeypatch):
    """Names that factories are asked for, a list a call of ``load``."""
    calls = []
    original = ModelFactory.load

    def load(self, names=None, *args, **kwargs):
        names = list(names)
        calls.append(names)
        return original(self, names, *args, **kwargs)

    monkeypatch.setattr(ModelFactory, "load", load)
    return calls


@pytest.fixture
def exports(monkeypatch):
    """How many times a model was exported."""
    import adkit.passes.export.export_to_gm as home

    calls = []
    original = home.export_model
    monkeypatch.setattr(home, "export_model", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def answers(wb):
    return [
        c.token_ids for c in wb.llm().generate(PROMPTS, adkit.SamplingParams(max_tokens=8), progress=False)
    ]


def logits(wb):
    """Logits of the graph as it stands, on the Workbench's own tensors."""
    from adkit.checking import logits as run

    return torch.cat(run(wb.module, wb.graph, wb))


class Scale(adkit.Pass):
    """Multiply what the last norm gives by a factor."""

    key = "scale_hidden"
    stage = adkit.Stage.POST_LOAD_FUSION
    factor = 1.01

    def apply(self, gm, ctx):
        n = [n for n in gm.graph.nodes if n.target is torch.ops.adkit.torch_rmsnorm.default][-1]
        users = list(n.users)
        with self.site(gm, [n], label="scale", before=n.next) as s:
            new = s.call(torch.ops.aten.mul.Tensor, (n, self.factor), like=n)
            for u in users:
                u.replace_input_with(n, new)
        return adkit.PassInfo(num_matches=1)


class Nothing(adkit.Pass):
    """Change nothing."""

    key = "nothing"
    stage = adkit.Stage.POST_LOAD_FUSION

    def apply(self, gm, ctx):
        return adkit.PassInfo()


# --- running and looking


def test_before_export_the_graph_is_empty_and_everything_has_a_text(exported):
    wb = exported(config={"transforms": {"pipeline_cache": {"enabled": False}}})
    assert len(wb.graph) == 0
    assert wb.position == 0
    assert "next: build_model" in repr(wb)
    assert repr(wb) == repr(wb)
    assert "Snapshot(0 nodes" in repr(wb.graph)
    assert wb.module is None
    with pytest.raises(AdkitError, match="no graph yet to check; run through export_to_gm"):
        wb.check()
    with pytest.raises(AdkitError, match="no graph yet to bisect; run through export_to_gm"):
        wb.bisect()


def test_run_until_a_stage_or_a_transform_and_step(wb):
    wb.run(until="pattern_matcher")
    assert wb.steps["match_linear"].status == "done"
    assert wb.steps["load_weights"].status == "pending"
    assert wb.run(until="export").position == wb.position, "what has run stays"
    step = wb.step()
    assert step is wb.steps[wb.position - 1] is wb.steps[step.name]
    wb.run(until="fuse_gemms")
    assert wb.steps[wb.position - 1].name == "fuse_gemms"
    wb.run()
    assert wb.steps[-1].name == "compile_model"
    assert wb.position == len(wb.steps) == len(list(wb.steps))
    with pytest.raises(IndexError, match="every step"):
        wb.step()
    assert repr(wb) == repr(wb)
    assert " at 0x" not in repr(wb) + repr(wb.steps) + "".join(map(repr, wb.steps))


def test_stages_are_in_order(wb):
    stages = [s.stage for s in wb.steps]
    assert stages == sorted(stages, key=ORDER.index)
    wb.run(until="sharding")  # has no pass: everything before it
    assert wb.steps[wb.position].stage == "weight_load"


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda wb: wb.run(until="patern_matcher"), "did you mean 'pattern_matcher'"),
        (lambda wb: wb.run(until="match_rmsnorm"), "did you mean 'match_rmsnorm_pattern'"),
        (lambda wb: wb.steps["fuse_gems"], "did you mean 'fuse_gemms'"),
        (lambda wb: wb.rewind("fuse_gems"), "did you mean 'fuse_gemms'"),
        (lambda wb: wb.disable("fuse_gems"), "did you mean 'fuse_gemms'"),
        (lambda wb: wb.configure("fuse_gemms", enable=False), "did you mean 'enabled'"),
        (lambda wb: wb.configure("fuse_gemms", enabled="perhaps"), "enabled = 'perhaps'"),
        (lambda wb: wb.insert(Nothing, after="fuse_gems"), "did you mean 'fuse_gemms'"),
        (lambda wb: wb.insert(Nothing, after="fuse_gemms", before="fuse_moe"), "exactly one of"),
        (lambda wb: wb.insert("fuse_gemms"), "a step is a Pass"),
        (lambda wb: wb.move("fuse_gemms"), "exactly one of"),
        (lambda wb: wb.move("fuse_gemms", after="fuse_gemms"), "next to itself"),
        (lambda wb: wb.rewind(1000), "no step 1000"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_one(wb, act, message):
    wb.run(until="post_export")
    position = wb.position
    with pytest.raises((ConfigError, KeyError, IndexError), match=message):
        act(wb)
    assert wb.position == position


# --- going back


def test_inserting_after_loading_keeps_what_came_before(wb, loads, exports):
    wb.run()
    before, expected = list(wb.steps), answers(wb)
    ids = {n.id for s in before for n in s.after}
    loads.clear()
    wb.insert(Nothing, after="fuse_gemms").run()
    index = wb.steps.keys().index("nothing")
    assert all(a is b for a, b in zip(list(wb.steps)[:index], before[:index], strict=True))
    assert loads == []
    assert exports == []
    assert answers(wb) == expected
    new = {n.id for s in list(wb.steps)[index:] for n in s.after} - {n.id for n in before[index - 1].after}
    assert not new & ids, "ids are never used again"


def test_only_what_a_fusion_took_is_read_again(wb, loads):
    wb.run()
    expected = answers(wb)
    loads.clear()
    wb.rewind("fuse_gemms")
    parts = {name for names in loads for name in names}
    assert parts == {
        n for n in parts if any(p in n for p in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    }
    assert len(parts) == 10
    wb.disable("fuse_gemms").run()
    assert wb.steps["fuse_gemms"].status == "disabled"
    assert answers(wb) == expected
    wb.enable("fuse_gemms").run()
    assert wb.steps["fuse_gemms"].status == "done"
    assert answers(wb) == expected


def test_going_back_before_loading_reads_nothing_that_is_there(wb, loads):
    wb.run(until="weight_load")
    loads.clear()
    wb.insert(Nothing, before="match_linear").run()
    assert [n for names in loads for n in names] == []
    assert wb.steps["nothing"].stage == "pattern_matcher"
    assert wb.check().ok


@pytest.mark.parametrize("how", ["in place", "data", "replaced"])
def test_a_pass_that_changes_weights_is_undone_by_going_back(wb, loads, how):
    name = "model.layers.0.mlp.down_proj.weight"

    class Halve(adkit.Pass):
        """Halve one weight."""

        key = "halve"
        stage = adkit.Stage.POST_LOAD_FUSION

        def apply(self, gm, ctx):
            weight = gm.get_parameter(name)
            with torch.no_grad():
                if how == "in place":
                    weight.mul_(0.5)
                elif how == "data":
                    weight.data.mul_(0.5)
                else:
                    gm.get_submodule(name.rpartition(".")[0]).weight = torch.nn.Parameter(
                        weight * 0.5, requires_grad=False
                    )
            return adkit.PassInfo(num_matches=1)

    wb.run(until="weight_load")
    expected = logits(wb)
    wb.insert(Halve, after="move_inputs_to_device").run(until="halve")
    assert wb.steps["halve"].altered == (name,)
    assert "down_proj" in repr(wb.steps["halve"])
    halved = logits(wb)
    assert not torch.equal(halved, expected)
    assert not wb.check("halve").ok
    assert wb.bisect() is wb.steps["halve"]
    wb.run()
    loads.clear()
    wb.insert(Nothing, after="halve")
    assert torch.equal(logits(wb), halved), "later steps are undone, the change itself stays"
    assert name not in [n for names in loads for n in names]
    loads.clear()
    wb.disable("halve")
    assert [n for names in loads for n in names] == [name]
    assert torch.equal(logits(wb), expected)


def test_random_weights_stay_the_same_on_the_way_back(exported, llama_dir):
    wb = exported(random_weights=True, seed=3)
    wb.run(until="fuse_gemms")
    expected = logits(wb)
    wb.rewind("fuse_gemms").run(until="fuse_gemms")
    assert torch.equal(logits(wb), expected)


def test_rewind_to_the_start_builds_anew(wb, exports):
    wb.run(until="post_export")
    wb.rewind()
    assert wb.position == 0
    assert len(wb.graph) == 0
    wb.rewind(-1)
    assert wb.position == 0


# --- changing


def test_a_pass_takes_the_place_it_is_given(wb):
    wb.insert(Scale)
    keys = wb.steps.keys()
    assert keys[keys.index("scale_hidden") + 1] == "insert_cached_attention"
    wb.move("scale_hidden", before="fuse_gemms")
    keys = wb.steps.keys()
    assert keys[keys.index("fuse_gemms") - 1] == "scale_hidden"
    wb.move("scale_hidden", after="match_linear")
    assert wb.steps["scale_hidden"].stage == "pattern_matcher"
    with pytest.raises(ConfigError, match="already"):
        wb.insert(Scale)
    wb.replace("scale_hidden", Nothing)
    assert "nothing" in wb.steps
    assert "scale_hidden" not in wb.steps
    wb.configure("fuse_moe", stage="compile")
    stages = [s.stage for s in wb.steps]
    assert stages == sorted(stages, key=ORDER.index)
    assert wb.config.transforms["fuse_moe"].stage == "compile"
    assert "scale_hidden" not in wb.config.to_yaml()


def test_configuring_nothing_new_goes_nowhere_back(wb):
    wb.run()
    wb.configure("fuse_gemms", enabled=True)
    assert wb.position == len(wb.steps)


def test_one_engine_a_pipeline_and_a_new_one_after_a_change(wb):
    llm = wb.llm()
    assert wb.llm() is llm
    first = llm.generate(PROMPTS[0], progress=False).token_ids
    wb.rewind("compile_model")
    other = wb.llm()
    assert other is not llm
    caches = [next(iter(m.engine.model.caches.tensors.values())) for m in (llm, other)]
    assert caches[0].data_ptr() != caches[1].data_ptr()
    assert other.generate(PROMPTS[0], progress=False).token_ids == first
    assert llm.generate(PROMPTS[0], progress=False).token_ids == first


class Negate(adkit.Pass):
    """Negate the last norm."""

    key = "negate"
    stage = adkit.Stage.POST_LOAD_FUSION
    in_place, fails = True, False

    def apply(self, gm, ctx):
        norm = gm.get_submodule("model.norm")
        if self.in_place:
            norm.weight.data.mul_(-1)
        else:
            norm.weight = torch.nn.Parameter(-norm.weight, requires_grad=False)
        if self.fails:
            raise ValueError("I gave up")
        return adkit.PassInfo(num_matches=1)


def test_an_engine_whose_weights_a_later_pass_writes_into_refuses(wb):
    old = wb.llm()
    first = old.generate(PROMPTS[0], progress=False).token_ids
    waiting = old.submit(PROMPTS[0])
    new = wb.insert(Negate).llm()
    assert waiting.finish_reason == "cancelled"
    for ask in (old.generate, old.submit):
        with pytest.raises(EngineError, match=r"'negate' changed the data of 'model.norm.weight' in place"):
            ask(PROMPTS[0])
    assert new.generate(PROMPTS[0], progress=False).token_ids != first
    third = wb.disable("negate").llm()
    assert third.generate(PROMPTS[0], progress=False).token_ids == first
    assert new.generate(PROMPTS[0], progress=False).token_ids != first, "its weight is its own"
    with pytest.raises(EngineError, match="separate Workbenches"):
        old.generate(PROMPTS[0], progress=False)


def test_an_engine_refuses_after_a_pass_that_wrote_into_its_weights_and_failed(wb):
    old = wb.llm()
    first = old.generate(PROMPTS[0], progress=False).token_ids
    wb.insert(type("Variant", (Negate,), {"fails": True}))
    with pytest.raises(PassError):
        wb.run()
    with pytest.raises(EngineError, match="'negate' changed"):
        old.generate(PROMPTS[0], progress=False)
    assert wb.disable("negate").llm().generate(PROMPTS[0], progress=False).token_ids == first


def test_an_engine_goes_on_when_a_pass_sets_a_new_parameter(wb):
    old = wb.llm()
    first = old.generate(PROMPTS[0], progress=False).token_ids
    new = wb.insert(type("Variant", (Negate,), {"in_place": False})).llm()
    assert new.generate(PROMPTS[0], progress=False).token_ids != first
    assert old.generate(PROMPTS[0], progress=False).token_ids == first


def test_an_engine_of_a_model_changed_after_compiling_is_made_anew(wb):
    old = wb.llm()
    first = old.generate(PROMPTS[0], progress=False).token_ids
    new = wb.insert(Negate, after="compile_model").llm()
    assert new is not old
    assert new.generate(PROMPTS[0], progress=False).token_ids != first


# --- failing


class Broken(adkit.Pass):
    """Break the graph in the way asked for, after half an edit."""

    key = "broken"
    stage = adkit.Stage.POST_LOAD_FUSION

    def apply(self, gm, ctx):
        calls = [n for n in gm.graph.nodes if n.target is torch.ops.adkit.torch_linear_simple.default]
        n = calls[0]
        weight = next(i for i in n.all_input_nodes if i.op == "get_attr")
        with torch.no_grad():
            gm.get_parameter(weight.target).zero_()
        with gm.graph.inserting_before(n):
            new = gm.graph.call_function(torch.ops.aten.neg.default, (n.args[0],))
        n.replace_input_with(n.args[0], new)
        if self.way == "raise":
            raise ValueError("I gave up")
        if self.way == "interrupt":
            raise KeyboardInterrupt
        if self.way == "late":
            new.meta["val"] = calls[-1].meta["val"]
            new.args = (calls[-1],)
        if self.way == "absent":
            with gm.graph.inserting_before(n):
                gm.graph.get_attr("no.such.tensor")
            return adkit.PassInfo(skipped=True)
        if self.way == "no info":
            return None
        if self.way == "output":
            gm.graph.erase_node(gm.graph.output_node())
            return adkit.PassInfo(skipped=True)
        return adkit.PassInfo(num_matches=1)


WAYS = {
    "raise": "transform 'broken' failed: ValueError: I gave up.*wb.disable",
    "late": "left a broken graph",
    "bare": "without a value",
    "absent": "no.such.tensor",
    "no info": "must return a PassInfo",
    "output": "without an output",
}


@pytest.fixture(scope="module")
def sound(exported):
    """A Workbench just after loading, and its logits."""
    wb = exported().run(until="weight_load")
    return wb, logits(wb)


@pytest.mark.parametrize("way", WAYS)
def test_a_failing_pass_leaves_everything_as_it_was(sound, way):
    wb, expected = sound
    wb.insert(type("Way", (Broken,), {"way": way})) if "broken" not in wb.steps else wb.replace(
        "broken", type("Way", (Broken,), {"way": way})
    )
    with pytest.raises(PassError, match=WAYS[way]):
        wb.run(until="broken")
    assert wb.steps[wb.position].name == "broken"
    assert wb.steps["broken"].status == "pending"
    fusions = [s.name for s in wb.steps if s.stage == "post_load_fusion" and s.name != "broken"]
    wb.rewind(fusions[0])
    assert torch.equal(logits(wb), expected)


def test_an_interrupt_leaves_everything_as_it_was(wb):
    wb.run(until="weight_load")
    expected, graph = logits(wb), wb.graph
    wb.insert(type("Way", (Broken,), {"way": "interrupt"}), after="move_inputs_to_device")
    with pytest.raises(KeyboardInterrupt):
        wb.run()
    assert wb.graph is graph
    assert torch.equal(logits(wb), expected)
    wb.disable("broken").run()
    assert wb.llm().generate(PROMPTS[0], progress=False).token_ids


def test_interrupting_a_load_leaves_it_to_be_done(wb, monkeypatch):
    wb.run(until="pattern_matcher")
    original = ModelFactory.load

    def load(self, *args, **kwargs):
        for i, item in enumerate(original(self, *args, **kwargs)):
            if i == 5:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(ModelFactory, "load", load)
    with pytest.raises(KeyboardInterrupt):
        wb.run()
    assert wb.steps["load_weights"].status == "pending"
    assert not wb.loaded
    monkeypatch.undo()
    wb.run()
    assert wb.loaded
    assert wb.check().ok


def test_a_failure_while_reading_again_goes_back_to_before_the_weights(wb, monkeypatch):
    wb.run()
    monkeypatch.setattr(
        ModelFactory, "load", lambda *a, **k: (_ for _ in ()).throw(ModelError("the disk is gone"))
    )
    with pytest.raises(ModelError, match="the disk is gone"):
        wb.rewind("fuse_gemms")
    assert wb.steps[wb.position].name == "load_weights"
    monkeypatch.undo()
    wb.run()
    assert wb.check().ok


def test_skip_on_error_goes_on_without_the_pass(wb):
    wb.run(until="weight_load")
    wb.insert(
        type("Way", (Broken,), {"way": "raise"})({"skip_on_error": True}), after="move_inputs_to_device"
    ).run()
    step = wb.steps["broken"]
    assert step.status == "failed"
    assert "I gave up" in step.info.reason
    assert "Traceback" in step.log[-1]
    assert wb.check().ok
    assert wb.llm().generate(PROMPTS[0], progress=False).token_ids


def test_changing_the_graph_after_compilation_is_refused(wb):
    wb.insert(Scale({"stage": "compile"}), after="compile_model")
    with pytest.raises(PassError, match="after compile_model"):
        wb.run()
    assert wb.steps["compile_model"].status == "done"


def test_values_are_recomputed_where_a_pass_asks(wb):
    class Bare(Nothing):
        """Insert a node without a value."""

        def apply(self, gm, ctx):
            n = next(n for n in gm.graph.nodes if n.target is torch.ops.adkit.torch_linear_simple.default)
            with gm.graph.inserting_before(n):
                new = gm.graph.call_function(torch.ops.aten.clone.default, (n.args[0],))
            n.replace_input_with(n.args[0], new)
            return adkit.PassInfo(num_matches=1, has_valid_shapes=False)

    wb.insert(Bare({"run_shape_prop": True}), after="move_inputs_to_device").run(until="nothing")
    assert all(n.val is not None for n in wb.graph if n.op == "call_function")
    assert wb.check("nothing").ok


# --- memory


def test_a_model_that_does_not_fit_is_refused_unless_forced(exported, monkeypatch):
    from adkit.models import memory

    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    wb = exported()
    with pytest.raises(MemoryLimitError, match="force=True"):
        wb.run()
    assert wb.steps[wb.position].name == "load_weights"
    assert len(wb.graph)
    assert exported(force=True).run(until="load_weights").loaded
    monkeypatch.undo()
    assert wb.run().loaded


@pytest.mark.parametrize("key", ["load_weights", "initialize_cache"])
def test_what_generating_needs_and_is_disabled_is_named(exported, key):
    wb = exported().disable(key)
    with pytest.raises(AdkitError, match=f"{key} is disabled; wb.enable"):
        wb.llm()
    assert wb.enable(key).llm().generate(PROMPTS[0], progress=False).token_ids
