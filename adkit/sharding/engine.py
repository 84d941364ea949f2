"""An engine over virtual ranks: the rest of the pipeline on each, one paged cache each, run in step.

Ranks run the same batch, or with attention data parallelism each one of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adkit.contract import CachePool, CompiledModel, SequenceBatch, ShardingError
from adkit.passes.compile.compile_model import learned_positions
from adkit.runtime.device import OneDevice, picked
from adkit.sharding.forks import graph_module
from adkit.sharding.lockstep import Together

if TYPE_CHECKING:
    from adkit.workbench import Workbench


@dataclass
class RankPools(CachePool):
    """Rank 0's cache, and with it those of the others: what is done to one is done to all."""

    others: list[CachePool] = field(default_factory=list)

    @classmethod
    def of(cls, pools: Sequence[CachePool]) -> RankPools:
        """Pools of the same pages: as many as the smallest has."""
        pages = min(p.num_pages for p in pools)
        for p in pools:
            if p.num_pages != pages and p.tensors:
                p.allocate(pages, next(iter(p.tensors.values())).device)
        first, *others = pools
        return cls(first.specs, first.page_size, pages, first.tensors, others)

    def allocate(self, num_pages: int, device: torch.device | str) -> None:
        """(Re)allocate every rank's."""
        super().allocate(num_pages, device)
        for pool in self.others:
            pool.allocate(num_pages, device)

    def wipe(self, pages: Sequence[int]) -> None:
        """Zero these pages of every rank's."""
        self.wipe_of(0, pages)
        for rank in range(len(self.others)):
            self.wipe_of(rank + 1, pages)

    def wipe_of(self, rank: int, pages: Sequence[int]) -> None:
        """Zero these pages of one rank's."""
        if rank:
            self.others[rank - 1].wipe(pages)
        else:
            super().wipe(pages)


def compiled(ranks: Sequence[Workbench]) -> CompiledModel:
    """Ranks as one model that the runtime can run: what remains of each pipeline is run, to its cache.

    Where ranks have sequences of their own every input of the model has a rank's in each row: input_ids [ranks, 1, T].
    """
    for wb in ranks:
        wb.run(until="cache_init")
    together = Together([graph_module(wb) for wb in ranks])
    caches = [wb._state.caches for wb in ranks]
    if any(c is None for c in caches):
        raise ShardingError("the ranks' graphs have no caches: cache_init did not run")
    pools = RankPools.of([c for c in caches if c is not None])

    first = ranks[0]
    dist = first._context.dist

    def forward(**feed: Any) -> Tensor:
        feeds = [feed] * len(ranks)
        if dist.pools > 1:
            feeds = [
                {n: v if n in pools.tensors else v[r] for n, v in feed.items()} for r in range(dist.pools)
            ]
        feeds[1:] = [{**f, **pool.tensors} for f, pool in zip(feeds[1:], pools.others, strict=True)]
        logits: Tensor = together.run(feeds)[0][0]
        return logits

    output = together.rows[-1][0].args[0]
    return CompiledModel(
        forward=forward,
        inputs=tuple(together.inputs),
        caches=pools,
        vocab_size=int(output[0].meta["val"].shape[-1]),  # type: ignore[index, union-attr]
        device=first.device,
        eos_token_ids=tuple(first.factory.eos_token_ids),
        max_positions=learned_positions(together.graphs[0]),
        made_for=first.factory.positions,
        pools=dist.pools,
        details={"backend": f"{len(ranks)} virtual ranks"},
    )


class SplitDevice(OneDevice):
    """Virtual ranks that have sequences of their own, as an engine's device."""

    def logits(self, host: Any, replay: bool, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of the rows that get a token, of all ranks; ``host`` is a SplitBatch."""
        batches = [part.to(self.model.device, previous) for part in host.parts]
        rows = {n: torch.stack([getattr(b, n) for b in batches]) for n in SequenceBatch.names()}
        return picked(host.parts[0], self.model(SequenceBatch(**rows)), None)

    def wipe(self, pages: Sequence[int], pool: int = 0) -> None:
        """Zero these pages of one rank's caches."""
        caches = self.model.caches
        assert isinstance(caches, RankPools)
        caches.wipe_of(pool, pages)
