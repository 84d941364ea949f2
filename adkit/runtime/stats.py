"""What the engine counts."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class EngineStats:
    """Counts since the engine was built; subtract an earlier copy for those of a span.

    ``seconds`` is time spent in steps; ``step_sequences`` adds up the sequences of every step;
    ``reused_tokens`` are prompt tokens found in the prefix cache, ``computed_tokens`` all that the model ran.
    """

    requests: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    reused_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_sequences: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second of engine time."""
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def batch_occupancy(self) -> float:
        """Mean number of sequences a step."""
        return self.step_sequences / self.steps if self.steps else 0.0

    def __sub__(self, earlier: EngineStats) -> EngineStats:
        return EngineStats(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def __repr__(self) -> str:
        parts = [
            f"{self.requests} requests",
            f"{self.output_tokens} output tokens in {self.seconds:.2f} s",
            f"{self.tokens_per_second:,.1f} tokens/s",
            f"{self.steps} steps of {self.batch_occupancy:.1f} sequences",
        ]
        if self.reused_tokens:
            parts.append(f"{self.reused_tokens} tokens reused from the prefix cache")
        if self.preemptions:
            parts.append(f"{self.preemptions} preemptions")
        return f"EngineStats({', '.join(parts)})"
