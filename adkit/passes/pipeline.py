"""Running a pass: record what it did, keep the graph sound, leave it as it was when the pass fails."""

from __future__ import annotations

import inspect
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node

from adkit.contract import AdkitError, CachePool, CompiledModel, PassError
from adkit.graph.edit import SiteRecord, clean, fake_value, journal
from adkit.graph.identity import identities, node_id
from adkit.graph.snapshot import Snapshot, take, unchanged
from adkit.graph.step import PassInfo, Step
from adkit.passes.base import BuildPass, Context, Pass
from adkit.passes.records import RECORDS, records_of
from adkit.passes.tensors import Stamps, altered, put_tensor, take_stamps, tensor_at

#: Device memory may change by this much (bytes) without being mentioned: allocator rounding, scratch.
_MEMORY_NOISE = 1 << 20


@dataclass
class State:
    """Where a pipeline stands: the module, its snapshot, and what the context held then.

    ``tensors`` says what data stood under each name; ``clean`` that there is no dead code, ``valued`` that
    every node's ``meta["val"]`` holds; ``records`` is what the module's ``meta`` said of weights and plan.
    """

    module: torch.nn.Module | None = None
    snapshot: Snapshot = field(default_factory=Snapshot)
    caches: CachePool | None = None
    compiled: CompiledModel | None = None
    tensors: Stamps = field(default_factory=dict)
    clean: bool = True
    valued: bool = True
    records: dict[str, Any] = field(default_factory=dict)


def ordered(passes: Iterable[Pass]) -> list[Pass]:
    """Passes by stage; within a stage as given."""
    return sorted(passes, key=lambda p: p.config.stage.position)


