"""Sharding looked at: all ranks of a world as virtual ones in this process.

``world`` makes what ``wb.shard(...)`` returns, which is in ``virtual``; ``rank`` is one rank, ``forks`` gives it a
Workbench; ``lockstep`` runs all ranks' graphs together on ``feeds``; ``agreement`` compares every value with the uncut
model's while they run and ``result`` sums up; ``engine`` generates over them; ``memory``, ``comm`` and ``scaling``
count on shapes alone. The passes that decide and cut are in ``adkit/passes/sharding``.
"""

from __future__ import annotations

from adkit.sharding.agreement import Divergence
from adkit.sharding.comm import NVLINK4, Collective, Comm, Link
from adkit.sharding.memory import RankMemory
from adkit.sharding.rank import Rank
from adkit.sharding.result import ShardingCheck
from adkit.sharding.virtual import VirtualRanks
from adkit.sharding.world import shard

__all__ = [
    "NVLINK4",
    "Collective",
    "Comm",
    "Divergence",
    "Link",
    "Rank",
    "RankMemory",
    "ShardingCheck",
    "VirtualRanks",
    "shard",
]
