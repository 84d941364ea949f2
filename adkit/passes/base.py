"""What a pass is: a key, a stage, a config, and ``apply(gm, ctx) -> PassInfo``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.fx import GraphModule, Node

from adkit.contract import CachePool, CompiledModel, ConfigError, DistConfig, EngineConfig
from adkit.graph.edit import Site, site
from adkit.graph.step import PassInfo


class Stage(StrEnum):
    """Stages of the pipeline, in order."""

    FACTORY = "factory"
    EXPORT = "export"
    POST_EXPORT = "post_export"
    PATTERN_MATCHER = "pattern_matcher"
    SHARDING = "sharding"
    WEIGHT_LOAD = "weight_load"
    POST_LOAD_FUSION = "post_load_fusion"
    CACHE_INIT = "cache_init"
    VISUALIZE = "visualize"
    COMPILE = "compile"

    @property
    def position(self) -> int:
        """0 for the first stage."""
        return list(Stage).index(self)


class PassConfig(BaseModel):
    """Fields every transform has (AutoDeploy's names)."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    stage: Stage = Field(description="Stage of the pipeline the transform runs in")
    enabled: bool = Field(True, description="Run the transform at all")
    run_per_gm: bool = Field(
        True, description="Taken from AutoDeploy's configs; without effect, as there is one graph"
    )
    skip_on_error: bool = Field(False, description="On error go on without the transform instead of stopping")
    run_graph_cleanup: bool = Field(True, description="Erase dead code after the transform")
    run_shape_prop: bool = Field(False, description="Recompute every node's value after the transform")
    requires_clean_graph: bool = Field(True, description="The graph must be free of dead code before")
    requires_shape_prop: bool = Field(False, description="Every node's value must hold before")
    expect_mem_change: bool = Field(False, description="Device memory is expected to change")
    debug_visualize_dir: str | None = Field(
        None, description="Write a picture of the graph after the transform here"
    )


@dataclass
class Context:
    """What passes share beside the graph.

    ``factory`` makes the model and reads its weights; ``device`` is where it will run; ``weights`` says what
    ``load_weights`` will find: ``checkpoint``, ``random`` or ``none``. ``caches`` and ``compiled`` are filled
    by cache_init and compile. ``report(text)`` adds a line to the step's log; ``progress(done, total, what)``
    drives a progress bar; ``overheard(text)`` is called with each line reported. ``fingerprint`` hashes all that
    decided the graph so far (for ``pipeline_cache``).
    ``loaded`` names the weights that stand in the graph as the factory gives them (after going back), so that
    they need not be read again. ``dist`` says which rank of how many this graph will be.
    """

    factory: Any
    engine: EngineConfig
    device: torch.device
    weights: str = "none"
    caches: CachePool | None = None
    compiled: CompiledModel | None = None
    report: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int, str], None] = lambda done, total, what: None
    overheard: Callable[[str], None] = lambda text: None
    fingerprint: str = ""
    loaded: frozenset[str] = frozenset()
    dist: DistConfig = field(default_factory=DistConfig.of)


class Pass(ABC):
    """One transform. Subclasses set ``key`` and ``stage``, may narrow ``Config``, and write ``apply``.

    The docstring is shown to the user: what the pass rewrites, why that is faster or needed, and a
    before/after in five lines.
    """

    key: ClassVar[str]
    stage: ClassVar[Stage]
    Config: ClassVar[type[PassConfig]] = PassConfig
    #: The pass reads weights: what stands under a weight's name afterwards is what the factory gives.
    loads: ClassVar[bool] = False

    def __init__(self, config: PassConfig | dict[str, Any] | None = None) -> None:
        for name, kind in (("key", str), ("stage", Stage)):
            if not isinstance(getattr(self, name, None), kind):
                raise ConfigError(
                    f"pass {type(self).__name__} has no {name}: set the class attribute {name} "
                    f"({'a short name' if name == 'key' else 'a Stage, as Stage.POST_LOAD_FUSION'})"
                )
        if not isinstance(config, PassConfig):
            config = self.Config(**{"stage": self.stage, **(config or {})})
        self.config: Any = config

    @abstractmethod
    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Change ``gm`` in place (or not) and say what was done."""

    @staticmethod
    def site(
        gm: GraphModule, matched: Iterable[Node], *, label: str, before: Node | None = None
    ) -> AbstractContextManager[Site]:
        """Open one rewrite; see :func:`adkit.graph.edit.site`."""
        return site(gm, matched, label=label, before=before)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.key!r}, stage={self.config.stage.value!r})"


class BuildPass(Pass):
    """A pass that makes the module or replaces it (factory, export): ``apply`` returns the new one too."""

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Not used: build passes have :meth:`build`."""
        raise TypeError(f"{self.key} builds a new module; call build()")

    @abstractmethod
    def build(self, module: torch.nn.Module | None, ctx: Context) -> tuple[torch.nn.Module, PassInfo]:
        """The new module, and what was done."""
