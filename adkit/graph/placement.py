"""Where a model is cut, as data: the placement of a value over ranks, and the plan, a row a node."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from adkit.graph.display import mimebundle
from adkit.graph.provenance import without_layer

PLAN = "adkit_plan"  # gm.meta[PLAN]: the ShardingPlan that was made for a graph

#: What is done at a node. ``colwise``/``rowwise``: a linear's output or input features are cut; ``gather``: output
#: features cut, or a product's batch, and joined again at once; ``vocab``: an embedding's rows; ``experts``: a mixture
#: of experts by expert and by hidden feature; ``batch``: the stacked matrices of a batched product; ``follow``: works
#: on pieces because its inputs are pieces; ``whole``: the same on every rank.
Decision = Literal["colwise", "rowwise", "gather", "vocab", "experts", "batch", "follow", "whole"]


@dataclass(frozen=True)
class Placement:
    """What ranks hold of one value: all of it, a piece along ``dim``, or a term of its sum."""

    kind: Literal["replicated", "cut", "partial"] = "replicated"
    dim: int | None = None

    def __str__(self) -> str:
        return self.kind if self.dim is None else f"{self.kind}({self.dim})"


REPLICATED, PARTIAL = Placement(), Placement("partial")


def cut(dim: int) -> Placement:
    """A piece along ``dim`` (counted from the front)."""
    return Placement("cut", dim)


@dataclass(frozen=True)
class PlanRow:
    """One node of a plan.

    ``node`` is its id; ``weights`` the parameters that the decision cuts, along ``dim``, no piece smaller than
    ``min_local`` elements, in blocks of ``sizes`` where the weight holds several; ``reduce``: a sum over ranks
    follows; ``placement``: of the node's output (before that sum); ``source``: manual, factory, heuristic, user, or
    empty where none of them decided;
    ``tokens``: where ranks have sequences of their own, ``gathered`` when the node works on the tokens of all ranks (of
    a sum each then keeps its own), ``joined`` when the ranks' rows are put together after it;
    ``why``: the reason, for what stays whole the reason against.
    """

    node: int
    name: str
    module: str
    op: str
    decision: Decision
    region: str = ""
    layer_type: str = "unknown"
    layer: int | None = None
    weights: tuple[str, ...] = ()
    dim: int | None = None
    min_local: int = 1
    sizes: tuple[int, ...] = ()
    reduce: bool = False
    tokens: str = ""
    placement: Placement = REPLICATED
    source: str = "heuristic"
    why: str = ""


@dataclass(frozen=True)
class ShardingPlan:
    """What is cut where, and why: a row a node that has a weight or talks to other ranks, in graph order.

    Frozen: :meth:`edit` returns another plan, which is checked when it is applied. ``tp``, ``moe_ep``, ``moe_tp``:
    the sizes it was made for. The strategies are those that detection was told, for all sums and joins.
    """

    rows: tuple[PlanRow, ...] = ()
    tp: int = 1
    moe_ep: int = 1
    moe_tp: int = 1
    attention_dp: bool = False
    allreduce_strategy: str = "AUTO"
    allgather_strategy: str = "AUTO"

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, pattern: str) -> list[PlanRow]:
        """Rows whose module path or node name matches ``pattern`` (``*`` any text: ``model.layers.0.mlp*``)."""
        return [r for r in self.rows if _matches(r, pattern)]

    def edit(self, pattern: str, decision: Decision, why: str = "edited by hand") -> ShardingPlan:
        """The plan with another decision for the rows that match; what follows them follows on its own.

        KeyError when no row with a decision of its own matches, ValueError for what is no decision. Whether the plan
        still fits together is checked when it is applied.
        """
        if decision not in get_args(Decision) or decision == "follow":
            known = ", ".join(d for d in get_args(Decision) if d != "follow")
            raise ValueError(f"{decision!r} is no decision; expected one of {known}")
        if all(r.decision == "follow" for r in self.find(pattern)):
            modules = sorted({without_layer(r.module) for r in self.rows if r.decision != "follow"})
            raise KeyError(f"no row of the plan matches {pattern!r}; modules: {', '.join(modules[:12])}")
        rows = tuple(
            replace(_bare(r) if decision == "whole" else r, decision=decision, source="user", why=why)
            if r.decision != "follow" and _matches(r, pattern)
            else r
            for r in self.rows
        )
        return replace(self, rows=rows)

    def to_manual(self) -> dict[str, str]:
        """The decisions as ``manual_config`` of detect_sharding: module path -> decision, layers alike as one.

        Where one module has several weights, decided differently, their own names stand for it.
        """
        decided = [r for r in self.rows if r.decision != "follow"]
        found: dict[str, str] = {}
        for row in decided:
            here = {r.decision for r in decided if r.module == row.module}
            name = row.module if len(here) == 1 or not row.weights else row.weights[0]
            pattern = without_layer(name)
            alike = {
                r.decision
                for r in decided
                if any(fnmatch.fnmatchcase(n, pattern) for n in (r.module, *r.weights))
            }
            found[pattern if alike == {row.decision} else name] = row.decision
        return found

    def table(self) -> Any:
        """The plan as a pandas DataFrame."""
        import pandas as pd

        names = (
            "module",
            "op",
            "decision",
            "dim",
            "min_local",
            "reduce",
            *(["tokens"] if self.attention_dp else []),
            "placement",
            "layer_type",
            "source",
            "why",
        )
        return pd.DataFrame(
            [[str(getattr(r, n)) if n == "placement" else getattr(r, n) for n in names] for r in self.rows],
            columns=list(names),
            index=[r.name for r in self.rows],
        )

    @property
    def summary(self) -> str:
        """The plan in one line: the world, how many of each decision, how many sums."""
        counts: dict[str, int] = {}
        for r in self.rows:
            counts[r.decision] = counts.get(r.decision, 0) + 1
        told = ", ".join(f"{n} {d}" for d, n in sorted(counts.items(), key=lambda c: -c[1]))
        sums = sum(r.reduce for r in self.rows)
        world = f"tp={self.tp}, moe {self.moe_ep}x{self.moe_tp}" + (
            ", attention dp" if self.attention_dp else ""
        )
        return f"ShardingPlan({world}: {told or 'nothing'}; {sums} sums over ranks)"

    def __repr__(self) -> str:
        """The summary, then a line for rows that are alike in every layer."""
        lines: dict[tuple[str, ...], int] = {}
        for r in self.rows:
            piece = f"dim {r.dim}" if r.dim is not None else ""
            piece += f" of {list(r.sizes)}" if r.sizes else ""
            piece += f", no less than {r.min_local}" if r.min_local > 1 else ""
            why = r.why if r.decision == "whole" else "summed over ranks" if r.reduce else ""
            why = "; ".join(w for w in (why, r.tokens and f"tokens {r.tokens}") if w)
            key = (without_layer(r.module), r.decision, piece, without_layer(why))
            lines[key] = lines.get(key, 0) + 1
        wide = [max((len(k[i]) for k in lines), default=0) for i in range(3)]
        told = [
            f"  {n:>4} x  "
            + "  ".join(word.ljust(w) for word, w in zip(key, (*wide, 0), strict=True)).rstrip()
            for key, n in lines.items()
        ]
        return "\n".join([self.summary, *told])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


def _bare(row: PlanRow) -> PlanRow:
    """A row that says nothing of pieces: there are none once its node stays whole."""
    return replace(row, dim=None, min_local=1, sizes=(), reduce=False, tokens="", placement=REPLICATED)


def _matches(row: PlanRow, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (row.module, row.name, *row.weights))
