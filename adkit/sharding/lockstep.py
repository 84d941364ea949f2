"""Several ranks' graphs run together in one process: node i of every rank, then node i + 1.

All ranks' graphs have the same nodes in the same order and differ in their weights and constants. Where ranks talk,
:func:`adkit.ops.dist.lockstep` answers from all their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from adkit.contract import AdkitError, ShardingError
from adkit.graph.snapshot import attribute, target_name
from adkit.ops.dist import Exchange, lockstep, over_ranks

#: Told of each call: its node in every rank's graph, and every rank's value of it.
OnCall = Callable[[Sequence[Node], list[Any]], None]
OnExchange = Callable[[list[Exchange]], None]


class RankFails(AdkitError):
    """A node raised on one rank: ``node`` and ``rank`` say where, ``why`` what it said."""

    def __init__(self, node: Node, rank: int, why: str) -> None:
        super().__init__(f"rank {rank} fails at {node.name} ({target_name(node.target)}): {why}")
        self.node, self.rank, self.why = node, rank, why


class Together:
    """The ranks' graphs as one program; raises ShardingError where their nodes are not the same."""

    def __init__(self, graphs: Sequence[GraphModule]) -> None:
        self.graphs = list(graphs)
        columns = [list(gm.graph.nodes) for gm in graphs]
        self.rows: list[tuple[Node, ...]] = list(zip(*columns, strict=False))
        for row in self.rows:
            _same(row)
        if len({len(c) for c in columns}) > 1:
            counts = ", ".join(f"rank {r}: {len(c)}" for r, c in enumerate(columns))
            raise ShardingError(
                f"the ranks' graphs have different numbers of nodes ({counts}), so they cannot run in step; rank 0's "
                "graph decides what all do, and a rank may differ from it in weights and constants only"
            )
        self._last_use = self._last_uses()

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order."""
        return [str(row[0].target) for row in self.rows if row[0].op == "placeholder"]

    def run(
        self,
        feeds: Sequence[Mapping[str, Any]],
        on_call: OnCall = lambda nodes, values: None,
        on_exchange: OnExchange = lambda asked: None,
    ) -> list[Any]:
        """Every rank's output for its inputs by name; a value is freed after its last use.

        Raises RankFails when a node raises.
        """
        ranks = range(len(self.graphs))
        values: list[dict[Node, Any]] = [{} for _ in ranks]

        def arguments(row: Sequence[Node], r: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
            args, kwargs = map_arg((row[r].args, row[r].kwargs), values[r].__getitem__)
            return tuple(args), dict(kwargs)

        for i, row in enumerate(self.rows):
            node = row[0]
            if node.op == "output":
                return [map_arg(row[r].args[0], values[r].__getitem__) for r in ranks]
            if node.op == "placeholder":
                made = [feeds[r][str(node.target)] for r in ranks]
            elif node.op == "get_attr":
                made = [attribute(self.graphs[r], str(row[r].target)) for r in ranks]
            elif over_ranks(node.target):
                made = self._exchange(row, [arguments(row, r) for r in ranks], on_exchange)
            else:
                made = [_call(row[r], r, *arguments(row, r)) for r in ranks]
            if node.op == "call_function":
                on_call(row, made)
            for r in ranks:
                values[r][row[r]] = made[r]
                for done in self._last_use[r].get(i, ()):
                    del values[r][done]
        raise AssertionError("a graph without an output")

    def _exchange(self, row: Sequence[Node], calls: list[Any], on_exchange: OnExchange) -> list[Any]:
        try:
            return lockstep(row[0].target, calls, on_exchange)
        except ShardingError as error:
            error.add_note(f"(at {row[0].name})")
            raise RankFails(row[0], 0, str(error)) from error

    def _last_uses(self) -> list[dict[int, list[Node]]]:
        """For every rank, what no later node reads once a node has run, by the node's place."""
        found: list[dict[int, list[Node]]] = []
        for r in range(len(self.graphs)):
            last: dict[Node, int] = {}
            for i, row in enumerate(self.rows):
                last[row[r]] = i
                for n in row[r].all_input_nodes:
                    last[n] = i
            uses: dict[int, list[Node]] = {}
            for n, i in last.items():
                uses.setdefault(i, []).append(n)
            found.append(uses)
        return found


def _same(row: Sequence[Node]) -> None:
    first = row[0]
    for r, node in enumerate(row):
        if (node.op, target_name(node.target)) != (first.op, target_name(first.target)):
            raise ShardingError(
                f"the ranks' graphs differ: where rank 0 has {first.name} ({target_name(first.target)}), rank {r} has "
                f"{node.name} ({target_name(node.target)}); a pass must do the same on every rank"
            )


def _call(node: Node, rank: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op != "call_function":
        raise ShardingError(f"{node.name} is a {node.op}; graphs of adkit have functions only")
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except (AdkitError, MemoryError):
        raise
    except Exception as error:  # whatever an operator makes of arguments that do not fit together
        raise RankFails(node, rank, f"{type(error).__name__}: {error}") from error


__all__ = ["OnCall", "OnExchange", "RankFails", "Together"]
