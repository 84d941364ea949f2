"""Graphs as JSON: sizes, arguments and targets come back; nothing in a file can name code to run."""

from __future__ import annotations

import json
import operator

import pytest
import sympy
import torch

from adkit.graph.serialize import (
    SnapshotReader,
    SnapshotWriter,
    decode,
    decode_target,
    encode,
    encode_target,
    parse_expr,
)
from adkit.graph.snapshot import Ref


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -1.5,
        "text",
        (1, 2),
        [1, (2, None)],
        {"a": [1]},
        slice(None, 3, 2),
        Ref(7),
        (Ref(1), [Ref(2)]),
        torch.float16,
        torch.channels_last,
        torch.strided,
        torch.device("cpu"),
        float("inf"),
    ],
)
def test_arguments_come_back(value):
    again = decode(json.loads(json.dumps(encode(value))))
    assert again == value
    assert type(again) is type(value)


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(TypeError, match="cannot store an argument of type object"):
        encode(object())
    with pytest.raises(TypeError, match="only torch operators"):
        encode_target(print)


@pytest.mark.parametrize(
    "target", [torch.ops.aten.add.Tensor, operator.getitem, operator.floordiv, torch.sym_max]
)
def test_targets_come_back(target):
    assert decode_target("call_function", encode_target(target)) is target


@pytest.mark.parametrize(
    "text",
    [
        "py::operator.methodcaller",
        "py::operator.attrgetter",
        "py::operator.call",
        "py::os.system",
        "py::torch.load",
        "py::builtins.eval",
        "aten::no_such_op.default",
        "load_library::x.y",
        "aten::add.__class__",
        "nonsense",
    ],
)
def test_a_target_that_is_no_operator_is_refused(text):
    with pytest.raises(ValueError, match="names the operator"):
        decode_target("call_function", text)


@pytest.mark.parametrize("value", [{"torch": "load"}, {"torch": "hub"}, {"unknown": 1}])
def test_an_argument_that_is_no_value_is_refused(value):
    with pytest.raises(ValueError, match="unknown kind"):
        decode(value)


def test_size_expressions_are_read_and_nothing_else():
    names = {}

    def symbol(name):
        return names.setdefault(name, sympy.Symbol(name, integer=True, positive=True))

    got = parse_expr("2*s0 + s1**2 - FloorDiv(s0, 4)", symbol)
    assert got.subs({names["s0"]: 9, names["s1"]: 3}) == 18 + 9 - 2
    for bad in ("__import__('os')", "s0.real", "s0[0]", "(lambda: 1)()", "s0 if s1 else 2", "s0("):
        with pytest.raises(ValueError, match="size expression"):
            parse_expr(bad, symbol)


def test_a_graph_comes_back_and_runs(exported):
    from adkit.checking import logits
    from adkit.passes.pipeline import rebuild

    wb = exported().run(until="gather_logits_before_lm_head")
    writer = SnapshotWriter()
    rows = writer.add(wb.graph)
    assert writer.add(wb.graph) == rows, "shared rows are stored once"
    again = SnapshotReader(json.loads(json.dumps(writer.payload()))).snapshot(rows)
    assert again.code() == wb.graph.code()
    assert [n.origins for n in again] == [n.origins for n in wb.graph]
    for a, b in zip(again, wb.graph, strict=True):
        if isinstance(b.val, torch.Tensor):
            assert a.val.dtype == b.val.dtype
            assert [isinstance(d, int) for d in a.val.shape] == [isinstance(d, int) for d in b.val.shape]
    gm = rebuild(again, wb.module)
    assert all(
        torch.equal(a, b) for a, b in zip(logits(gm, again, wb), logits(wb.module, wb.graph, wb), strict=True)
    )


def test_another_format_is_refused():
    with pytest.raises(ValueError, match="this version reads 1"):
        SnapshotReader({"format": 99, "texts": [], "records": []})
