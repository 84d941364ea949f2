"""Running a pass: record what it did, keep the graph sound, leave it as it was when the pass fails."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from adkit.contract import AdkitError, CachePool, CompiledModel, PassError
from adkit.graph.edit import clean, journal
from adkit.graph.identity import identities
from adkit.graph.snapshot import Snapshot, take
from adkit.graph.step import PassInfo, Step
from adkit.passes.base import BuildPass, Context, Pass


@dataclass
class State:
    """Where a pipeline stands: the module, its snapshot, and what the context held then."""

    module: torch.nn.Module | None = None
    snapshot: Snapshot = field(default_factory=Snapshot)
    caches: CachePool | None = None
    compiled: CompiledModel | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def ordered(passes: Iterable[Pass]) -> list[Pass]:
    """Passes by stage; within a stage as given."""
    return sorted(passes, key=lambda p: p.config.stage.position)


def pending_step(p: Pass) -> Step:
    """The step of a pass that has not run yet."""
    import inspect

    return Step(
        name=p.key,
        stage=p.config.stage.value,
        config=p.config.model_dump(mode="json"),
        doc=inspect.cleandoc(p.__doc__ or ""),
        status="pending" if p.config.enabled else "disabled",
    )


def run_pass(p: Pass, state: State, ctx: Context) -> tuple[State, Step]:
    """Run one pass from ``state``; returns the state after it and its step.

    On an exception (an interrupt too) the graph of ``state`` is rebuilt in place of the half-changed one, so
    ``state`` stays good; with ``skip_on_error`` the step is marked failed and the pipeline may go on, otherwise
    PassError is raised with the cause.
    """
    step = pending_step(p)
    step.before = step.after = state.snapshot
    if not p.config.enabled:
        return state, step
    ctx.caches, ctx.compiled, ctx.facts = state.caches, state.compiled, dict(state.facts)
    ctx.report = step.log.append
    memory = _device_bytes(ctx.device)
    start = time.perf_counter()
    try:
        module, info, snapshot, sites, record = _apply(p, state, ctx, start)
    except BaseException as error:
        _undo(state)
        if isinstance(error, Exception) and p.config.skip_on_error:
            step.status = "failed"
            step.info = PassInfo(skipped=True, reason=f"{type(error).__name__}: {error}")
            step.log.append("".join(traceback.format_exception(error)))
            return state, step
        if isinstance(error, AdkitError) or not isinstance(error, Exception):
            raise
        raise PassError(
            f"transform {p.key!r} failed: {type(error).__name__}: {error}. The graph is as it was before it; "
            f"disable it (wb.disable({p.key!r})) or fix it and run again"
        ) from error
    step.after, step.info, step.sites = snapshot, info, sites
    step.status = "skipped" if info.skipped else "done"
    step.record_seconds = record
    step.seconds = time.perf_counter() - start - record
    step.memory_bytes = _device_bytes(ctx.device) - memory
    if p.config.debug_visualize_dir:
        _visualize(snapshot, p)
    return State(module, snapshot, ctx.caches, ctx.compiled, ctx.facts), step


def _apply(
    p: Pass, state: State, ctx: Context, start: float
) -> tuple[torch.nn.Module, PassInfo, Snapshot, tuple[Any, ...], float]:
    if isinstance(p, BuildPass):
        module, info = p.build(state.module, ctx)
        begin = time.perf_counter()
        snapshot = Snapshot()
        if isinstance(module, GraphModule):
            identities(module).settle(module.graph)
            snapshot = take(module)
        return module, info, snapshot, (), time.perf_counter() - begin
    gm = state.module
    if not isinstance(gm, GraphModule):
        raise PassError(f"transform {p.key!r} needs a graph, but nothing has been exported yet: run export_to_gm first")
    with journal(gm) as log:
        info = p.apply(gm, ctx)
        if p.config.run_graph_cleanup and not info.skipped:
            clean(gm)
    begin = time.perf_counter()
    fresh = set(identities(gm).settle(gm.graph, log.origins()))
    from adkit.graph.identity import node_id

    for record in log.sites:
        record.created = tuple(node_id(n) for n in record.made if n in fresh)
        record.made = []
    try:
        snapshot = take(gm, state.snapshot)
    except KeyError as error:
        raise PassError(
            f"transform {p.key!r} left a broken graph: a node reads {error}, which does not stand before it "
            "(erased, or inserted too late); nothing of the pass was kept"
        ) from error
    if snapshot.nodes == state.snapshot.nodes:
        snapshot = state.snapshot
    if info.has_valid_shapes:
        bare = [n.name for n in snapshot if n.op in ("call_function", "placeholder") and n.id not in state.snapshot.by_id
                and n.val is None and not _valueless(n)]
        if bare:
            raise PassError(
                f"transform {p.key!r} left nodes without a value (meta['val']): {', '.join(bare[:5])}; insert nodes with "
                "site.call(...), or return PassInfo(has_valid_shapes=False)"
            )
    return gm, info, snapshot, tuple(log.sites), time.perf_counter() - begin


def _valueless(n: Any) -> bool:
    return isinstance(n.target, torch._ops.OpOverload) and not n.target._schema.returns


def _undo(state: State) -> None:
    """Rebuild ``state``'s graph over what tensors its module still has."""
    gm = state.module
    if isinstance(gm, GraphModule) and len(state.snapshot):
        state.module = rebuild(state.snapshot, gm)


def rebuild(snapshot: Snapshot, tensors: torch.nn.Module) -> GraphModule:
    """A graph module of ``snapshot`` over ``tensors``; tensors it lacks become meta placeholders to be reloaded."""
    holder = tensors
    missing = [n for n in snapshot if n.op == "get_attr" and not _has(holder, n.target)]
    for n in missing:
        put_tensor(holder, n.target, torch.empty(tuple(int(d) for d in n.val.shape), dtype=n.val.dtype, device="meta"))
    gm = snapshot.build(holder)
    ids = getattr(tensors, "meta", {}).get("adkit_ids")
    gm.meta.update({k: v for k, v in getattr(tensors, "meta", {}).items() if k != "adkit_ids"})
    if ids is not None:
        own = identities(gm)
        own.next_id = max(own.next_id, ids.next_id)
    return gm


def _has(module: torch.nn.Module, path: str) -> bool:
    at: Any = module
    for part in path.split("."):
        if not hasattr(at, part):
            return False
        at = getattr(at, part)
    return True


def put_tensor(module: torch.nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Set the tensor at dotted ``path``, making modules on the way; a Parameter where it is floating point."""
    *parents, name = path.split(".")
    at = module
    for part in parents:
        if not hasattr(at, part):
            setattr(at, part, torch.nn.Module())
        at = getattr(at, part)
    old = getattr(at, name, None)
    if hasattr(at, name):
        delattr(at, name)
    if isinstance(old, torch.nn.Parameter) or (old is None and tensor.is_floating_point()):
        at.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    else:
        at.register_buffer(name, tensor, persistent=False)


def _device_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _visualize(snapshot: Snapshot, p: Pass) -> None:
    from pathlib import Path

    folder = Path(p.config.debug_visualize_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{p.config.stage.position:02d}_{p.key}.txt").write_text(snapshot.code(), encoding="utf-8")
