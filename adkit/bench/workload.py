"""What is asked of an engine: prompts of random tokens and how many new ones each."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from adkit.contract import ConfigError

_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


@dataclass(frozen=True)
class Lengths:
    """Whole numbers drawn uniformly from ``low`` to ``high``, both included; written ``128`` or ``100-1024``."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str | int, what: str) -> Lengths:
        """From text; ConfigError naming ``what`` for anything but a positive number or a rising range."""
        found = _RANGE.fullmatch(str(text))
        if found is None:
            raise ConfigError(f"{what} is {text!r}; expected a number of tokens (128) or a range (100-1024)")
        low = int(found[1])
        high = int(found[2]) if found[2] is not None else low
        if low < 1:
            raise ConfigError(f"{what} is {text!r}; a length is at least 1 token")
        if low > high:
            raise ConfigError(f"{what} is {text!r}: {low} is more than {high}; write the smaller one first")
        return cls(low, high)

    def draw(self, source: random.Random) -> int:
        """One of them."""
        return source.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Workload:
    """Requests that are there all at once: a prompt (token ids) and a number of new tokens each."""

    prompts: list[list[int]]
    news: list[int]

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int, most_new: int | None = None) -> Workload:
        """The first requests, their new tokens cut to ``most_new``."""
        news = self.news[:count]
        return Workload(self.prompts[:count], [min(n, most_new or n) for n in news])

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def new_tokens(self) -> int:
        """New tokens asked for in all."""
        return sum(self.news)


def make_workload(requests: int, prompt: Lengths, new: Lengths, vocab: int, seed: int) -> Workload:
    """Requests with lengths and tokens drawn from ``seed``."""
    source = random.Random(seed)
    lengths = [(prompt.draw(source), new.draw(source)) for _ in range(requests)]
    return Workload(
        [[source.randrange(vocab) for _ in range(p)] for p, _ in lengths], [n for _, n in lengths]
    )


def check_positions(config: object, prompt: int, new: int, name: str) -> None:
    """ConfigError when the longest request goes beyond the positions that the model's config allows."""
    text = config.get_text_config(decoder=True)  # type: ignore[attr-defined]
    most = getattr(text, "max_position_embeddings", None)
    if most is not None and prompt + new > most:
        raise ConfigError(
            f"prompt {prompt} and {new} new tokens make {prompt + new} positions; {name} has {most}. Ask for less"
        )