def pending_step(p: Pass) -> Step:
    """The step of a pass that has not run yet."""
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
    ``state`` stays good but for tensors that the pass changed: the caller puts those back. With
    ``skip_on_error`` the step is marked failed and the pipeline may go on, otherwise PassError is raised with
    the cause.
    """
    step = pending_step(p)
    step.before = step.after = state.snapshot
    if not p.config.enabled:
        return state, step
    ctx.caches, ctx.compiled = state.caches, state.compiled

    def report(text: str) -> None:
        step.log.append(text)
        ctx.overheard(text)

    ctx.report = report
    memory = _device_bytes(ctx.device)
    start = time.perf_counter()
    try:
        new, step.info, step.sites, step.record_seconds = _apply(p, state, ctx)
        step.altered = altered(state.tensors, new.tensors)
    except BaseException as error:
        _undo(state)
        if not isinstance(error, Exception):
            raise
        if p.config.skip_on_error:
            step.status = "failed"
            step.info = PassInfo(skipped=True, reason=f"{type(error).__name__}: {error}")
            step.log.append("".join(traceback.format_exception(error)))
            return state, step
        if isinstance(error, AdkitError):
            error.add_note(f"(in transform {p.key!r}; the graph is as it was before it)")
            raise
        raise PassError(
            f"transform {p.key!r} failed: {type(error).__name__}: {error}. The graph is as it was before it; "
            f"disable it (wb.disable({p.key!r})) or fix it (wb.replace({p.key!r}, ...)) and run again"
        ) from error
    step.after = new.snapshot
    step.status = "skipped" if step.info.skipped else "done"
    step.seconds = time.perf_counter() - start - step.record_seconds
    step.memory_bytes = _device_bytes(ctx.device) - memory
    if abs(step.memory_bytes) > _MEMORY_NOISE and not p.config.expect_mem_change:
        step.log.append(
            f"device memory changed by {step.memory_bytes} bytes, which expect_mem_change does not say"
        )
    if p.config.debug_visualize_dir:
        _visualize(new.snapshot, p, step)
    return new, step


def _apply(p: Pass, state: State, ctx: Context) -> tuple[State, PassInfo, tuple[SiteRecord, ...], float]:
    """The state after the pass, what it says of itself, its rewrites, and the seconds that recording took."""
    if isinstance(p, BuildPass):
        module, info = p.build(state.module, ctx)
        begin = time.perf_counter()
        after = State(module, caches=ctx.caches, compiled=ctx.compiled)
        if isinstance(module, GraphModule):
            identities(module).settle(module.graph)
            after.snapshot = take(module)
            after.tensors = take_stamps(module, after.snapshot, {}, ctx.factory)
            after.clean, after.valued = info.is_clean, info.has_valid_shapes
            after.records = records_of(module)
        return after, info, (), time.perf_counter() - begin
    gm = state.module
    if not isinstance(gm, GraphModule):
        raise PassError(
            f"transform {p.key!r} needs a graph, but nothing has been exported yet: run export_to_gm first"
        )
    with journal(gm) as log:
        if p.config.requires_clean_graph and not state.clean:
            clean(gm)
        if p.config.requires_shape_prop and not state.valued:
            propagate_values(gm)
        info = p.apply(gm, ctx)
        if not isinstance(info, PassInfo):
            raise PassError(f"transform {p.key!r} returned {info!r}; apply() must return a PassInfo")
        cleaned = p.config.run_graph_cleanup and not info.skipped
        if cleaned:
            clean(gm)
        if p.config.run_shape_prop:
            propagate_values(gm)
    begin = time.perf_counter()
    same = unchanged(gm, state.snapshot)  # most passes find nothing in most models: looking is all they cost
    fresh = set() if same else set(identities(gm).settle(gm.graph, log.origins()))
    for record in log.sites:
        record.created = tuple(node_id(n) for n in record.made if n in fresh)
        record.made = []
    try:
        snapshot = state.snapshot if same else take(gm, state.snapshot)
    except KeyError as error:
        raise PassError(
            f"transform {p.key!r} left a broken graph: a node reads {error}, which does not stand before it "
            "(erased, or inserted too late); nothing of the pass was kept"
        ) from error
    valued = info.has_valid_shapes or p.config.run_shape_prop
    if snapshot is not state.snapshot:
        _refuse_broken(p, gm, snapshot, state, valued, ctx)
    tensors = state.tensors
    if snapshot is not state.snapshot or p.loads or any(stamp.loadable for stamp in tensors.values()):
        tensors = take_stamps(gm, snapshot, state.tensors, ctx.factory, p.loads)
    after = State(
        gm, snapshot, ctx.caches, ctx.compiled, tensors,
        clean=cleaned or ((state.clean or p.config.requires_clean_graph) and info.is_clean), valued=valued,
        records=records_of(gm),
    )  # fmt: skip
    return after, info, tuple(log.sites), time.perf_counter() - begin


def _refuse_broken(
    p: Pass, gm: GraphModule, snapshot: Snapshot, state: State, valued: bool, ctx: Context
) -> None:
    """Raise PassError for a graph that could not run, or that no longer is what was compiled."""
    if not len(snapshot) or snapshot.nodes[-1].op != "output":
        raise PassError(f"transform {p.key!r} left a graph without an output; nothing of the pass was kept")
    new = [n for n in snapshot if n.id not in state.snapshot.by_id]
    absent = [n.target for n in new if n.op == "get_attr" and tensor_at(gm, n.target) is None]
    if absent:
        raise PassError(
            f"transform {p.key!r} left nodes that read tensors the module does not have: "
            f"{', '.join(absent[:5])}; "
            "register a parameter or buffer of that name first"
        )
    bare = [
        n.name
        for n in new
        if n.op in ("call_function", "placeholder") and n.val is None and not _valueless(n)
    ]
    if bare and valued:
        raise PassError(
            f"transform {p.key!r} left nodes without a value (meta['val']): {', '.join(bare[:5])}; insert "
            "nodes with "
            "site.call(...), or return PassInfo(has_valid_shapes=False)"
        )
    if state.compiled is not None and ctx.compiled is state.compiled:
        raise PassError(
            f"transform {p.key!r} changed the graph after compile_model, which would not be compiled; move "
            "it before "
            f"(wb.move({p.key!r}, before='compile_model'))"
        )


def propagate_values(gm: GraphModule) -> None:
    """Recompute every call's value (``meta["val"]``) from its inputs' values.

    Layers are alike, and a fake call takes milliseconds: calls of one target on alike values share their result. A
    value that comes out as it was stays the same object.
    """
    known: dict[Any, Any] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        key = (node.target, _alike(node.args), _alike(node.kwargs))
        if key not in known:
            value = fake_value(node.target, node.args, node.kwargs, gm)
            known[key] = value, _alike(value)
        value, kind = known[key]
        if _alike(node.meta.get("val")) != kind:
            node.meta["val"] = value


def _alike(value: Any) -> Any:
    """What of a value decides others' values: sizes (symbolic ones as formulas), strides, dtype, device; hashable."""
    if isinstance(value, Node):
        return _alike(value.meta.get("val"))
    if isinstance(value, torch.Tensor):
        sizes = tuple(map(_size, value.shape)), tuple(map(_size, value.stride()))
        return "tensor", *sizes, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_alike, value))
    if isinstance(value, dict):
        return tuple((k, _alike(v)) for k, v in value.items())
    if isinstance(value, torch.SymInt):
        return "size", _size(value)
    return type(value), str(value)


