"""The one object a notebook holds: a model, its pipeline, and every step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.fx import GraphModule

from adkit.checking import CheckResult, Checks, check_step, first_bad_step
from adkit.config import AdkitConfig, Fragment, load_config
from adkit.contract import AdkitError, ConfigError, ModelError, nearest
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import Step, Steps
from adkit.models import ModelFactory, resolve
from adkit.models.export import retarget_device
from adkit.models.loading import load_graph_tensors
from adkit.passes import Context, Pass, Stage, get_pass
from adkit.passes.pipeline_cache import PipelineCache, fingerprint, read_entry
from adkit.passes.pipeline import State, ordered, pending_step, rebuild, run_pass


class Workbench:
    """A model on the bench: run its pipeline step by step, look at each, change it, generate.

    ``model``: ``"demo"``, a bundled config's name, a local directory, a Hugging Face id, or a config object.
    ``config``: YAML fragments (paths or mappings) merged in order over the defaults; ``overrides``:
    ``"transforms.fuse_gemms.enabled=false"``; other keywords are engine fields (``max_seq_len=512``).
    ``random_weights=True`` makes seeded weights on the device when there is no checkpoint. ``force=True``
    goes on although the memory estimate says that the model does not fit.

    Raises ModelError when the model cannot be found, ConfigError for settings that cannot be.
    """

    def __init__(
        self,
        model: Any,
        *,
        config: Fragment | Sequence[Fragment] = (),
        overrides: Sequence[str] = (),
        random_weights: bool = False,
        seed: int = 0,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
        force: bool = False,
        progress: bool = True,
        **engine: Any,
    ) -> None:
        fragments = [config] if isinstance(config, (str, Path, dict)) else list(cast(Iterable[Fragment], config))
        if force:
            overrides = [*overrides, "transforms.load_weights.force=true"]
        self.config: AdkitConfig = load_config(fragments, overrides, **engine)
        self.device = self._device()
        self.factory: ModelFactory = resolve(
            model,
            dtype=self.config.dtype,
            device=self.device,
            random_weights=random_weights,
            seed=seed,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        self.progress = progress
        self._context = Context(
            factory=self.factory, engine=self.config.engine, device=self.device, weights=self.factory.weights
        )
        self._context.progress = self._bar
        self._passes: list[Pass] = ordered(get_pass(k)(c) for k, c in self.config.transforms.items())
        self._state = State()
        self._history: list[State] = []  # the state before each step that ran, without its module
        self._steps: list[Step] = []
        self._bars: dict[str, Any] = {}
        self._bind()

    def _device(self) -> torch.device:
        device = self.config.engine.resolved_device()
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device is {self.config.device!r} but torch sees no CUDA device; use device='cpu' or 'auto'")
        return device

    # --- looking

    @property
    def name(self) -> str:
        """The model's name."""
        return self.factory.name

    @property
    def steps(self) -> Steps:
        """Every step of the pipeline, run or pending; takes a key, an index, a negative index."""
        return Steps(list(self._steps))

    @property
    def position(self) -> int:
        """How many steps have run."""
        return len(self._history)

    @property
    def graph(self) -> Snapshot:
        """The graph as it stands; empty before export."""
        return self._state.snapshot

    @property
    def module(self) -> torch.nn.Module | None:
        """The module as it stands, runnable: the HF module before export, a GraphModule after."""
        module = self._state.module
        if isinstance(module, GraphModule):
            module.recompile()
        return module

    @property
    def loaded(self) -> bool:
        """True when weights are in."""
        return any(s.stage == Stage.WEIGHT_LOAD and s.name == "load_weights" and s.status == "done" for s in self._done())

    def _done(self) -> list[Step]:
        return self._steps[: self.position]

    # --- running

    def run(self, until: str | None = None) -> Workbench:
        """Run the steps that remain, through a stage or a transform key if ``until`` names one.

        Returns the Workbench. An error leaves it at the last good step.
        """
        stop = self._end_of(until) if until is not None else len(self._passes)
        if self.position == 0:
            self._restore(stop)
        while self.position < stop:
            self.step()
        return self

    def step(self) -> Step:
        """Run the next step and return it; IndexError when none remains."""
        i = self.position
        if i >= len(self._passes):
            raise IndexError("every step of this pipeline has run; wb.rewind(...) goes back")
        p = self._passes[i]
        if isinstance(p, PipelineCache):
            self._context.fingerprint = fingerprint(self._context, self._passes[:i])
        before = self._state
        with self._progress():
            state, step = run_pass(p, before, self._context)
        self._history.append(_without_module(before))
        self._state = state
        self._steps[i] = step
        self._bind()
        return step

    def _restore(self, stop: int) -> None:
        """Start from the latest enabled ``pipeline_cache`` whose entry is on disk."""
        for i in range(stop - 1, -1, -1):
            p = self._passes[i]
            if not isinstance(p, PipelineCache) or not p.config.enabled:
                continue
            self._context.fingerprint = fingerprint(self._context, self._passes[:i])
            folder = p.entry(self._context.fingerprint)
            if not (folder / "graph.json").is_file():
                continue
            snapshot, holder, caches = read_entry(folder, self._context)
            gm = rebuild(snapshot, holder)
            if any(q.key == "load_weights" and q.config.enabled for q in self._passes[:i]) and self.factory.weights != "none":
                load_graph_tensors(gm, self.factory, _on_meta(gm), self.device)
                retarget_device(gm, self.device)
            for j in range(i + 1):
                step = pending_step(self._passes[j])
                step.status, step.after, step.before = "skipped", snapshot, snapshot
                step.info.reason = f"restored from the pipeline cache ({folder.name})"
                self._steps[j] = step
            self._history = [State()] * (i + 1)
            self._state = State(gm, snapshot, caches)
            self._bind()
            return

    def rewind(self, to: str | int = 0) -> Workbench:
        """Go back to just before the step ``to`` (key or index); what came before is kept.

        After weights were loaded only tensors that later steps changed are read again.
        """
        index = to if isinstance(to, int) else self._index(to)
        if index >= self.position:
            return self
        target = self._history[index]
        module = self._state.module
        if len(target.snapshot) and isinstance(module, GraphModule):
            state = State(None, target.snapshot, target.caches, target.compiled, dict(target.facts))
            self._state = State()  # frees what only later steps used
            gm = rebuild(target.snapshot, module)
            if any(s.name == "load_weights" and s.status == "done" for s in self._steps[:index]):
                load_graph_tensors(gm, self.factory, _on_meta(gm), self.device)
            state.module = gm
            self._state = state
            self._history = self._history[:index]
        else:
            keep = min(index, self._index_of_first_graph())
            self._state, self._history = State(), []
            index = 0
            self._reset_steps(0)
            while self.position < keep:
                self.step()
            return self
        self._reset_steps(index)
        return self

    def _index_of_first_graph(self) -> int:
        return next((i for i, s in enumerate(self._history) if len(s.snapshot)), len(self._history))

    def _reset_steps(self, index: int) -> None:
        self._steps = self._steps[:index] + [pending_step(p) for p in self._passes[index:]]
        self._bind()

    # --- changing the pipeline

    def insert(self, new: Pass | type[Pass], *, after: str | None = None, before: str | None = None) -> Workbench:
        """Add a pass after or before another (default: at the end of its stage); rewinds to its place."""
        p = new() if isinstance(new, type) else new
        if any(q.key == p.key for q in self._passes):
            raise ConfigError(f"the pipeline has a step {p.key!r} already; replace({p.key!r}, ...) swaps it")
        if after is not None:
            index = self._index(after) + 1
        elif before is not None:
            index = self._index(before)
        else:
            index = sum(q.config.stage.position <= p.config.stage.position for q in self._passes)
        self._edit(index, lambda passes: passes.insert(index, p))
        return self

    def replace(self, key: str, new: Pass | type[Pass]) -> Workbench:
        """Swap one pass for another; rewinds to its place."""
        p = new() if isinstance(new, type) else new
        index = self._index(key)
        self._edit(index, lambda passes: passes.__setitem__(index, p))
        return self

    def configure(self, key: str, **fields: Any) -> Workbench:
        """Change fields of one transform's config; rewinds to its place."""
        index = self._index(key)
        p = self._passes[index]
        for name in fields:
            if name not in type(p.config).model_fields:
                raise ConfigError(f"transform {key!r} has no field {name!r}{nearest(name, type(p.config).model_fields)}")
        config = type(p.config)(**{**p.config.model_dump(), **fields})
        self._edit(index, lambda passes: passes.__setitem__(index, _with_config(p, config)))
        return self

    def disable(self, key: str) -> Workbench:
        """Switch a transform off; rewinds to its place."""
        return self.configure(key, enabled=False)

    def enable(self, key: str) -> Workbench:
        """Switch a transform on; rewinds to its place."""
        return self.configure(key, enabled=True)

    def move(self, key: str, *, after: str | None = None, before: str | None = None) -> Workbench:
        """Reorder one transform; rewinds to the earlier of its two places."""
        if (after is None) == (before is None):
            raise ConfigError("move() takes exactly one of after= and before=")
        old = self._index(key)
        p = self._passes[old]
        passes = [q for q in self._passes if q is not p]
        anchor = next((i for i, q in enumerate(passes) if q.key == (after or before)), None)
        if anchor is None:
            self._index(cast(str, after or before))
            raise ConfigError(f"cannot move {key!r} next to itself")
        new = anchor + (after is not None)
        passes.insert(new, p)
        self.rewind(min(old, new))
        self._passes = passes
        self._reset_steps(self.position)
        return self

    def _edit(self, index: int, change: Callable[[list[Pass]], None]) -> None:
        self.rewind(index)
        change(self._passes)
        self._reset_steps(self.position)

    def _index(self, key: str) -> int:
        for i, p in enumerate(self._passes):
            if p.key == key:
                return i
        raise KeyError(f"no step {key!r} in this pipeline{nearest(key, [p.key for p in self._passes])}")

    def _end_of(self, name: str) -> int:
        stages = [p.config.stage.value for p in self._passes]
        if name in Stage.__members__.values():
            last = [i for i, s in enumerate(stages) if Stage(s).position <= Stage(name).position]
            return (last[-1] + 1) if last else 0
        keys = [p.key for p in self._passes]
        if name not in keys:
            raise ConfigError(f"no stage or transform {name!r}{nearest(name, [*keys, *Stage])}")
        return keys.index(name) + 1

    # --- trusting

    def check(self, step: str | int | Step | None = None, **options: Any) -> CheckResult | Checks:
        """Compare graph before and after a step (all steps that changed something, without an argument).

        See :func:`adkit.checking.check_step` for the options (``weights``, ``how``, ``tolerance``, ``seed``).
        """
        if step is not None:
            one = step if isinstance(step, Step) else self.steps[step]
            return check_step(self, one, **options)
        return Checks([check_step(self, s, **options) for s in self._done() if s.changed and len(s.before)])

    def bisect(self, **options: Any) -> Step | None:
        """The first step after export whose graph no longer agrees with the exported one; None if all agree."""
        return first_bad_step(self, **options)

    # --- using

    def llm(self) -> Any:
        """Run what remains and return the engine (see :class:`adkit.runtime.live.LiveModel`).

        Raises ModelError when there are no weights to generate with.
        """
        from adkit.runtime.live import LiveModel

        if self.factory.weights == "none":
            raise ModelError(
                f"{self.name!r} has no weights, so it can be compiled and drawn but not generate: {self.factory.why_no_weights}"
            )
        self.run()
        compiled = self._state.compiled
        if compiled is None:
            step = next((s for s in self._steps if s.name == "compile_model"), None)
            why = f" ({step.info.reason or step.status})" if step is not None else ""
            raise AdkitError(f"the pipeline ended without a compiled model: compile_model did not run{why}")
        return LiveModel(compiled, self.config.engine, self.factory.tokenizer())

    def report(self, path: str | Path, completions: Iterable[Any] = ()) -> Path:
        """Write one standalone HTML file that shows every step; returns its path."""
        from adkit.viz.report import write_report

        return write_report(path, title=self.name, steps=self.steps, final=self.graph, completions=list(completions))

    def save(self, path: str | Path) -> Path:
        """Write the record (config, every step, graphs as text and data; no weights, no pickle) to a JSON file."""
        from adkit.saving import save

        return save(self, path)

    @staticmethod
    def load(path: str | Path) -> Any:
        """A saved record, to look at: its steps, diffs, graphs (see :class:`adkit.saving.SavedRun`)."""
        from adkit.saving import load

        return load(path)

    # --- drawing

    def _bind(self) -> None:
        if len(self._steps) != len(self._passes):
            self._steps = self._steps[: self.position] + [pending_step(p) for p in self._passes[self.position :]]
        for s in self._steps:
            s._checker = self.check

    def _heading(self) -> list[str]:
        left = f"; next: {self._passes[self.position].key}" if self.position < len(self._passes) else ""
        return [
            f"Workbench {self.name!r} ({type(self.factory.config).__name__}) on {self.device}, weights: {self.factory.weights}",
            f"{self.position} of {len(self._passes)} steps run{left}",
        ]

    def __repr__(self) -> str:
        lines = self._heading()
        stage = ""
        for i, s in enumerate(self._steps):
            if s.stage != stage:
                stage = s.stage
                lines.append(stage)
            lines.append(f"  {'>' if i == self.position else ' '} {s.summary()}")
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from adkit.graph.display import html_of

        bundle = {"text/plain": repr(self)}
        html = html_of(Steps(list(self._steps), heading="\n".join(self._heading())))
        if html is not None:
            bundle["text/html"] = html
        return bundle

    # --- progress

    @contextmanager
    def _progress(self) -> Iterator[None]:
        try:
            yield
        finally:
            for bar in self._bars.values():
                bar.close()
            self._bars = {}

    def _bar(self, done: int, total: int, what: str) -> None:
        if not self.progress:
            return
        from tqdm.auto import tqdm

        if what not in self._bars:
            big = total > 1 << 20
            self._bars[what] = tqdm(total=total, desc=what, unit="B" if big else "", unit_scale=big, leave=False, delay=2)
        bar = self._bars[what]
        bar.update(done - bar.n)


def _without_module(state: State) -> State:
    return State(None, state.snapshot, state.caches, state.compiled, dict(state.facts))


def _on_meta(gm: GraphModule) -> list[str]:
    tensors = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
    return [name for name, t in tensors.items() if t.is_meta]


def _with_config(p: Pass, config: Any) -> Pass:
    import copy

    new = copy.copy(p)
    new.config = config
    return new
