"""A Workbench's model on several ranks: processes that each walk the same pipeline as one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from adkit.config import load_config
from adkit.contract import CompiledModel, ConfigError, DistConfig, EngineConfig, ShardingError, nearest
from adkit.passes import Pass
from adkit.runtime.live import LiveModel
from adkit.runtime.ranks import current_program, launched_ranks, program, start_processes
from adkit.runtime.ranks.over_ray import start_actors

if TYPE_CHECKING:
    from adkit.workbench import Workbench

_BUILDER = f"{__name__}:build"
#: What can be said of ranks besides their number. No engine setting and no argument of a Workbench has such a name, so
#: that ``adkit.LLM`` takes them all as keywords.
OPTIONS = ("moe_ep", "attention_dp", "executor", "timeout", "port")
#: A pass as another process finds it: module, class, fields.
Spelled = tuple[str, str, dict[str, Any]]


def build(
    *,
    dist: DistConfig,
    device: str,
    progress: Callable[[int, int, str], None],
    workbench: Mapping[str, Any],
    passes: list[Spelled] | None = None,
) -> CompiledModel:
    """One rank's part: what ``Workbench(**workbench)`` comes to as the rank of ``dist``.

    ``passes``: the pipeline, where it is not the one that the settings say.
    """
    from adkit.workbench import Workbench

    wb = Workbench(**{**workbench, "dist": dist, "device": device, "progress": False})
    wb._context.progress = progress
    if passes is not None:
        wb._become([getattr(import_module(m), c)(fields) for m, c, fields in passes])
    return wb.compiled()


def world(tp: int, moe_ep: int | None = None, attention_dp: bool = False) -> DistConfig:
    """A world of ``tp`` ranks; ShardingError for a number that cannot be, ConfigError for ``attention_dp`` on one."""
    if not isinstance(tp, int) or tp < 1:
        raise ShardingError(f"tp is {tp!r}; give the number of ranks, 1 or more")
    check_attention_dp(tp, attention_dp)
    return DistConfig.of(tp, moe_ep, enable_attention_dp=attention_dp)


def check_attention_dp(tp: int, attention_dp: bool | None) -> None:
    """ConfigError where sequences are to be shared out and one rank has them all."""
    if attention_dp and tp == 1:
        raise ConfigError(
            "attention_dp (--attention-dp) shares out sequences over ranks, and there is 1 rank; give tp (--tp) 2 or "
            "more, or leave attention_dp out"
        )


def refuse_options(given: Iterable[str]) -> None:
    """ConfigError for options of ranks among those that a Workbench was given, which is on none."""
    for name in given:
        if name in ("tp", *OPTIONS):
            raise ConfigError(
                f"a Workbench has no option {name!r}: wb.llm({name}=...) or adkit.LLM(model, {name}=...) runs on "
                "ranks, wb.shard(tp=...) shows them"
            )


def start(
    wb: Workbench,
    tp: int,
    *,
    moe_ep: int | None = None,
    attention_dp: bool = False,
    executor: str = "processes",
    **options: Any,
) -> LiveModel:
    """The engine of a Workbench's model cut over ``tp`` ranks; the Workbench itself stays where it is.

    ``moe_ep``: ranks the experts are dealt to (default: all). ``attention_dp``: each rank has sequences, and a cache,
    of its own; attention then stays whole. ``executor``: ``processes`` of this host, or ``ray`` (actors of a cluster,
    ``pip install 'adkit[ray]'``).
    ``timeout`` (seconds): a step that takes longer is taken for stuck; ``port``: where the ranks meet (default: a free
    one). Raises ShardingError for ranks that cannot be had, the error of a rank that cannot be built, RankError where a
    rank ended.
    """
    dist = world(tp, moe_ep, attention_dp)
    starters: dict[str, Any] = {"processes": start_processes, "ray": start_actors}
    if executor not in starters:
        raise ConfigError(f"executor is {executor!r}; expected one of: {', '.join(starters)}")
    for name in options:
        if name not in OPTIONS:
            engine_setting = f"; give it to the Workbench: Workbench(model, {name}=...)"
            hint = engine_setting if name in EngineConfig.model_fields else nearest(name, OPTIONS)
            raise ConfigError(f"llm() has no option {name!r}{hint}")
    if "port" in options and options["port"] not in range(1 << 16):
        raise ConfigError(f"port is {options['port']!r}; expected a number up to 65535 (0: a free one)")
    seconds = options.get("timeout", 1)
    if not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ConfigError(f"timeout is {seconds!r}; expected seconds, more than 0")
    engine = wb.config.engine
    spelled = {"workbench": {**wb._made_of, **engine.model_dump()}, "passes": [_spell(p) for p in wb._passes]}
    with wb.bars.busy(f"starting {tp} ranks"):
        model, device = starters[executor](
            _BUILDER, spelled, dist, device=engine.device, progress=wb.bars.show, **options
        )
    return LiveModel(model, engine, wb.factory.tokenizer(), device, wb.factory.why_no_tokenizer)


def _spell(p: Pass) -> Spelled:
    cls = type(p)
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise ShardingError(
            f"the pass {p.key!r} is defined in this notebook or program itself, where ranks, which are processes of "
            "their own, cannot find it; put it into a module"
        )
    return cls.__module__, cls.__qualname__, p.config.model_dump()


@dataclass(frozen=True)
class Place:
    """What a command's process is: the rank of ``dist``; ``settings`` go to its Workbench.

    ``follows``: it is another rank than 0, and has served: there is nothing left to do.
    """

    dist: DistConfig
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def follows(self) -> bool:
        """True where another rank leads."""
        return self.dist.rank > 0


@contextmanager
def place(tp: int | None, workbench: Mapping[str, Any], attention_dp: bool = False) -> Iterator[Place]:
    """This process as one rank of a command on ``tp`` ranks (None: as many as torchrun started, or one).

    ``workbench`` are the arguments of the Workbench that every rank is to build. Ranks that torchrun did not start are
    started; a rank other than 0 serves before it enters the block.
    """
    ranks = tp if tp is not None else launched_ranks() or 1
    dist = world(ranks, attention_dp=attention_dp)
    if ranks == 1:
        yield Place(dist)
        return
    device = load_config(workbench.get("config", ()), workbench.get("overrides", ())).device
    with program(_BUILDER, {"workbench": dict(workbench)}, dist, device=device) as here:
        yield Place(here.dist, {"dist": here.dist, "device": here.device})


def lead(compiled: CompiledModel, dist: DistConfig) -> Any:
    """The device of an engine whose model is rank 0's of several; None in a world of one.

    Raises ShardingError where this process is not rank 0 of such a world.
    """
    if dist.world_size == 1:
        return None
    here = current_program()
    if here is None or here.dist != dist or dist.rank:
        raise ShardingError(
            f"this Workbench is rank {dist.rank} of {dist.world_size}, and the others are not there: "
            "wb.llm(tp=...) of a Workbench without dist= starts them"
        )
    return here.lead(compiled)
