"""Sharding looked at: all ranks of a world as virtual ones in this process.

``virtual`` has what ``wb.shard(...)`` returns, ``forks`` a Workbench for each rank; ``lockstep`` runs all ranks' graphs
together; ``agreement`` compares every value with the uncut model's while they run and ``result`` sums up; ``engine``
generates over them; ``memory``, ``comm`` and ``scaling`` count on shapes alone. The passes that decide and cut are in
``adkit/passes/sharding``.
"""

from __future__ import annotations

from adkit.sharding.agreement import Divergence
from adkit.sharding.comm import NVLINK4, Collective, Comm, Link
from adkit.sharding.memory import RankMemory
from adkit.sharding.result import ShardingCheck
from adkit.sharding.virtual import Rank, VirtualRanks, shard

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
