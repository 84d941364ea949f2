"""All ranks of a world in one process: what each holds, what they say, and a proof that they compute the same.

``wb.shard(tp=8)`` makes a :class:`VirtualRanks`. Every rank is a Workbench of its own, taken to the end of the sharding
stage; none disturbs the Workbench they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from adkit.checking import LENGTHS, TOLERANCE, WHOLE_LIMIT, rope_lengths, runnable
from adkit.contract import (
    ConfigError,
    DistConfig,
    LocalWeight,
    RequestError,
    ShardingError,
    nearest,
)
from adkit.graph.cost import Device
from adkit.graph.display import mimebundle
from adkit.graph.placement import PLAN, ShardingPlan
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import Steps
from adkit.models.loading import LOCAL
from adkit.models.memory import human
from adkit.passes import PassConfig, Stage
from adkit.sharding.agreement import Agreement
from adkit.sharding.comm import NVLINK4, Comm, Link, comm_of
from adkit.sharding.engine import live
from adkit.sharding.forks import fork, graph_module, states
from adkit.sharding.lockstep import RankFails, Together
from adkit.sharding.memory import RankMemory, rank_memory, weight_sizes
from adkit.sharding.result import ShardingCheck, result_of
from adkit.sharding.scaling import scaling

if TYPE_CHECKING:
    from adkit.runtime.live import LiveModel, Params
    from adkit.workbench import Workbench

DETECT, WRITE, APPLY = "detect_sharding", "sharding_transform_executor", "apply_sharding_hints"


class Rank:
    """One rank: ``wb`` is its own Workbench, at the end of the sharding stage (run it on to see later steps)."""

    def __init__(self, wb: Workbench, whole: Snapshot, plan: ShardingPlan) -> None:
        self.wb, self._whole, self._plan = wb, whole, plan

    @property
    def dist(self) -> DistConfig:
        """Its place in the world."""
        return self.wb._context.dist

    @property
    def graph(self) -> Snapshot:
        """Its graph when the sharding stage is done."""
        return states(self.wb)[end_of(self.wb)].snapshot

    @property
    def module(self) -> GraphModule:
        """Its graph as a module, on shapes; each access builds one of its own."""
        return graph_module(fork(self.wb, end_of(self.wb)))

    @property
    def local(self) -> dict[str, LocalWeight]:
        """Which part of which weight it holds, by the name that its graph reads."""
        return dict(graph_module(self.wb).meta.get(LOCAL, {}))

    @property
    def memory(self) -> RankMemory:
        """What it keeps in memory."""
        engine = self.wb._context.engine
        return rank_memory(
            self.graph, self._whole, self._plan, engine, self.dist, self.local, self.wb.factory.tied
        )

    def __repr__(self) -> str:
        d = self.dist
        experts = f", experts {d.moe_ep_rank} of {d.moe_ep_size}" if d.moe_ep_size > 1 else ""
        return f"Rank {d.rank} of {d.world_size}{experts}: {self.graph!r}\n  {self.memory!r}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


class Ranks(Sequence[Rank]):
    """The ranks of a world; each is cut when it is first asked for."""

    def __init__(self, whole: Snapshot, hinted: Workbench) -> None:
        self._whole, self._hinted = whole, hinted
        self._made: dict[int, Rank] = {}

    def __len__(self) -> int:
        return self._hinted._context.dist.world_size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"no rank {index}: there are {len(self)}")
        r = index % len(self)
        if r not in self._made:
            base = self._hinted
            own = fork(base, base.position, dist=base._context.dist.at(r))
            while own.position < end_of(own):
                own.step()
            self._made[r] = Rank(own, self._whole, plan_of(base))
        return self._made[r]

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


class VirtualRanks:
    """A model cut over ranks that all live in this process.

    ``plan`` says what is cut where and why; ``steps`` the steps of the sharding stage; ``ranks[i]`` each rank's graph
    and memory; ``comm`` what they exchange. All of it on shapes: a model of any size will do. ``check()`` and
    ``generate()`` run the ranks, which takes weights or a model small enough for random ones.
    """

    def __init__(self, wb: Workbench, whole: Snapshot, hinted: Workbench) -> None:
        self.wb = wb
        self.whole = whole
        self.ranks = Ranks(whole, hinted)
        self._hinted = hinted
        self._loaded: dict[Any, tuple[Together, Together]] = {}
        self._live: LiveModel | None = None
        self._link = NVLINK4

    @property
    def plan(self) -> ShardingPlan:
        """What is cut where, and why; edit it and give it back: ``wb.shard(tp=8, plan=v.plan.edit(...))``."""
        return plan_of(self._hinted)

    @property
    def dist(self) -> DistConfig:
        """The world as rank 0 sees it."""
        return self._hinted._context.dist

    @property
    def hinted(self) -> Snapshot:
        """The graph with its hints, still the whole model."""
        return self._hinted.graph

    @property
    def steps(self) -> Steps:
        """The steps of the sharding stage, as rank 0 took them; ``.check()`` of the last compares all ranks."""
        wb = self.ranks[0].wb
        stage = [s for s in wb._steps[: end_of(wb)] if s.stage == Stage.SHARDING.value]
        hints = [s for s in stage if s.name == APPLY]
        for s in hints:
            s._checker = lambda step, **options: self.check(**options)
        return Steps(stage, heading=f"Sharding of {self.wb.name!r}, {len(self.ranks)} ranks")

    @cached_property
    def comm(self) -> Comm:
        """Every collective in order, its bytes, and the time that NVLink would take; ``comm.on(...)`` takes another
        link."""
        return comm_of(self.ranks[0].graph, len(self.ranks), self._link)

    def memory(self) -> Any:
        """A row a rank, as a pandas DataFrame: bytes of weights and cache, share of a fair share."""
        import pandas as pd

        rows = []
        for rank in self.ranks:
            m = rank.memory
            rows.append(
                {
                    "weights": m.weights,
                    "x fair share": m.share,
                    "replicated": m.replicated,
                    "cache a token": m.cache_per_token,
                    "cache": m.cache,
                    **dict(m.by_kind),
                }
            )
        table = pd.DataFrame(rows)
        table.index.name = "rank"
        return table

    # --- running

    def check(
        self,
        prompts: Sequence[str | Sequence[int]] | None = None,
        *,
        tokens: int = max(LENGTHS),
        weights: str = "auto",
        tolerance: float | None = None,
        seed: int = 0,
    ) -> ShardingCheck:
        """Run all ranks and the uncut model on the same prompts, and compare every value and the logits.

        ``prompts``: texts or token ids, each run alone; without them random ones of so many ``tokens`` [B, S].
        ``weights``: ``checkpoint`` or ``random`` (from ``seed``); ``auto`` takes the model's own, random ones where it
        has none and is small. ``tolerance`` bounds the rmse ratio (default by dtype, as ``wb.check``). Raises
        ShardingError for a model without weights that is too large for random ones.
        """
        limit = (
            TOLERANCE.get(self.wb.factory.dtype, TOLERANCE[torch.bfloat16])
            if tolerance is None
            else tolerance
        )
        source, whole, ranks = self._modules(weights, seed)
        agreement = Agreement(self.whole, [self.hinted], self.ranks[0].graph, self.plan, limit)
        expected, found = [], []
        for ids in self._prompts(prompts, tokens, seed):
            agreement.values.clear()
            feed = self._feed(ids)
            with torch.inference_mode():
                expected.append(whole.run([feed], on_call=agreement.keep)[0][0])
                try:
                    outs = ranks.run(self._split(feed), on_call=agreement.look)
                except RankFails as error:
                    agreement.failed(error)
                    break
            found.append(self._joined(outs))
        return result_of(agreement, expected, found, source, self.dist)

    def run(self, *, weights: str = "auto", seed: int = 0, **inputs: Tensor) -> Tensor:
        """Logits [B, S, V] of all ranks together for ``input_ids`` [B, S] (other inputs are made where not given)."""
        _, _, ranks = self._modules(weights, seed)
        if "input_ids" not in inputs:
            raise RequestError(f"run() takes input_ids [B, S]; it was given {', '.join(inputs) or 'nothing'}")
        feed = {**self._feed(inputs["input_ids"]), **inputs}
        with torch.inference_mode():
            logits: Tensor = self._joined(ranks.run(self._split(feed)))[0]
        return logits

    def llm(self) -> LiveModel:
        """An engine over all ranks: the rest of the pipeline on each, a paged cache each, driven in step."""
        if self._live is None:
            if self.dist.enable_attention_dp:
                raise ShardingError(
                    "with attention_dp each rank has sequences of its own, which one engine does not schedule; "
                    "check() and run() split a batch over the ranks"
                )
            self._need_weights("auto")
            self._live = live([fork(r.wb, end_of(r.wb)) for r in self.ranks])
        return self._live

    def generate(self, prompts: Any, params: Params = None, **options: Any) -> Any:
        """Complete one prompt or many with all ranks in step, as ``wb.llm().generate`` does with one."""
        return self.llm().generate(prompts, params, **options)

    # --- estimating

    def scaling(
        self,
        tps: Sequence[int] = (1, 2, 4, 8),
        device: Device | str = "H100 SXM",
        *,
        batch: int = 32,
        context: int = 1024,
        link: Link = NVLINK4,
    ) -> Any:
        """Estimated decode speed of this model over so many ranks, as a pandas DataFrame; see
        :func:`adkit.sharding.scaling.scaling`."""
        return scaling(self.wb, tps, device, batch=batch, context=context, link=link, dist=self.dist)

    # --- inside

    def _need_weights(self, weights: str) -> tuple[str, Any]:
        """Where weights come from, and the factory that gives them."""
        factory = self.wb.factory
        if weights not in ("auto", "checkpoint", "random"):
            raise ConfigError(f"check(weights={weights!r}): expected auto, checkpoint or random")
        if weights == "checkpoint" and factory.weights != "checkpoint":
            raise ShardingError(
                f"{factory.name!r} has no checkpoint (weights: {factory.weights}); take weights='random'"
            )
        if weights == "random" or (weights == "auto" and factory.weights == "none"):
            size = sum(weight_sizes(self.whole).values())
            if weights == "auto" and size > WHOLE_LIMIT:
                raise ShardingError(
                    f"{factory.name!r} has no weights here ({factory.why_no_weights}) and is too large for random ones "
                    f"({human(size)}; up to {human(WHOLE_LIMIT)} they would be made): the plan, ranks, memory and comm "
                    "hold on shapes; to run it, give a checkpoint, or check a config of the same kind with fewer layers"
                )
            return "random", factory
        return factory.weights, factory

    def _modules(self, weights: str, seed: int) -> tuple[str, Together, Together]:
        """The uncut model and the ranks with weights, made once: each rank reads its parts only."""
        source, _ = self._need_weights(weights)
        key = (source, seed if source == "random" else 0, *(id(r.graph) for r in self.ranks))
        if key not in self._loaded:
            whole = runnable(self._hinted, self.whole, {}, source, seed)
            parts = [runnable(r.wb, r.graph, {}, source, seed) for r in self.ranks]
            self._loaded = {key: (Together([whole]), Together(parts))}
        return source, *self._loaded[key]

    def _prompts(self, prompts: Sequence[str | Sequence[int]] | None, tokens: int, seed: int) -> list[Tensor]:
        if prompts is None:
            if tokens < 1:
                raise ConfigError(f"check(tokens={tokens}): expected at least 1")
            vocab = self.wb.factory.config.get_text_config(decoder=True).vocab_size
            rows = max(2, len(self.ranks) if self.dist.enable_attention_dp else 2)
            generator = torch.Generator().manual_seed(seed)
            return [torch.randint(vocab, (rows, tokens), generator=generator)]
        if isinstance(prompts, str) or not len(prompts):
            raise ConfigError(f"check(prompts={prompts!r}): expected a list of texts or lists of token ids")
        return [torch.tensor([self._ids(p)]) for p in prompts]

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return [int(i) for i in prompt]
        tokenizer = self.wb.factory.tokenizer()
        if tokenizer is None:
            raise ConfigError(f"{self.wb.name!r} has no tokenizer: prompts must be lists of token ids")
        ids: list[int] = tokenizer.encode(prompt)
        return ids

    def _feed(self, ids: Tensor) -> dict[str, Tensor]:
        """The graph's inputs for token ids [B, S]."""
        batch, length = ids.shape
        feed = {
            "input_ids": ids,
            "position_ids": torch.arange(length).expand(batch, length).contiguous(),
            "rope_lengths": rope_lengths(length, length).expand(batch, length).contiguous(),
        }
        return {k: v.to(self.wb.device) for k, v in feed.items()}

    def _split(self, feed: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Each rank's inputs: the same, or with attention_dp its share of the sequences."""
        n = len(self.ranks)
        if not self.dist.enable_attention_dp:
            return [feed] * n
        rows = feed["input_ids"].shape[0]
        if rows % n:
            raise ShardingError(
                f"with attention_dp {n} ranks share out the sequences of a batch; {rows} do not divide by {n}"
            )
        return [{k: v.chunk(n)[r] for k, v in feed.items()} for r in range(n)]

    def _joined(self, outs: list[Any]) -> list[Tensor]:
        """Logits of each rank [B, S, V]; with attention_dp one, of all ranks' sequences."""
        logits = [out[0] for out in outs]
        return [torch.cat(logits)] if self.dist.enable_attention_dp else logits

    def __repr__(self) -> str:
        d = self.dist
        experts = f", experts {d.moe_ep_size} x {d.moe_tp_size}" if d.moe_ep_size > 1 else ""
        attention = ", attention on data" if d.enable_attention_dp else ""
        m = self.ranks[0].memory  # all ranks hold pieces of equal size
        return "\n".join(
            [
                f"{self.wb.name!r} on {d.world_size} virtual ranks (tp={d.tp_size}{experts}{attention})",
                f"  plan   {self.plan!r}",
                f"  memory {human(m.weights)} a rank of {human(m.total)} weights, {m.share:.3f} x a fair share; "
                f"{human(m.cache_per_token)} cache a token",
                f"  comm   {self.comm!r}",
            ]
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


def end_of(wb: Workbench) -> int:
    """How many steps there are to the end of the sharding stage."""
    return sum(p.config.stage.position <= Stage.SHARDING.position for p in wb._passes)


def start_of(wb: Workbench) -> int:
    """How many steps there are before the sharding stage."""
    return sum(p.config.stage.position < Stage.SHARDING.position for p in wb._passes)


def plan_of(wb: Workbench) -> ShardingPlan:
    """The plan that detection left with the graph."""
    plan = graph_module(wb).meta.get(PLAN)
    return plan if isinstance(plan, ShardingPlan) else ShardingPlan()


def shard(
    wb: Workbench,
    tp: int,
    moe_ep: int | None = None,
    attention_dp: bool | None = None,
    plan: ShardingPlan | None = None,
    **config: Any,
) -> VirtualRanks:
    """Cut a Workbench's model over ``tp`` virtual ranks of this process; the Workbench stays as it is.

    Experts are dealt to ``moe_ep`` of the ranks (default: all) and cut over the rest; with ``attention_dp`` attention
    stays whole and each rank has sequences of its own. ``plan``: an edited one in place of detection. Other keywords
    are fields of the sharding stage's transforms (``shard_layers=["mlp"]``). Raises ShardingError for what cannot be
    cut so, ConfigError for unknown fields.
    """
    dist = _world(tp, moe_ep, attention_dp, plan)
    base = fork(wb, start_of(wb), dist=dist)
    for key in (DETECT, WRITE, APPLY):
        base._index(key)  # a KeyError names what the pipeline lacks
    whole = base.graph
    if plan is not None:
        _refuse_foreign(plan, whole, wb)
        graph_module(base).meta[PLAN] = plan
        base._state.records[PLAN] = plan
    _configure(base, plan is None, config)
    while base.position < base._index(APPLY):
        base.step()
    v = VirtualRanks(wb, whole, base)
    v.ranks[0]  # what cannot be cut is said now
    return v


def _world(tp: Any, moe_ep: Any, attention_dp: bool | None, plan: ShardingPlan | None) -> DistConfig:
    for name, value in (("tp", tp), ("moe_ep", moe_ep)):
        if value is None and name == "moe_ep":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ShardingError(f"shard({name}={value!r}): expected a number of ranks, 1 or more")
    if plan is None:
        return DistConfig.of(tp, moe_ep, enable_attention_dp=bool(attention_dp))
    if not isinstance(plan, ShardingPlan):
        raise ShardingError(
            f"shard(plan={plan!r}): expected a ShardingPlan, as wb.shard(tp=...).plan gives one"
        )
    asked = {
        "tp": (tp, plan.tp),
        "moe_ep": (moe_ep, plan.moe_ep),
        "attention_dp": (attention_dp, plan.attention_dp),
    }
    for name, (given, made) in asked.items():
        if given is not None and given != made:
            raise ShardingError(
                f"the plan was made for {name}={made}, not {given}: its pieces would not fit; make one with "
                f"wb.shard({name}={given}).plan, or shard with {name}={made}"
            )
    return DistConfig.of(tp, plan.moe_ep, enable_attention_dp=plan.attention_dp)


def _configure(base: Workbench, detects: bool, config: dict[str, Any]) -> None:
    """Give each field to the passes of the stage that have it; ConfigError for one that none has."""
    base.configure(DETECT, enabled=detects)
    keys = [*([DETECT] if detects else []), WRITE, APPLY]
    known = {key: type(base._passes[base._index(key)].config).model_fields for key in keys}
    for name in config:
        if not any(name in fields for fields in known.values()):
            names = {n for fields in known.values() for n in fields} - set(PassConfig.model_fields)
            why = "" if detects else "; with a plan nothing is detected"
            raise ConfigError(f"shard() has no option {name!r}{nearest(name, names)}{why}")
    for key, fields in known.items():
        base.configure(key, enabled=True, **{n: v for n, v in config.items() if n in fields})


def _refuse_foreign(plan: ShardingPlan, whole: Snapshot, wb: Workbench) -> None:
    """ShardingError for a plan whose rows are not of this graph."""
    for row in plan:
        node = whole.by_id.get(row.node)
        lacking = [w for w in row.weights if w not in wb.factory.tensors]
        if node is None or node.name != row.name or lacking:
            what = f"weight {lacking[0]!r}" if lacking else f"node {row.name!r} (id {row.node})"
            raise ShardingError(
                f"the plan is of another model or another pipeline: {what} is not in the graph of {wb.name!r}; make a "
                "plan of this one with wb.shard(...).plan and edit that"
            )


__all__ = ["Rank", "VirtualRanks", "shard"]
