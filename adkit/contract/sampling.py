"""What a request asks for and what comes back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Literal

from adkit.contract.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]


def _is(kind: type, value: object) -> bool:
    """Whether a value is a number of this kind (numpy's count; True and False do not)."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens for one request; greedy by default.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 switch those filters off.
    ``repetition_penalty`` divides positive and multiplies negative logits of tokens seen in prompt or output
    (CTRL, arXiv 1909.05858). ``seed`` makes a request reproducible whatever else is in the batch. ``stop``
    strings end the text before them; ``stop_token_ids`` end it as eos does; ``ignore_eos`` runs on to
    ``max_tokens``. ``logprobs`` n returns the n most likely tokens' log-probabilities at each position
    (0: only the chosen token's; None: none). Raises RequestError for values out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str | None = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        given = () if self.stop is None else self.stop
        stop = tuple(given) if isinstance(given, (tuple, list)) else (given,)
        object.__setattr__(self, "stop", stop)
        ids = self.stop_token_ids
        object.__setattr__(self, "stop_token_ids", tuple(ids) if isinstance(ids, Iterable) else (ids,))
        checks = (
            (
                "max_tokens",
                _is(Integral, self.max_tokens) and self.max_tokens >= 1,
                "a whole number, at least 1",
            ),
            (
                "temperature",
                _is(Real, self.temperature) and 0 <= self.temperature < math.inf,
                "0 (greedy) or a positive finite number",
            ),
            (
                "top_k",
                _is(Integral, self.top_k) and self.top_k >= 0,
                "0 (off) or a positive number of tokens",
            ),
            ("top_p", _is(Real, self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", _is(Real, self.min_p) and 0 <= self.min_p <= 1, "a number in [0, 1]"),
            (
                "repetition_penalty",
                _is(Real, self.repetition_penalty) and 0 < self.repetition_penalty < math.inf,
                "a positive finite number",
            ),
            ("seed", self.seed is None or _is(Integral, self.seed), "None or a whole number"),
            ("stop", all(isinstance(s, str) and s for s in stop), "a non-empty string, or several"),
            (
                "stop_token_ids",
                all(_is(Integral, t) for t in self.stop_token_ids),
                "token ids (whole numbers)",
            ),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "True or False"),
            (
                "logprobs",
                self.logprobs is None or (_is(Integral, self.logprobs) and 0 <= self.logprobs <= 20),
                "None or 0 to 20",
            ),
        )
        for name, ok, expected in checks:
            if not ok:
                raise RequestError(f"SamplingParams.{name} is {getattr(self, name)!r}; expected {expected}")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of the chosen token and of the most likely ones at one position."""

    token_id: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, repr=False)
class Completion:
    """The answer to one prompt.

    ``text`` ends before the stop string or the token that ended it, and has no special tokens; it is empty
    for a model without a tokenizer. ``token_ids`` are all tokens generated, including that ending token
    (eos). ``error`` says what went wrong when ``finish_reason`` is "error"; what was generated until then is
    kept.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        shown = _shorten(repr(self.text) if self.text else str(list(self.token_ids)))
        error = f", error={self.error!r}" if self.error else ""
        return f"Completion({shown}, {len(self.token_ids)} tokens, {self.finish_reason!r}{error})"


class Completions(list[Completion]):
    """The answers to a list of prompts, in its order; prints one a line."""

    def __repr__(self) -> str:
        return "\n".join(f"[{i}] {c!r}" for i, c in enumerate(self)) or "[]"


def _shorten(text: str, width: int = 300) -> str:
    return text if len(text) <= width else f"{text[: width - 20]} ... {text[-15:]}"


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed answer: request index, new text, new token ids; the last has ``finish_reason``.

    ``logprobs`` go with ``token_ids`` where asked for; ``error`` is set when the reason is "error".
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
