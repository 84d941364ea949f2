"""When each token arrived on the host, and the figures that follow from that.

Decode rate of a batch = its tokens after the first / (last token - first token), which for one request is
(new tokens - 1) / (last token - first token). Throughput = tokens / (last token - submission).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timeline:
    """Arrival of every token of every request, in seconds of one clock; ``start`` is when they were submitted.

    ``cut``: it was stopped before it was done.
    """

    start: float
    stamps: list[list[float]]
    cut: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that arrived."""
        return sum(map(len, self.stamps))

    @property
    def seconds(self) -> float:
        """From submission to the last token."""
        return max(s[-1] for s in self.stamps if s) - self.start

    @property
    def first_token(self) -> list[float]:
        """Seconds to the first token of each request that has one."""
        return [s[0] - self.start for s in self.stamps if s]

    @property
    def gaps(self) -> list[float]:
        """Seconds between one token and the next, of all requests."""
        return [b - a for s in self.stamps for a, b in itertools.pairwise(s)]

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first, of all requests; 0 when none has two."""
        begun = [s for s in self.stamps if s]
        span = max(s[-1] for s in begun) - min(s[0] for s in begun)
        return (self.tokens - len(begun)) / span if span > 0 else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the others lie (nearest rank); 0 of nothing."""
    ranked = sorted(values)
    return ranked[min(int(len(ranked) * share), len(ranked) - 1)] if ranked else 0.0


def percentiles(values: Iterable[float], shares: Sequence[int] = (50, 90, 99)) -> dict[str, float]:
    """``{"p50": ..., "p90": ..., "p99": ...}``, in seconds rounded to microseconds."""
    ranked = sorted(values)
    return {f"p{s}": round(quantile(ranked, s / 100), 6) for s in shares}


def latency_figures(runs: Sequence[Timeline]) -> dict[str, object]:
    """Rates and delays of some runs of one batch: medians over runs, percentiles over all tokens.

    Where runs were cut, of the tokens until then, and how long they took.
    """
    batch = len(runs[0].stamps)
    rate = statistics.median(t.decode_rate for t in runs)
    cut = [t for t in runs if t.cut]
    figures: dict[str, object] = {
        "batch": batch,
        "tokens_per_second": round(rate, 1),
        "steps_per_second": round(rate / batch, 2),
        "first_token_seconds": percentiles((t for r in runs for t in r.first_token), (50, 99)),
        "inter_token_seconds": percentiles(g for r in runs for g in r.gaps),
    }
    return figures | ({"cut": True, "seconds": round(max(t.seconds for t in cut), 3)} if cut else {})


def throughput_figures(run: Timeline, prompt_lengths: Sequence[int]) -> dict[str, object]:
    """Rates and delays of one drained run; where it was cut, of the requests and tokens until then."""
    begun = sum(n for n, s in zip(prompt_lengths, run.stamps, strict=True) if s)
    figures: dict[str, object] = {
        "seconds": round(run.seconds, 3),
        "output_tokens": run.tokens,
        "output_tokens_per_second": round(run.tokens / run.seconds, 1),
        "total_tokens_per_second": round((begun + run.tokens) / run.seconds, 1),
        "first_token_seconds": percentiles(run.first_token, (50, 99)),
        "inter_token_seconds": percentiles(run.gaps),
    }
    return figures | ({"cut": True} if run.cut else {})
