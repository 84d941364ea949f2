"""A Workbench that goes its own way from a step of another: a rank starts as one."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from adkit.contract import AdkitError, DistConfig
from adkit.graph.snapshot import take
from adkit.growing import Growing
from adkit.models import ModelFactory
from adkit.passes.pipeline import State, rebuild
from adkit.passes.tensors import put_tensor, take_stamps, tensor_at
from adkit.served import Served
from adkit.watching import Watching

if TYPE_CHECKING:
    from adkit.workbench import Workbench


def fork(
    wb: Workbench, index: int, *, dist: DistConfig | None = None, factory: ModelFactory | None = None
) -> Workbench:
    """A Workbench before step ``index`` of ``wb``, on shapes; what either does from there the other does not see.

    It starts from the graph that stood there, and runs the steps that ``wb`` has not run yet. ``dist``: to walk as
    another rank; ``factory``: the same model with other weights (or none).
    """
    new = copy.copy(wb)
    new.factory = factory or wb.factory
    new._context = replace(
        wb._context, factory=new.factory, weights=new.factory.weights, dist=dist or wb._context.dist,
        caches=None, compiled=None, loaded=frozenset(),
    )  # fmt: skip
    start = min(index, wb.position)
    source = states(wb)[start]
    if len(source.snapshot):
        new._state = _on_shapes(wb, source)
    else:
        start, new._state = 0, State()
    new._passes, new._engine, new._served = list(wb._passes), None, Served()
    new.watching, new.growing = Watching(new), Growing()
    new._history = wb._history[:start]
    new._steps = [replace(s) for s in wb._steps[:start]]
    new._bind()
    if start < index:
        new.run(until=wb._passes[index - 1].key)
    return new


def states(wb: Workbench) -> list[State]:
    """The state before each step that ran, and the present one."""
    return [*wb._history, wb._state]


def graph_module(wb: Workbench) -> GraphModule:
    """The module as it stands; AdkitError where nothing has been exported."""
    if not isinstance(wb._state.module, GraphModule):
        raise AdkitError(f"{wb.name!r} has no graph yet: run through export_to_gm first")
    return wb._state.module


def _on_shapes(wb: Workbench, state: State) -> State:
    """A state over a module of its own: the graph's own constants are shared, weights are shapes."""
    module = graph_module(wb)
    holder = torch.nn.Module()
    holder.meta = {k: v for k, v in module.meta.items() if k != "adkit_journal"}  # type: ignore[assignment]
    for name in dict.fromkeys(n.target for n in state.snapshot if n.op == "get_attr"):
        if name in wb.factory.tensors:
            continue
        stamp = state.tensors.get(name)
        held = stamp.tensor() if stamp is not None else tensor_at(module, name)
        if held is not None and not held.is_meta:
            put_tensor(holder, name, held)
    gm = rebuild(state.snapshot, holder, state.records)
    snapshot = take(gm)
    tensors = take_stamps(gm, snapshot, {}, wb.factory)
    return State(gm, snapshot, tensors=tensors, clean=state.clean, valued=state.valued, records=state.records)


__all__ = ["fork", "graph_module", "states"]
