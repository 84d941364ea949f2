"""The one object a notebook holds: a model, its pipeline, and every step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.fx import GraphModule

from adkit.checking import CheckResult, Checks, check_all, check_step, first_bad_step
from adkit.config import AdkitConfig, Fragment, load_config
from adkit.contract import (
    AdkitError,
    CompiledModel,
    ConfigError,
    DistConfig,
    EngineConfig,
    ModelError,
    nearest,
)
from adkit.editing import a_pass, beside, with_config
from adkit.graph.history import Trace, descendants
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import Step, Steps
from adkit.growing import Growing
from adkit.models import ModelFactory, resolve
from adkit.models.loading import LOCAL, graph_memory
from adkit.models.memory import MemoryEstimate
from adkit.passes import Context, Pass, Stage, get_pass
from adkit.passes.pipeline import State, ordered, pending_step, run_pass
from adkit.passes.pipeline_cache import PipelineCache, fingerprint
from adkit.progress import Bars
from adkit.rewinding import return_to, start_from_cache
from adkit.served import Served
from adkit.watching import Watching

if TYPE_CHECKING:
    from adkit.graph.placement import ShardingPlan
    from adkit.playground import Playground
    from adkit.plotting import Plots
    from adkit.profiling import Profile
    from adkit.runtime.live import LiveModel
    from adkit.sharding import VirtualRanks
    from adkit.viz.explorer import Explorer
    from adkit.viz.record import Overlay


class Workbench:
    """A model on the bench: run its pipeline step by step, look at each, change it, generate.

    ``model``: ``"demo"``, a bundled config's name, a local directory, a Hugging Face id, or a config object.
    ``config``: YAML fragments (paths or mappings) merged in order over the defaults; ``overrides``:
    ``"transforms.fuse_gemms.enabled=false"``; other keywords are engine fields (``max_seq_len=512``).
    ``random_weights=True`` makes seeded weights on the device when there is no checkpoint. ``force=True``
    goes on although the memory estimate says that the model does not fit. ``lean=True`` takes the model
    written by hand with sharding hints (:mod:`adkit.models.lean`) instead of Hugging Face's. ``dist``: walk as
    one rank of several (``wb.shard(tp=8)`` looks at all of them).

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
        lean: bool = False,
        dist: DistConfig | None = None,
        **engine: Any,
    ) -> None:
        fragments, overrides = _listed(config), _listed(overrides)
        if force:
            overrides = [*overrides, "transforms.load_weights.force=true"]
        if dist is not None and not isinstance(dist, DistConfig):
            raise ConfigError(
                f"dist is {dist!r}; expected a DistConfig, as adkit.contract.DistConfig.of(tp=2)"
            )
        if set(engine) - set(EngineConfig.model_fields):
            from adkit.ranks import refuse_options

            refuse_options(engine)
        settings = load_config(fragments, overrides, **engine)
        self._made_of = {"model": model, "random_weights": random_weights, "seed": seed,
                         "trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle,
                         "lean": lean}  # fmt: skip
        self.device = settings.usable_device()
        self.factory: ModelFactory = resolve(
            model,
            dtype=settings.dtype,
            device=self.device,
            random_weights=random_weights,
            seed=seed,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            lean=lean,
        )
        self.bars = Bars(progress)
        self._context = Context(
            factory=self.factory, engine=settings.engine, device=self.device, weights=self.factory.weights,
            dist=dist or DistConfig.of(),
        )  # fmt: skip
        self.watching = Watching(self)
        self.growing = Growing()
        self._context.progress, self._context.overheard = self._progress, self.watching.log
        self._passes: list[Pass] = ordered(get_pass(k)(c) for k, c in settings.transforms.items())
        self._state = State()
        self._history: list[State] = []  # the state before each step that ran, without its module
        self._steps: list[Step] = []
        self._engine: tuple[CompiledModel, LiveModel] | None = None
        self._ranked: tuple[Any, LiveModel] | None = None
        self._served = Served()
        self._bind()

    # --- looking

    @property
    def name(self) -> str:
        """The model's name."""
        return self.factory.name

    @property
    def config(self) -> AdkitConfig:
        """Engine fields and the transforms as they stand, changes made here included."""
        engine = self._context.engine.model_dump()
        return AdkitConfig(**engine, transforms={p.key: p.config for p in self._passes})

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
        names = self.factory.tensors
        return any(name in names for name in self._state.tensors) and self._past_loading(self.position)

    def memory_estimate(self, device: torch.device | str | None = None) -> MemoryEstimate:
        """What the model needs on the device (default: its own), before anything is loaded; once the graph is cut, what
        this rank needs."""
        gm, pools = self._state.module, self._context.dist.pools
        if isinstance(gm, GraphModule) and LOCAL in gm.meta:
            where = self.device if device is None else torch.device(device)
            caches = self._state.caches
            per_token = 0 if caches is None else int(caches.bytes_per_token)
            return graph_memory(gm, self.factory, self._context.engine, where, per_token).over(pools)
        where = self.device if device is None else torch.device(device)
        return self.factory.memory_estimate(self._context.engine, where).over(pools)

    def _past_loading(self, index: int) -> bool:
        return any(p.loads and p.config.enabled for p in self._passes[:index])

    def _done(self) -> list[Step]:
        return self._steps[: self.position]

    # --- running

    def run(self, until: str | None = None, *, on_step: Callable[[Step], None] | None = None) -> Workbench:
        """Run the steps that remain, through a stage or a transform key if ``until`` names one.

        ``on_step`` is called with each step that ran. Returns the Workbench. An error leaves it at the last
        good step. Raises ConfigError for an unknown stage or transform.
        """
        stop = self._end_of(until) if until is not None else len(self._passes)
        with self.watching.run():
            if self.position == 0:
                start_from_cache(self, stop)
                for step in self._done():
                    if on_step is not None:
                        on_step(step)
            while self.position < stop:
                step = self.step()
                if on_step is not None:
                    on_step(step)
        return self

    def step(self) -> Step:
        """Run the next step and return it; IndexError when none remains."""
        i = self.position
        if i >= len(self._passes):
            raise IndexError("every step of this pipeline has run; wb.rewind(...) goes back")
        p = self._passes[i]
        if isinstance(p, PipelineCache):
            self._context.fingerprint = fingerprint(self._context, self._passes[:i])
        self._context.loaded = frozenset(n for n, stamp in self._state.tensors.items() if stamp.loadable)
        before = self._state
        self.watching.starts(p.key)
        try:
            with self.bars.busy(p.key):
                state, step = run_pass(p, before, self._context)
        except BaseException as error:
            self.watching.failed(p.key, error)
            self._served.ran(p.key)
            self._mend()
            self.watching.changed()
            raise
        self._served.ran(p.key)
        self._steps[i] = step
        self._bind()
        self._history, self._state = [*self._history, replace(before, module=None)], state
        if step.status == "failed":
            self._mend()
        self.growing.ran(self._done())
        return step

    def rewind(self, to: str | int = 0) -> Workbench:
        """Go back to just before the step ``to`` (key or index, negative from the end); earlier steps are
        kept.

        After weights were loaded only tensors that later steps changed are read again.
        """
        index = self._place(to)
        if index >= self.position:
            return self
        self._engine = None
        if not len(self._history[index].snapshot) or not isinstance(self._state.module, GraphModule):
            # Before export there is no graph to rebuild, and making the bare module again is cheap.
            self._state, self._history = State(), []
            self._reset_steps(0)
            while self.position < index:
                self.step()
            return self
        return_to(self, index)
        return self

    def _mend(self) -> None:
        """Put back tensors that a failed step changed or freed."""
        if isinstance(self._state.module, GraphModule) and len(self._state.snapshot):
            return_to(self, self.position)

    def _reset_steps(self, index: int) -> None:
        self._steps = self._steps[:index] + [pending_step(p) for p in self._passes[index:]]
        self._bind()

    # --- changing the pipeline

    def insert(
        self, new: Pass | type[Pass], *, after: str | None = None, before: str | None = None
    ) -> Workbench:
        """Add a pass after or before another (default: at the end of its stage); rewinds to its place.

        Between passes of other stages it takes the stage of the one it was put next to.
        """
        p = a_pass(new)
        if any(q.key == p.key for q in self._passes):
            raise ConfigError(
                f"the pipeline has a step {p.key!r} already; wb.replace({p.key!r}, ...) swaps it"
            )
        if after is None and before is None:
            index = sum(q.config.stage.position <= p.config.stage.position for q in self._passes)
            self._become([*self._passes[:index], p, *self._passes[index:]])
        else:
            self._become(beside(self._passes, p, self._anchor(after, before), after is not None))
        return self

    def replace(self, key: str, new: Pass | type[Pass]) -> Workbench:
        """Swap one pass for another, which takes its place and stage; rewinds to its place."""
        p = a_pass(new)
        index = self._index(key)
        if any(q.key == p.key for q in self._passes if q.key != key):
            raise ConfigError(
                f"the pipeline has a step {p.key!r} already, elsewhere; disable or move that one"
            )
        if p.config.stage != self._passes[index].config.stage:
            p = with_config(p, {"stage": self._passes[index].config.stage})
        self._become([*self._passes[:index], p, *self._passes[index + 1 :]])
        return self

    def configure(self, key: str, **fields: Any) -> Workbench:
        """Change fields of one transform's config; rewinds to its place.

        A new ``stage`` moves the transform to that stage's end. Raises ConfigError for unknown fields and
        impossible values.
        """
        index = self._index(key)
        p = with_config(self._passes[index], fields)
        if p.config == self._passes[index].config:
            return self
        if p.config.stage == self._passes[index].config.stage:
            self._become([*self._passes[:index], p, *self._passes[index + 1 :]])
        else:
            self._become(ordered([*self._passes[:index], *self._passes[index + 1 :], p]))
        return self

    def disable(self, key: str) -> Workbench:
        """Switch a transform off; rewinds to its place."""
        return self.configure(key, enabled=False)

    def enable(self, key: str) -> Workbench:
        """Switch a transform on; rewinds to its place."""
        return self.configure(key, enabled=True)

    def move(self, key: str, *, after: str | None = None, before: str | None = None) -> Workbench:
        """Reorder one transform; rewinds to the earlier of its two places.

        Between passes of other stages it takes the stage of the one it was put next to.
        """
        p = self._passes[self._index(key)]
        anchor = self._anchor(after, before)
        if anchor is p:
            raise ConfigError(f"cannot move {key!r} next to itself")
        self._become(beside([q for q in self._passes if q is not p], p, anchor, after is not None))
        return self

    def _become(self, passes: list[Pass]) -> None:
        """Take over a changed pipeline: back to the first pass that differs, what came before stays."""
        pairs = zip(self._passes, passes, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a is not b), min(len(self._passes), len(passes)))
        self.rewind(same) if same < len(self._passes) else None
        self._passes = passes
        self._reset_steps(self.position)

    def _anchor(self, after: str | None, before: str | None) -> Pass:
        if (after is None) == (before is None):
            raise ConfigError("give exactly one of after= and before=")
        return self._passes[self._index(cast(str, after if after is not None else before))]

    def _index(self, key: str) -> int:
        for i, p in enumerate(self._passes):
            if p.key == key:
                return i
        raise KeyError(f"no step {key!r} in this pipeline{nearest(str(key), [p.key for p in self._passes])}")

    def _place(self, to: str | int) -> int:
        if not isinstance(to, int):
            return self._index(to)
        count = len(self._passes)
        if not -count <= to <= count:
            raise IndexError(f"no step {to}: the pipeline has {count}")
        return to + count if to < 0 else to

    def _end_of(self, name: str) -> int:
        keys = [p.key for p in self._passes]
        if not isinstance(name, str):
            raise ConfigError(f"until is {name!r}; expected a stage or a transform key")
        if name in keys:
            return keys.index(name) + 1
        if name not in Stage.__members__.values():
            raise ConfigError(
                f"no stage or transform {name!r}{nearest(name, [*keys, *(s.value for s in Stage)])}"
            )
        return sum(p.config.stage.position <= Stage(name).position for p in self._passes)

    def trace(self, what: int | str) -> tuple[Trace, ...]:
        """Where a node (its id) comes from, or what became of a source line (``"modeling_llama.py:66"``)."""
        return descendants(self._done(), what)

    def draw(self, *, layer: int | None = None, **options: Any) -> Any:
        """The graph as it stands as a picture, or one layer of it; options as :func:`adkit.viz.draw` takes."""
        from adkit.viz import draw

        return draw(self.graph, layer=layer, **options)

    def profile(self, step: str | int | Step | None = None, **options: Any) -> Profile:
        """Time each node of the graph, or of what a step left; options as :func:`adkit.profiling.profile` takes."""
        from adkit.profiling import profile

        return profile(self, self.steps[step] if isinstance(step, (str, int)) else step, **options)

    @property
    def plots(self) -> Plots:
        """Figures of the walk: ``wb.plots.time()``, ``.memory()``, ``.cost()``, ``.roofline()`` and more."""
        from adkit.plotting import Plots

        return Plots(self)

    # --- trusting

    def check(self, step: str | int | Step | None = None, **options: Any) -> CheckResult | Checks:
        """Compare graph before and after a step (all steps that changed something, without an argument).

        See :func:`adkit.checking.check_step` for the options (``weights``, ``how``, ``tolerance``, ``seed``). Raises
        AdkitError where there is no graph yet.
        """
        if step is not None:
            one = step if isinstance(step, Step) else self.steps[step]
            with self.bars.busy(f"checking {one.name}"):
                return check_step(self, one, **options)
        return check_all(self, **options)

    def errors(self, step: str | int | Step | None = None, **options: Any) -> Overlay:
        """Each node's numerical error against a wider dtype, to lay over the explorer; see adkit.numerics."""
        from adkit.numerics import node_errors

        with self.bars.busy("errors"):
            return node_errors(self, step, **options)

    def bisect(self, **options: Any) -> Step | None:
        """The first step after export whose graph no longer agrees with the exported one; None if all
        agree. See :func:`adkit.checking.first_bad_step` for what could not be compared, and what it raises."""
        with self.bars.busy("bisecting"):
            return first_bad_step(self, **options)

    # --- using

    def llm(self, tp: int = 1, **ranks: Any) -> LiveModel:
        """Run what remains and return the engine; the same one until the pipeline changes.

        ``tp``: on so many ranks, a process each with its part of the model; options as :func:`adkit.ranks.start` takes.
        This Workbench then stays where it is. The ranks end with this process, or with ``.close()`` of what it returns.
        Raises ModelError when there are no weights to generate with.
        """
        from adkit.ranks import lead, start
        from adkit.runtime.live import LiveModel

        if tp != 1 or ranks:
            self._check_weights()
            key = (self.config.to_yaml(), tp, *sorted(ranks.items()))
            if self._ranked is None or self._ranked[0] != key or self._ranked[1].engine.device.closed:
                if self._ranked is not None:
                    self._ranked[1].close()
                self._ranked = (key, start(self, tp, **ranks))
            return self._ranked[1]
        compiled = self.compiled()
        if self._engine is None or self._engine[0] is not compiled or self._engine[1].engine.refusal:
            # Two engines over one cache would write over each other's pages.
            device = lead(compiled, self._context.dist)
            tokenizer = self.factory.tokenizer()
            why = self.factory.why_no_tokenizer
            live = LiveModel(compiled, self._context.engine, tokenizer, device, why)
            self._engine = (compiled, live)
            self._served.add(live.engine, self._state)
        return self._engine[1]

    def _check_weights(self) -> None:
        if self.factory.weights == "none":
            raise ModelError(
                f"{self.name!r} has no weights, so it can be compiled and drawn but not generate: "
                f"{self.factory.why_no_weights}"
            )

    def compiled(self) -> CompiledModel:
        """Run what remains and return what it comes to; ModelError without weights, AdkitError if not compiled."""
        self._check_weights()
        self.run()
        compiled = self._state.compiled
        if compiled is None:
            step = next((s for s in self._steps if s.name == "compile_model"), None)
            why = f" ({step.info.reason or step.status})" if step is not None else ""
            raise AdkitError(f"the pipeline ended without a compiled model: compile_model did not run{why}")
        for done, key in ((self.loaded, "load_weights"), (compiled.caches.tensors, "initialize_cache")):
            if not done and key in (p.key for p in self._passes if not p.config.enabled):
                raise AdkitError(
                    f"the model cannot run: {key} is disabled; wb.enable({key!r}) switches it on again"
                )
        return compiled

    def play(self, **options: Any) -> Playground:
        """A panel to generate with live (see :class:`adkit.playground.Playground`), over :meth:`llm`."""
        from adkit.playground import Playground

        return Playground(self.llm(), **{"name": f"{self.name} on {self.device}", **options})

    def explore(self, **options: Any) -> Explorer:
        """The walk in one widget: timeline, graph, differences, program; options as ``adkit.recording.explore``."""
        from adkit.recording import explore

        return explore(self, **options)

    def shard(
        self,
        tp: int,
        moe_ep: int | None = None,
        attention_dp: bool | None = None,
        plan: ShardingPlan | None = None,
        **config: Any,
    ) -> VirtualRanks:
        """The model cut over ``tp`` virtual ranks, to look at and to check; this Workbench stays as it is.

        Experts are dealt to ``moe_ep`` of the ranks (default: all) and cut over the rest; with ``attention_dp``
        attention stays whole and each rank has sequences of its own; ``plan`` is an edited one, in place of detection.
        ``config``: fields of the sharding stage's transforms. No weights are needed. Raises ShardingError for what
        cannot be cut so, ConfigError for unknown fields and for ``attention_dp`` on one rank.
        """
        from adkit.ranks import check_attention_dp
        from adkit.sharding import shard

        check_attention_dp(tp, attention_dp)
        with self.bars.busy("sharding"):
            return shard(self, tp, moe_ep, attention_dp, plan, **config)

    def report(self, path: str | Path, completions: Iterable[Any] = (), **options: Any) -> Path:
        """Write the explorer with this walk as one standalone HTML file; returns its path."""
        from adkit.recording import write_report

        return write_report(self, path, completions, **options)

    def save(self, path: str | Path) -> Path:
        """Save the run (config, every step, graphs as text and data; no weights, no pickle) as a JSON file.

        ``Workbench.load`` reads it back as Python objects; what pictures are drawn from is ``.record``.
        """
        from adkit.saving import save

        return save(self, path)

    def record(self, path: str | Path, **options: Any) -> Path:
        """Write the walk as one record, ``.json`` or ``.json.gz`` (see docs/record.md); returns its path.

        Options as :func:`adkit.recording.write_record` takes (``overlays``, ``device``).
        """
        from adkit.recording import write_record

        return write_record(self, path, **options)

    @staticmethod
    def load(path: str | Path) -> Any:
        """A saved run, to look at: its steps, diffs, graphs, how it was cut (see :class:`adkit.saving.SavedRun`)."""
        from adkit.saving import load

        return load(path)

    # --- drawing

    def _bind(self) -> None:
        if len(self._steps) != len(self._passes):
            self._steps = self._steps[: self.position] + [
                pending_step(p) for p in self._passes[self.position :]
            ]
        for s in self._steps:
            s._checker, s._profiler = self.check, self.profile
        self.growing.keep(self._steps)
        self.watching.changed()

    def _progress(self, done: int, total: int, what: str) -> None:
        self.bars.show(done, total, what)
        self.watching.progress(done, total, what)

    def _heading(self) -> list[str]:
        left = f"; next: {self._passes[self.position].key}" if self.position < len(self._passes) else ""
        return [
            f"Workbench {self.name!r} ({type(self.factory.config).__name__}) on {self.device}, weights: "
            f"{self.factory.weights}",
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


def _listed(given: Any) -> list[Any]:
    """Of one or of several, a list: a text and a mapping are one, and so is what is neither."""
    several = isinstance(given, Iterable) and not isinstance(given, (str, Mapping))
    return list(given) if several else [given]
