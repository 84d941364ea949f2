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

from adkit.checking import LENGTHS, TOLERANCE, WHOLE_LIMIT, packed_logits, runnable
from adkit.contract import CompiledModel, ConfigError, DistConfig, RequestError, ShardingError
from adkit.graph.cost import Device
from adkit.graph.display import mimebundle
from adkit.graph.placement import ShardingPlan
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import Steps
from adkit.models.memory import human
from adkit.passes import Stage
from adkit.runtime.live import LiveModel
from adkit.sharding.agreement import Agreement
from adkit.sharding.comm import NVLINK4, Comm, Link, comm_of
from adkit.sharding.engine import SplitDevice, compiled
from adkit.sharding.feeds import Feeds
from adkit.sharding.forks import fork
from adkit.sharding.lockstep import RankFails, Together
from adkit.sharding.memory import weight_sizes
from adkit.sharding.pictures import MeshPlots, overlay
from adkit.sharding.rank import Ranks, end_of, plan_of
from adkit.sharding.result import ShardingCheck, result_of
from adkit.sharding.scaling import scaling

if TYPE_CHECKING:
    from adkit.runtime.live import Params
    from adkit.viz.dot import Drawing
    from adkit.viz.explorer import Explorer
    from adkit.workbench import Workbench


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
        self._feeds = Feeds(wb, hinted._context.dist)
        self._loaded: dict[Any, tuple[Together, Together]] = {}
        self._models: dict[Any, CompiledModel] = {}
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
        """The steps of the sharding stage, as rank 0 took them; where ranks part, ``.check()`` compares all ranks."""
        shared, own = self._hinted, self.ranks[0].wb
        parted = own._steps[shared.position : end_of(own)]
        for s in parted:
            s._checker = lambda step, **options: self.check(**options)
        stage = [s for s in shared._steps[: shared.position] if s.stage == Stage.SHARDING.value]
        return Steps([*stage, *parted], heading=f"Sharding of {self.wb.name!r}, {len(self.ranks)} ranks")

    @cached_property
    def comm(self) -> Comm:
        """Every collective in order, its bytes, and the time that NVLink would take; ``comm.on(...)`` takes another
        link."""
        return comm_of(self.ranks[0].graph, len(self.ranks), self._link)

    # --- looking

    @property
    def plots(self) -> MeshPlots:
        """Figures: who holds what, memory, communication, scaling; each shows itself."""
        return MeshPlots(self)

    def layer(self, layer: int = 0, rank: int = 0, **options: Any) -> Drawing:
        """A rank's graph of one layer, drawn with its cuts and what is exchanged."""
        return self.plots.layer(layer, rank, **options)

    def explore(self, rank: int = 0, **options: Any) -> Explorer:
        """A rank's walk in the explorer, coloured by how ranks hold each value; options as ``wb.explore`` takes."""
        own = self.ranks[rank]
        explorer = own.wb.explore(**options).goto(own.wb._steps[end_of(own.wb) - 1].name)
        return explorer.add_overlay(
            "placement",
            overlay(self, own.graph),
            note=f"what rank {rank} of {len(self.ranks)} holds of each value",
        )

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
        cached: bool = False,
        weights: str = "auto",
        tolerance: float | None = None,
        seed: int = 0,
    ) -> ShardingCheck:
        """Run all ranks and the uncut model on the same prompts, and compare every value and the logits.

        ``prompts``: texts or token ids, each run alone; without them random ones of so many ``tokens`` [B, S]. With
        attention_dp a batch is shared out over the ranks and their logits are joined. ``cached``: the ranks' finished
        graphs instead, over a paged cache each: half of each prompt at once, the rest token by token; then logits alone
        are compared.
        ``weights``: ``checkpoint`` or ``random`` (from ``seed``); ``auto`` takes the model's own, random ones where it
        has none and is small. ``tolerance`` bounds the rmse ratio (default by dtype, as ``wb.check``). Raises
        ShardingError for a model without weights that is too large for random ones.
        """
        limit = (
            TOLERANCE.get(self.wb.factory.dtype, TOLERANCE[torch.bfloat16])
            if tolerance is None
            else tolerance
        )
        with self.wb.bars.busy("checking ranks"):
            source, whole, ranks = self._modules(weights, seed)
            agreement = Agreement(self.whole, [self.hinted], self.ranks[0].graph, self.plan, limit)
            rows = self._feeds.prompts(prompts, tokens, seed)
            if cached:
                return result_of(agreement, *self._cached(rows, whole, *source), source[0], self.dist)
            expected, found = [], []
            for ids in rows:
                agreement.values.clear()
                feed = self._feeds.feed(ids)
                with torch.inference_mode():
                    expected.append(whole.run([feed], on_call=agreement.keep)[0][0])
                    try:
                        outs = ranks.run(self._feeds.split(feed), on_call=agreement.look)
                    except RankFails as error:
                        agreement.failed(error)
                        break
                found.append([out[0] for out in outs])
            return result_of(agreement, expected, found, source[0], self.dist)

    def run(self, *, weights: str = "auto", seed: int = 0, **inputs: Tensor) -> Tensor:
        """Logits [B, S, V] of all ranks together for ``input_ids`` [B, S] (other inputs are made where not given)."""
        _, _, ranks = self._modules(weights, seed)
        if "input_ids" not in inputs:
            raise RequestError(f"run() takes input_ids [B, S]; it was given {', '.join(inputs) or 'nothing'}")
        feed = {**self._feeds.feed(inputs["input_ids"]), **inputs}
        with torch.inference_mode():
            logits: Tensor = ranks.run(self._feeds.split(feed))[0][0]
        return logits

    def llm(self) -> LiveModel:
        """An engine over all ranks: the rest of the pipeline on each, a paged cache each, driven in step."""
        if self._live is None:
            if self.wb.factory.weights == "none":
                raise ShardingError(
                    f"{self.wb.name!r} has no weights to generate with ({self.wb.factory.why_no_weights}); "
                    "Workbench(..., random_weights=True) makes some"
                )
            model = self._compiled(*self._source("auto", 0))
            device = SplitDevice(model) if model.pools > 1 else None
            self._live = LiveModel(model, self.wb._context.engine, self.wb.factory.tokenizer(), device)
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
        detects: Any = self._hinted._passes[self._hinted._index("detect_sharding")].config
        with self.wb.bars.busy("scaling"):
            return scaling(
                self.wb,
                tps,
                device,
                batch=batch,
                context=context,
                link=link,
                dist=self.dist,
                shard_layers=detects.shard_layers,
            )

    # --- inside

    def _source(self, weights: str, seed: int) -> tuple[str, int]:
        """Where weights come from, checkpoint or random, and the seed of those: the model's own where it is random."""
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
            return "random", seed
        return factory.weights, factory.seed

    def _modules(self, weights: str, seed: int) -> tuple[tuple[str, int], Together, Together]:
        """The uncut model and the ranks with weights, made once: each rank reads its parts only."""
        source, seed = self._source(weights, seed)
        key = (source, seed, *(r.graph for r in self.ranks))
        if key not in self._loaded:
            whole = runnable(self._hinted, self.whole, {}, source, seed)
            parts = [runnable(r.wb, r.graph, {}, source, seed) for r in self.ranks]
            self._loaded = {key: (Together([whole]), Together(parts))}
        return (source, seed), *self._loaded[key]

    def _compiled(self, source: str, seed: int) -> CompiledModel:
        """The ranks' finished graphs as one model."""
        key = (source, seed, *(r.graph for r in self.ranks))
        if key not in self._models:
            own = self.wb.factory
            factory = own.with_random_weights(seed) if source == "random" else own
            ranks = [fork(r.wb, end_of(r.wb), factory=factory) for r in self.ranks]
            self._models = {key: compiled(ranks)}
        return self._models[key]

    def _cached(
        self, rows: list[Tensor], whole: Together, source: str, seed: int
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Logits of the uncut model and of the ranks over their caches, a prompt each."""
        model = self._compiled(source, seed)
        if self._live is not None:  # its cache is written over
            self._live.engine.reset()
        if model.pools > 1:
            return self._cached_apart(rows, whole, model)
        sequences = [ids for batch in rows for ids in batch]
        prefill = [max(1, len(ids) // 2) for ids in sequences]
        with torch.inference_mode():
            expected = [
                whole.run([self._feeds.feed(ids[None], n)])[0][0]
                for ids, n in zip(sequences, prefill, strict=True)
            ]
            found = packed_logits(model.forward, model.inputs, model.caches, sequences, prefill, model.device)
        return expected, [[logits[None]] for logits in found]

    def _cached_apart(
        self, batches: list[Tensor], whole: Together, model: CompiledModel
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The same where ranks have sequences of their own: of each batch [ranks, S] rank r has row r."""
        prefill = [max(1, ids.shape[1] // 2) for ids in batches]
        with torch.inference_mode():
            expected = [
                whole.run([self._feeds.feed(ids, n)])[0][0] for ids, n in zip(batches, prefill, strict=True)
            ]
            # Places in a table of all tokens are packed, where a rank has a row of its own.
            table = torch.cat(batches, 1).to(model.device)
            places = torch.arange(table.shape[1]).split([ids.shape[1] for ids in batches])

            def forward(**feed: Any) -> Tensor:
                at = feed.pop("input_ids")
                own = {
                    n: v if n in model.caches.tensors else torch.stack([v] * len(table))
                    for n, v in feed.items()
                }
                return model.forward(input_ids=table[:, at], **own).movedim(0, -2).flatten(-2)[None]

            found = packed_logits(forward, model.inputs, model.caches, places, prefill, model.device)
        return expected, [[f.unflatten(-1, (len(table), -1)).movedim(-2, 0)] for f in found]

    def __repr__(self) -> str:
        d = self.dist
        dealt = any(row.decision == "experts" for row in self.plan)
        experts = f", experts {d.moe_ep_size} x {d.moe_tp_size}" if dealt else ""
        attention = ", attention on data" if d.enable_attention_dp else ""
        m = self.ranks[0].memory  # all ranks hold pieces of equal size
        return "\n".join(
            [
                f"{self.wb.name!r} on {d.world_size} virtual ranks (tp={d.tp_size}{experts}{attention})",
                f"  plan   {self.plan.summary}",
                f"  memory {human(m.weights)} a rank of {human(m.total)} weights, {m.share:.3f} x a fair share; "
                f"{human(m.cache_per_token)} cache a token",
                f"  comm   {self.comm!r}",
            ]
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)