def _size(d: Any) -> Any:
    return d.node.expr if isinstance(d, torch.SymInt) else int(d)


def _valueless(n: Any) -> bool:
    return isinstance(n.target, torch._ops.OpOverload) and not n.target._schema.returns


def _undo(state: State) -> None:
    """Rebuild ``state``'s graph over what tensors its module still has."""
    gm = state.module
    if isinstance(gm, GraphModule) and len(state.snapshot):
        state.module = rebuild(state.snapshot, gm, state.records)


def rebuild(
    snapshot: Snapshot, tensors: torch.nn.Module, records: dict[str, Any] | None = None
) -> GraphModule:
    """A graph module of ``snapshot`` over ``tensors``.

    Tensors that are absent or of another shape (a rank's part where the snapshot has the whole) become meta
    placeholders, to be reloaded. ``records`` replace what ``tensors`` says of weights and plan (:func:`records_of`).
    """
    for n in snapshot:
        if n.op != "get_attr":
            continue
        have = tensor_at(tensors, n.target)
        if n.val is None or (have is not None and have.shape == n.val.shape):
            continue
        shape = tuple(int(d) for d in n.val.shape)
        put_tensor(tensors, n.target, torch.empty(shape, dtype=n.val.dtype, device="meta"))
    gm = snapshot.build(tensors)
    meta = getattr(tensors, "meta", {})
    gm.meta.update({k: v for k, v in meta.items() if k != "adkit_ids"})
    if records is not None:
        for key in RECORDS:
            gm.meta.pop(key, None)
        gm.meta.update({k: dict(v) if isinstance(v, dict) else v for k, v in records.items()})
    if "adkit_ids" in meta:
        own = identities(gm)
        own.next_id = max(own.next_id, meta["adkit_ids"].next_id)
    if isinstance(tensors, GraphModule):
        # node records keep FX nodes, and those would keep the module that is given up, with all its tensors
        tensors.graph.owning_module = None
    return gm


def _device_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _visualize(snapshot: Snapshot, p: Pass, step: Step) -> None:
    """Write the graph after the pass as a program, and as a picture where that can be drawn."""
    try:
        stem = f"{p.config.stage.position:02d}_{p.key}"
        write_graph(snapshot, Path(p.config.debug_visualize_dir), stem, step.log.append)
    except OSError as error:
        step.log.append(f"the graph was not written to {p.config.debug_visualize_dir}: {error}")


def write_graph(snapshot: Snapshot, folder: Path, stem: str, report: Callable[[str], None]) -> list[str]:
    """Write ``stem.py.txt`` (the program) and ``stem.svg`` (needs graphviz's ``dot``) into ``folder``;
    their names."""
    from adkit.viz import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.py.txt").write_text(snapshot.code(), encoding="utf-8")
    written = [f"{stem}.py.txt"]
    try:
        draw(snapshot).save(str(folder / f"{stem}.svg"))
        written.append(f"{stem}.svg")
    except RuntimeError as error:
        report(str(error))
    return written
