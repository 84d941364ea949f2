"""Where a Workbench has been: standing before an earlier step again, with the tensors and caches it had then."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch.fx import GraphModule

from adkit.contract import CachePool
from adkit.graph.snapshot import take
from adkit.models.export import retarget_device
from adkit.models.loading import graph_tensor_names, load_graph_tensors
from adkit.passes.pipeline import State, pending_step, rebuild
from adkit.passes.pipeline_cache import PipelineCache, fingerprint
from adkit.passes.records import records_of
from adkit.passes.tensors import lost, restore, take_stamps, tensor_at

if TYPE_CHECKING:
    from adkit.workbench import Workbench


def start_from_cache(wb: Workbench, stop: int) -> None:
    """Start from the latest enabled ``pipeline_cache`` whose entry can be read."""

    def loading(done: int, total: int) -> None:
        wb._context.progress(done, total, "loading")

    for i in range(stop - 1, -1, -1):
        p = wb._passes[i]
        if not isinstance(p, PipelineCache) or not p.config.enabled:
            continue
        wb._context.fingerprint = fingerprint(wb._context, wb._passes[:i])
        wb.watching.starts(p.key)
        entry = p.find(wb._context)
        if entry is None:
            continue
        snapshot, holder, caches = entry
        gm = rebuild(snapshot, holder)
        snapshot = take(gm)  # records of the nodes just made, which later steps can then share
        state = State(gm, snapshot, caches, records=records_of(gm))
        past = wb._past_loading(i) and wb.factory.weights != "none"
        if past:
            with wb.bars:
                load_graph_tensors(gm, wb.factory, _on_meta(gm), wb.device, loading)
            retarget_device(gm, wb.device)
        state.tensors = take_stamps(gm, snapshot, {}, wb.factory, past)
        for j in range(i + 1):
            step = pending_step(wb._passes[j])
            step.status, step.after, step.before = "skipped", snapshot, snapshot
            step.info.reason = f"restored from the pipeline cache ({wb._context.fingerprint})"
            wb._steps[j] = step
        wb._history = [State()] * (i + 1)
        wb._state = state
        wb._bind()
        wb.watching.restored()
        return


def return_to(wb: Workbench, index: int) -> None:
    """Stand before step ``index``, which has a graph, or after the last step when it is the position."""
    leaving = wb._state
    states = [*wb._history, leaving]
    module = cast(GraphModule, leaving.module)
    good = index
    while good > 0 and len(states[good].snapshot) and lost(_reads(states[good]), states[good].tensors):
        good -= 1  # what that state read was changed since, by a pass that left no copy: run the pass again
    target = states[good]
    if not len(target.snapshot):
        wb._state, wb._history = State(), []
        wb._reset_steps(0)
    else:
        gm = rebuild(target.snapshot, module, target.records)
        target = replace(target, module=gm, tensors=dict(target.tensors), caches=_fresh(wb, target.caches))
        again = restore(gm, _reads(target), target.tensors, leaving.tensors)
        wb._state, wb._history = target, wb._history[:good]
        if good < len(states) - 1:
            wb._reset_steps(good)
        del leaving, module, states  # frees what only later steps used
        _reload(wb, again)
    while wb.position < index:
        wb.step()


def _fresh(wb: Workbench, caches: CachePool | None) -> CachePool | None:
    """A cache to go on with: one that an engine writes to stays that engine's; one without memory gets
    it back."""
    if caches is None or not caches.num_pages:
        return caches
    if caches.tensors and not wb._served.uses(caches):
        return caches
    new = replace(caches, tensors={})
    new.allocate(new.num_pages, torch.device("meta") if wb.factory.weights == "none" else wb.device)
    return new


def _reload(wb: Workbench, names: list[str]) -> None:
    """Read tensors again; when that fails, stand before the weights were loaded, where shapes are
    enough."""
    if not names:
        return
    gm = cast(GraphModule, wb._state.module)
    try:
        with wb.bars:
            load_graph_tensors(gm, wb.factory, names, wb.device, wb.bars.loading)
    except BaseException:
        first = next(i for i, p in enumerate(wb._passes) if p.loads and p.config.enabled)
        wb._state = replace(wb._state, tensors={n: s for n, s in wb._state.tensors.items() if n not in names})
        wb.rewind(first)
        raise
    for name in names:
        wb._state.tensors[name].renew(cast(torch.Tensor, tensor_at(gm, name)))


def _reads(state: State) -> list[str]:
    """Names of the tensors a state's graph reads."""
    return list(dict.fromkeys(n.target for n in state.snapshot if n.op == "get_attr"))


def _on_meta(gm: GraphModule) -> list[str]:
    """Names of the tensors the graph reads that have no data."""
    return [n for n in graph_tensor_names(gm) if cast(torch.Tensor, tensor_at(gm, n)).is_meta]
