"""Ids, snapshots and diffs: exact on any edit, exact about where it happened."""

import operator
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule

from adkit.graph.diff import diff, ranges
from adkit.graph.edit import clean, journal, site
from adkit.graph.identity import identities, node_id, tag_of
from adkit.graph.snapshot import Ref, Snapshot, take
from adkit.graph.step import Step, Steps


def chain(length: int) -> GraphModule:
    """x -> neg -> neg -> ... (length nodes)."""
    graph = Graph()
    node = graph.placeholder("x")
    for _ in range(length):
        node = graph.call_function(torch.ops.aten.neg.default, (node,))
    graph.output((node,))
    gm = GraphModule(torch.nn.Module(), graph)
    identities(gm).settle(gm.graph)
    return gm


def run_recorded(gm, edit):
    """(before, after, journal) of ``edit(gm)``, recorded as the pipeline does."""
    before = take(gm)
    with journal(gm) as log:
        edit(gm)
    fresh = set(identities(gm).settle(gm.graph, log.origins()))
    for record in log.sites:
        record.created = tuple(node_id(n) for n in record.made if n in fresh)
    return before, take(gm, before), log


def calls(gm):
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def test_ids_are_stable_and_never_reused():
    gm = chain(4)
    ids = {n.name: node_id(n) for n in gm.graph.nodes}

    def edit(gm):
        last = calls(gm)[-1]
        with gm.graph.inserting_after(last):
            new = gm.graph.call_function(torch.ops.aten.abs.default, (last.args[0],))
        last.replace_all_uses_with(new)
        gm.graph.erase_node(last)

    before, after, _ = run_recorded(gm, edit)
    for n in after:
        if n.name in ids and n.target is not torch.ops.aten.abs.default:
            assert ids[n.name] == n.id
    (new,) = diff(before, after).created
    assert new > max(ids.values())


def test_a_copied_node_gets_its_own_id_and_the_original_as_origin():
    gm = chain(2)
    first = calls(gm)[0]

    def edit(gm):
        with gm.graph.inserting_after(first):
            copy = gm.graph.node_copy(first)
        calls(gm)[-1].args = (copy,)

    before, after, _ = run_recorded(gm, edit)
    (new,) = diff(before, after).created
    assert after[new].origins == (node_id(first),)
    assert tag_of(first).id == node_id(first)


def test_unchanged_nodes_share_their_record():
    gm = chain(6)
    last = calls(gm)[-1]
    before, after, _ = run_recorded(gm, lambda gm: last.update_arg(0, calls(gm)[0]))
    same = sum(a is b for a, b in zip(before.nodes, after.nodes, strict=True))
    assert same == len(before) - 1
    assert diff(before, after).changed == (node_id(last),)


def test_replacing_a_reader_input_by_its_successor_is_not_a_change_of_the_reader():
    gm = chain(3)
    a, b, _ = calls(gm)

    def edit(gm):
        with site(gm, [b], label="swap") as s:
            s.replace(b, s.call(torch.ops.aten.abs.default, (a,)))

    before, after, _ = run_recorded(gm, edit)
    d = diff(before, after)
    assert d.changed == ()
    assert len(d.erased) == len(d.created) == 1


def test_sites_of_one_shape_are_one_class_with_layers():
    gm = chain(8)
    for i, n in enumerate(calls(gm)):
        n.meta["nn_module_stack"] = {"m": (f"model.layers.{i // 2}.mlp", "MLP")}

    def edit(gm):
        nodes = calls(gm)
        for i in range(0, 8, 2):
            with site(gm, nodes[i : i + 2], label="pair") as s:
                s.replace(nodes[i + 1], s.call(torch.ops.aten.abs.default, (nodes[i].args[0],)))

    before, after, log = run_recorded(gm, edit)
    (rewrite,) = diff(before, after, log.sites).rewrites
    assert rewrite.count == 4
    assert rewrite.layers == "0-3"
    assert rewrite.before == ("aten.neg", "aten.neg")
    assert rewrite.after == ("aten.abs",)


def test_undeclared_edits_are_grouped_by_connection():
    gm = chain(9)

    def edit(gm):
        nodes = calls(gm)
        for i in (1, 5):
            with gm.graph.inserting_after(nodes[i]):
                new = gm.graph.call_function(torch.ops.aten.abs.default, (nodes[i].args[0],))
            nodes[i].replace_all_uses_with(new)
            gm.graph.erase_node(nodes[i])

    before, after, log = run_recorded(gm, edit)
    (rewrite,) = diff(before, after, log.sites).rewrites
    assert rewrite.count == 2
    for s in rewrite.sites:
        assert after[s.created[0]].origins == s.erased


def test_site_of_a_rewrite_carries_values_and_provenance():
    gm = chain(2)
    last = calls(gm)[-1]
    for n in gm.graph.nodes:
        n.meta["val"] = torch.empty(3, device="meta")
    last.meta["stack_trace"] = 'File "a/transformers/models/x/modeling_x.py", line 7, in forward\n    y = -x'
    with site(gm, [last], label="t") as s:
        new = s.call(torch.ops.aten.abs.default, (last.args[0],))
        s.replace(last, new)
    assert new.meta["val"].shape == (3,)
    assert new.meta["stack_trace"] == last.meta["stack_trace"]
    assert last not in gm.graph.nodes


