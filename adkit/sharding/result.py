"""The outcome of checking ranks against the uncut model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from adkit.contract import DistConfig
from adkit.graph.display import mimebundle
from adkit.sharding.agreement import Agreement, Divergence, difference, summary


@dataclass(frozen=True)
class ShardingCheck:
    """Do the ranks compute what the uncut model computes?

    ``max_abs`` and ``rmse_ratio`` (rmse over rms of the uncut) are of the logits, the worst over ranks, NaN where there
    are none to compare; values of ``compared`` of ``nodes`` nodes agreed with the uncut model's, held by the ranks in
    the ways that ``held`` counts; ``first_divergence`` is the first that was wrong.
    """

    ok: bool
    max_abs: float
    rmse_ratio: float
    tolerance: float
    first_divergence: Divergence | None
    compared: int
    nodes: int
    weights: str
    prompts: tuple[tuple[int, ...], ...]
    dist: DistConfig
    held: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        verdict = "the ranks compute what the uncut model does" if self.ok else "the ranks DIFFER"
        prompts = " and ".join(f"{list(shape)}" for shape in self.prompts)
        held = ", ".join(f"{n} {p}" for p, n in self.held.items())
        values = (
            f"{self.compared} of {self.nodes} nodes agreed while they ran ({held})"
            if held
            else "logits alone"
        )
        lines = [
            f"{self.dist.world_size} ranks: {verdict}: logits rmse ratio {self.rmse_ratio:.1e} (allowed "
            f"{self.tolerance:.0e}), max abs {self.max_abs:.1e}",
            f"  {values}; {self.weights} weights, tokens {prompts}",
        ]
        if self.first_divergence is not None:
            lines.append(f"first divergence: {self.first_divergence!r}")
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


def result_of(
    agreement: Agreement, expected: list[Tensor], found: list[list[Tensor]], weights: str, dist: DistConfig
) -> ShardingCheck:
    """Sum up: logits of the uncut model [B, S, V] a prompt, and each rank's (none for a prompt that failed)."""
    pairs = [(e, f) for e, ranks in zip(expected, found, strict=False) for f in ranks]
    whole = len(found) == len(expected) and all(e.shape == f.shape for e, f in pairs)
    worst = [difference(e, f) for e, f in pairs] if whole else [(math.nan, math.nan)]
    max_abs, ratio = (max(w[i] for w in worst) for i in (0, 1))
    if any(math.isnan(w[1]) for w in worst):
        max_abs = ratio = math.nan
    return ShardingCheck(
        ok=ratio <= agreement.tolerance and agreement.divergence is None,
        max_abs=max_abs,
        rmse_ratio=ratio,
        tolerance=agreement.tolerance,
        first_divergence=agreement.divergence,
        compared=len(agreement.held),
        nodes=sum(n.op == "call_function" for n in agreement.records.values()),
        weights=weights,
        prompts=tuple(tuple(e.shape[:2]) for e in expected),
        dist=dist,
        held=summary(agreement.held),
    )
