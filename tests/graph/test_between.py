"""What changed between any two points of a pipeline, by the rewrites of the steps between."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.fx import GraphModule

from adkit.graph.diff import diff
from adkit.graph.edit import site
from adkit.graph.identity import identities
from adkit.graph.snapshot import take
from adkit.graph.step import Step, Steps
from tests.graph.samples import aten, run, sample
from tests.graph.toys import alternating

LAYERS = 4


def renamed(old, new):
    """A pass that puts ``new`` in the place of every ``old``, one site each."""

    def apply(gm: GraphModule) -> int:
        found = [n for n in gm.graph.nodes if n.target is old]
        for n in found:
            with site(gm, [n], label=f"to {new}") as s:
                s.replace(n, s.call(new, n.args, like=n))
        return len(found)

    return apply


def joined(gm: GraphModule) -> int:
    """exp(sin(x)) becomes tanh(x)."""
    found = [n for n in gm.graph.nodes if n.target is aten.exp.default]
    for n in found:
        with site(gm, [n.args[0], n], label="joined") as s:
            s.replace(n, s.call(aten.tanh.default, n.args[0].args, like=n))
    return len(found)


@pytest.fixture(scope="module")
def steps() -> Steps:
    """cos -> sin, abs -> exp, exp(sin) -> tanh over layers that take the cosine or negate, in turn."""
    gm = alternating(2 * LAYERS).build(torch.nn.Module())
    identities(gm).settle(gm.graph)
    made = [Step("begin", "export", {}, "", "done", after=take(gm))]
    for name, apply in (
        ("sines", renamed(aten.cos.default, aten.sin.default)),
        ("exps", renamed(aten.abs.default, aten.exp.default)),
        ("negs", renamed(aten.neg.default, aten.sin.default)),
        ("join", joined),
    ):
        made.append(run(gm, name, "pattern_matcher", apply, "", made[-1].after))
    made.append(Step("later", "compile", {}, ""))
    return Steps(made)


def test_sites_that_build_on_each_other_are_one_rewrite(steps: Steps) -> None:
    d = steps.diff("begin")
    assert [(r.count, r.before, r.after, r.label) for r in d.rewrites] == [
        (LAYERS, ("aten.neg", "aten.abs"), ("aten.tanh",), "joined"),
        (LAYERS, ("aten.cos", "aten.abs"), ("aten.tanh",), "joined"),
    ]
    assert d.rewrites[1].layers == "1, 3, 5, 7"


def test_backwards_is_the_same_the_other_way(steps: Steps) -> None:
    assert [(r.count, r.before, r.after) for r in steps.diff("join", "begin").rewrites] == [
        (LAYERS, ("aten.tanh",), ("aten.neg", "aten.abs")),
        (LAYERS, ("aten.tanh",), ("aten.cos", "aten.abs")),
    ]


def test_a_step_with_itself_and_its_neighbour(steps: Steps) -> None:
    assert steps.diff("exps", "exps").empty
    own = steps["exps"].diff
    assert [r.sites for r in steps.diff("sines", "exps").rewrites] == [r.sites for r in own.rewrites]


@pytest.mark.parametrize("backwards", [False, True])
def test_every_changed_node_is_in_one_site(backwards: bool) -> None:
    walk = sample("llama")
    names = [s.name for s in walk if s.changed]
    for pair in itertools.combinations(names, 2):
        a, b = reversed(pair) if backwards else pair
        d, plain = walk.diff(a, b), diff(walk[a].after, walk[b].after)
        for side in ("erased", "created", "changed"):
            told = sorted(i for s in d.sites for i in getattr(s, side))
            assert told == sorted(getattr(plain, side))


def test_the_classes_of_a_real_walk() -> None:
    walk = sample("llama", LAYERS)
    rewrites = walk.diff("export_to_gm").rewrites
    packed = next(r for r in rewrites if "adkit.torch_swiglu_packed" in r.after)
    assert packed.count == LAYERS
    assert sorted(packed.before) == ["aten.linear", "aten.linear", "aten.mul.Tensor", "aten.silu"]


def test_a_step_without_a_graph_is_refused(steps: Steps) -> None:
    with pytest.raises(ValueError, match=r"'later' \(pending\) left no graph"):
        steps.diff("begin", "later")
    with pytest.raises(KeyError, match="did you mean 'begin'"):
        steps.diff("begn")