def test_a_snapshot_builds_a_graph_that_computes_the_same():
    gm = chain(3)
    again = take(gm).build(torch.nn.Module())
    again.recompile()
    x = torch.randn(4)
    assert torch.equal(again(x)[0], gm(x)[0])
    assert [node_id(n) for n in again.graph.nodes] == [node_id(n) for n in gm.graph.nodes]


def test_clean_erases_dead_code_and_keeps_inputs():
    gm = chain(1)
    x = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(x):
        gm.graph.call_function(operator.add, (x, 1))
    assert clean(gm) == 1
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_function", "output"]


def test_building_over_a_module_without_a_tensor_names_it():
    graph = Graph()
    graph.output(graph.get_attr("a.weight"))
    holder = torch.nn.Module()
    holder.a = torch.nn.Module()
    holder.a.weight = torch.nn.Parameter(torch.zeros(1))
    gm = GraphModule(holder, graph)
    identities(gm).settle(gm.graph)
    with pytest.raises(AttributeError, match=r"'a\.weight'"):
        take(gm).build(torch.nn.Module())


@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.sampled_from(["swap", "drop", "add", "rewire"]), st.integers(0, 99)), max_size=8),
)
@settings(max_examples=60)
def test_any_edit_is_told_exactly(length, edits):
    gm = chain(length)
    old = {node_id(n): (n.target, [node_id(a) for a in n.all_input_nodes]) for n in gm.graph.nodes}
    old_objects = set(gm.graph.nodes)

    def edit(gm):
        for kind, at in edits:
            nodes = calls(gm)
            if not nodes:
                return
            n = nodes[at % len(nodes)]
            if kind == "drop":
                n.replace_all_uses_with(n.args[0])
                gm.graph.erase_node(n)
            elif kind == "rewire":
                n.args = (next(iter(gm.graph.nodes)),)
            else:
                with gm.graph.inserting_after(n):
                    new = gm.graph.call_function(torch.ops.aten.abs.default, (n,))
                if kind == "swap":
                    n.replace_all_uses_with(new)
                    new.args = n.args
                    gm.graph.erase_node(n)

    before, after, log = run_recorded(gm, edit)
    d = diff(before, after, log.sites)
    assert set(d.erased) == set(old) - {node_id(n) for n in gm.graph.nodes}
    assert set(d.created) == {node_id(n) for n in gm.graph.nodes if n not in old_objects}
    assert len({n.id for n in after}) == len(after)
    touched = [i for s in d.sites for i in (*s.erased, *s.created, *s.changed)]
    assert sorted(touched) == sorted((*d.erased, *d.created, *d.changed))
    # what the diff calls unchanged reads what it read before, or what stands in an erased input's place
    for n in after:
        if n.id in old and n.id not in d.changed:
            for was, now in zip(old[n.id][1], n.inputs(), strict=True):
                assert was == now or (
                    was in d.erased and (now in d.created or now in behind(was, old, d.erased))
                )


def behind(node, old, erased):
    """The first kept node that a chain of erased ones read from."""
    while node in erased:
        (node,) = old[node][1]
    return {node}


def test_ranges_reads_as_people_write_them():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""


def test_record_arguments_hold_references_not_nodes():
    gm = chain(2)
    snapshot = take(gm)
    assert snapshot.nodes[2].args == (Ref(snapshot.nodes[1].id),)
    assert snapshot.nodes[2].inputs() == [snapshot.nodes[1].id]


def test_records_print_in_one_line_without_paths_of_this_machine():
    record = take(chain(1)).nodes[1]
    assert re.fullmatch(r"%1 neg\w*: call_function aten\.neg\(%0\)", repr(record))


def test_a_graph_without_nodes_has_an_empty_table():
    assert list(Snapshot().table().columns)[:2] == ["name", "op"]
    assert len(Snapshot().table()) == 0


def test_steps_take_keys_indices_and_slices():
    steps = Steps([Step(name, "export", {}, "") for name in ("one", "two", "three")])
    assert steps["two"] is steps[1] is steps[-2]
    assert steps[1:].keys() == ["two", "three"]
    with pytest.raises(IndexError, match="no step 3: the pipeline has 3"):
        steps[3]
    with pytest.raises(KeyError, match="did you mean 'two'"):
        steps["tow"]


def test_the_value_of_a_new_node_leaves_the_sizes_of_the_graph_symbolic():
    """torch 2.11's linear reads sizes as numbers unless its Python decomposition is taken."""
    model = torch.nn.Linear(4, 3)
    dims = {"input": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (), {"input": torch.zeros(2, 5, 4)}, dynamic_shapes=dims)
    gm = program.module(check_guards=False)
    linear = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    with site(gm, [linear], label="again") as s:
        new = s.call(linear.target, linear.args)
    assert [type(d) for d in new.meta["val"].shape] == [torch.SymInt, torch.SymInt, int]
    assert all(d.node.expr.free_symbols for d in linear.args[0].meta["val"].shape[:2])
