"""A pass may keep a tensor of its own in the graph."""

from __future__ import annotations

import torch
from torch.fx import symbolic_trace

from adkit.graph.edit import fake_value, site


def test_a_constant_is_a_buffer_that_no_checkpoint_has():
    gm = symbolic_trace(lambda x: torch.relu(x))
    relu = next(n for n in gm.graph.nodes if n.op == "call_function")
    table = torch.arange(6.0).reshape(2, 3)
    with site(gm, [relu], label="shift") as s:
        held = s.constant("shift", table)
        s.replace(relu, s.call(torch.add, (relu.args[0], held), like=relu))
    gm.recompile()
    assert held.target == "adkit_const_shift"
    assert held.meta["val"].shape == (2, 3)
    assert held.target not in gm.state_dict()
    assert torch.equal(gm(torch.ones(2, 3)), table + 1)


def test_a_constant_has_fixed_sizes_among_fake_values():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    gm = symbolic_trace(lambda x: torch.relu(x))
    relu = next(n for n in gm.graph.nodes if n.op == "call_function")
    mode = FakeTensorMode(shape_env=ShapeEnv())
    for n in gm.graph.nodes:
        n.meta["val"] = mode.from_tensor(torch.ones(4, 3))
    with site(gm, [relu], label="shift") as s:
        held = s.constant("shift", torch.ones(3))
        s.replace(relu, s.call(torch.add, (relu.args[0], held), like=relu))
    assert tuple(held.meta["val"].shape) == (3,)
    assert isinstance(held.meta["val"].shape[0], int)
    assert fake_value(torch.neg, (held,), {}).shape == (3,)
