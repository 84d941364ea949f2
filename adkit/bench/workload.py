"""What is asked of an engine: prompts of random tokens and how many new ones each."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adkit.config import Fragment, load_config
from adkit.contract import ConfigError
from adkit.models import resolve

#: Tokens in a prompt and new tokens a request, where the model has room for them.
LENGTHS = (128, 128)
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


@dataclass(frozen=True)
class Room:
    """The most tokens, prompt and new ones together, that a request can have, and who says so."""

    tokens: int
    why: str

    @classmethod
    def of(
        cls, model: Any, config: Sequence[Fragment], overrides: Sequence[str], sampled: bool = True
    ) -> Room:
        """What the model's positions leave, and ``max_seq_len`` where settings give it; nothing is built for that.

        ``sampled``: the last token is, so that no position is looked up for it. Raises ModelError and ConfigError as a
        Workbench does.
        """
        factory = resolve(model, random_weights=True)  # its config is all that is wanted
        positions = factory.positions or sys.maxsize
        given = load_config([{"max_seq_len": sys.maxsize}, *config], overrides).max_seq_len
        if given <= positions:
            return cls(given, f"max_seq_len is {given}")
        return cls(min(positions + sampled, sys.maxsize), f"{factory.name} has {positions} positions")

    def fit(
        self,
        prompt: int | None,
        new: int | None,
        usual: tuple[int, int],
        show: Callable[[str], None],
        least_new: int = 1,
    ) -> tuple[int, int]:
        """Tokens of a prompt and new ones: as given, or else (None) as ``usual``, or what there is room for, as shown.

        Raises ConfigError where nothing fits.
        """
        p, n = usual[0] if prompt is None else prompt, usual[1] if new is None else new
        if p + n <= self.tokens:
            return p, n
        less_p = p if prompt is not None else min(p, self.tokens // 2 if new is None else self.tokens - n)
        less_n = n if new is not None else min(n, self.tokens - less_p)
        if less_p < 1 or less_n < least_new or less_p + less_n > self.tokens:
            raise ConfigError(f"prompt {p} and {n} new tokens make {p + n}, and {self.why}; ask for less")
        for name, was, size in (("prompt", p, less_p), ("new", n, less_n)):
            if size != was:
                show(f"{name}: {size} tokens and not the usual {was}, as {self.why}")
        return less_p, less_n
