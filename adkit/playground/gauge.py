"""What a panel measures: the engine's counts, looked at now and then from outside its loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from statistics import mean

from adkit.playground.driver import Request
from adkit.runtime import Engine, EngineStats
from adkit.viz.live import Occupancy

_WINDOW = 1.0  # seconds that "now" means
_KEPT = 160  # samples of occupancy


@dataclass(frozen=True)
class PlayStats:
    """Figures of a panel's latest run, and of the engine now.

    ``tokens_per_second`` counts the run's output tokens from the question to its end (or now);
    ``tokens_per_second_now`` all of the engine's in the last second; ``first_token_seconds`` is the mean over
    the run's requests; ``batch`` the mean number of sequences a step lately. None: nothing to tell yet.
    """

    requests: int
    finished: int
    output_tokens: int
    seconds: float
    tokens_per_second: float | None
    tokens_per_second_now: float | None
    first_token_seconds: float | None
    batch: float | None

    def __repr__(self) -> str:
        parts = [f"{self.finished} of {self.requests} requests finished"]
        parts += [f"{self.output_tokens} tokens in {self.seconds:.2f} s"]
        if self.tokens_per_second is not None:
            parts += [f"{self.tokens_per_second:,.1f} tokens/s"]
        if self.first_token_seconds is not None:
            parts += [f"first token after {self.first_token_seconds * 1e3:.1f} ms"]
        return f"PlayStats({', '.join(parts)})"


class Gauge:
    """Samples the engine's counts: ``tick`` every ``interval`` seconds or so."""

    def __init__(self, engine: Engine, interval: float) -> None:
        self.engine = engine
        self.interval = interval
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self._samples: deque[float] = deque(maxlen=_KEPT)
        self._window: deque[tuple[float, int]] = deque()
        self._seen: EngineStats = self.engine.stats

    def tick(self) -> bool:
        """Look at the engine; True when it did something since the last look."""
        now, stats = time.perf_counter(), self.engine.stats
        span = stats - self._seen
        if span.steps < 1:
            self._trim(now)
            return False
        if not self._window:
            self._window.append((now - self.interval, self._seen.output_tokens))
        self._seen = stats
        self._samples.append(span.batch_occupancy)
        self._window.append((now, stats.output_tokens))
        self._trim(now)
        return True

    def _trim(self, now: float) -> None:
        while self._window and now - self._window[0][0] > _WINDOW:
            self._window.popleft()

    @property
    def occupancy(self) -> Occupancy:
        """Sequences a step, lately, as a picture."""
        return Occupancy(tuple(self._samples), self.interval, self.engine.config.max_batch_size)

    @property
    def rate(self) -> float | None:
        """Output tokens/s of the engine in the last second, or None when it rests."""
        window = list(self._window)
        if len(window) < 2 or time.perf_counter() - window[-1][0] > _WINDOW / 2:
            return None
        (start, before), (end, after) = window[0], window[-1]
        return (after - before) / (end - start)

    def stats(self, run: Seq[Request]) -> PlayStats:
        """Figures of a run's requests, and of the engine now."""
        tokens = sum(r.handle.num_output for r in run)
        now = time.perf_counter()
        seconds = max((r.ended or now for r in run), default=now) - min((r.asked for r in run), default=now)
        firsts = [r.first_token_seconds for r in run if r.first_token_seconds is not None]
        recent = list(self._samples)[-max(1, round(_WINDOW / self.interval)) :]
        return PlayStats(
            requests=len(run),
            finished=sum(r.ended is not None for r in run),
            output_tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds if tokens and seconds else None,
            tokens_per_second_now=self.rate,
            first_token_seconds=mean(firsts) if firsts else None,
            batch=mean(recent) if recent else None,
        )
