"""How fast decoding would be over 1, 2, 4... ranks: each rank's graph on a roofline, and what they say on a link."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adkit.contract import DistConfig, ShardingError
from adkit.graph.cost import Device, device_named, node_costs, total_cost
from adkit.sharding.comm import NVLINK4, Link
from adkit.sharding.forks import fork
from adkit.sharding.rank import end_of

if TYPE_CHECKING:
    from adkit.workbench import Workbench


def scaling(
    wb: Workbench,
    tps: Sequence[int] = (1, 2, 4, 8),
    device: Device | str = "H100 SXM",
    *,
    batch: int = 32,
    context: int = 1024,
    link: Link = NVLINK4,
    dist: DistConfig | None = None,
    shard_layers: Sequence[str] | None = None,
) -> Any:
    """Estimated decode tokens/s at batch 1 and ``batch``, each sequence ``context`` tokens long, over ``tps`` ranks.

    One rank's graph is taken to its cache on shapes and every node costed alone on ``device`` (see
    :mod:`adkit.graph.cost`); collectives take the link's latency and bytes over bandwidth, and hide behind nothing.
    So it is a bound for an engine without gaps, not a forecast. Experts are dealt to all ranks, or cut within them
    as ``dist`` does. With its attention data parallelism a rank has its share of the batch, and ``shard_layers`` says
    what is cut besides experts.

    A pandas DataFrame, a row a tp: GB of weights a rank, then for both batches microseconds of compute and of talk a
    step, tokens/s, and speed over the first row's. A tp that cannot be is a row with a note.
    """
    import pandas as pd

    from adkit.sharding.world import shard  # which makes what this is a method of

    apart = dist is not None and dist.enable_attention_dp
    options: dict[str, Any] = {"attention_dp": True, "shard_layers": shard_layers} if apart else {}
    on = device_named(device)
    shapes = fork(wb, wb.position, factory=wb.factory.without_weights())
    rows: dict[int, dict[str, Any]] = {}
    first: dict[int, float] = {}
    for tp in tps:
        try:
            # as many experts' groups as ``dist`` has, where that goes into tp
            whole_experts = dist is None or dist.moe_tp_size == 1 or tp % dist.moe_tp_size
            v = shard(
                shapes, tp, None if whole_experts or dist is None else tp // dist.moe_tp_size, **options
            )
        except ShardingError as error:
            rows[tp] = {"note": str(error)}
            continue
        rank = fork(v.ranks[0].wb, end_of(v.ranks[0].wb)).run(until="cache_init")
        row: dict[str, Any] = {"weights GB": v.ranks[0].memory.weights / 1e9}
        for n in dict.fromkeys((1, batch)):
            own = -(-n // v.dist.pools)
            costs = node_costs(rank.graph, on, {"tokens": own, "sequences": own, "context": context})
            compute = total_cost(costs.values()).seconds
            talk = v.comm.on(link.bandwidth, link.latency).seconds(own, own)
            speed = n / (compute + talk)
            row |= {
                f"compute us (b{n})": 1e6 * compute,
                f"comm us (b{n})": 1e6 * talk,
                f"tokens/s (b{n})": speed,
                f"speedup (b{n})": speed / first.setdefault(n, speed),
            }
        rows[tp] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "tp"
    table.attrs |= {"device": on, "link": link, "context": context}
    return table
