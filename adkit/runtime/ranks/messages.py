"""What the engine's process and the ranks say to each other.

Down to the ranks: a :class:`Job` first, then :class:`Step`, :class:`Collect`, :class:`Wipe`, :class:`End`. Up from
them: :class:`Ready` or :class:`Failed`, :class:`Progress`, :class:`Result`. All are pickled but the step, of which
there is one every few milliseconds: a fixed header, its draws if there are any, and the packed batch as it lies in
memory.
"""

from __future__ import annotations

import pickle
import struct
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from adkit.contract import BatchLayout, DistConfig, HostBatch, SamplingParams, SplitBatch
from adkit.runtime.device import Drawn
from adkit.runtime.sampler import Drawing


@dataclass
class Draw:
    """What a rank must know of a sequence to draw its next token; a :class:`~adkit.runtime.sampler.Drawing`."""

    params: SamplingParams
    plain: bool
    tokens: array[int]
    num_pending: int
    row: int
    number: float

    @classmethod
    def of(cls, seq: Drawing) -> Draw:
        """``seq`` as it stands; its next random number is taken if it needs one."""
        p = seq.params
        known = seq.tokens if p.repetition_penalty != 1 else array("q")
        return cls(p, seq.plain, known, seq.num_pending, seq.row, 0.0 if p.greedy else seq.uniform())

    def uniform(self) -> float:
        """The number that was taken."""
        return self.number


_PLAIN = Draw(SamplingParams(), True, array("q"), 0, 0, 0.0)


@dataclass
class Step:
    """Run a packed batch, the ``number``-th. ``rows`` sequences get a token.

    ``host``: every rank's, or a part a rank (:meth:`of`). ``replay``: by the model's ``decode``. ``plain``: every row
    takes its best token; if not, ``draws`` tells rank 0 how each gets its own.
    """

    number: int
    replay: bool
    plain: bool
    rows: int
    host: HostBatch | SplitBatch
    draws: list[Draw] | None = None

    def of(self, rank: int) -> Step:
        """The message for one rank."""
        return replace(self, host=self.host.parts[rank]) if isinstance(self.host, SplitBatch) else self

    @property
    def sampling(self) -> list[Draw]:
        """One a row."""
        return [_PLAIN] * self.rows if self.draws is None else self.draws


@dataclass(frozen=True)
class Job:
    """What a rank is to be: the one of ``dist``, on ``device``, to meet the others in ``store`` (host, port).

    ``builder``: ``"module:function"``, called with ``dist``, ``device``, ``progress`` and the ``options``; returns a
    CompiledModel. ``timeout`` (seconds) bounds a wait for other ranks.
    """

    dist: DistConfig
    device: str
    store: tuple[str, int]
    builder: str
    options: dict[str, Any]
    timeout: float


@dataclass(frozen=True)
class Collect:
    """Send the result of a step once it is done."""

    number: int


@dataclass(frozen=True)
class Wipe:
    """Zero pages of every cache; of one rank's, ``pool``, where ranks have sequences of their own."""

    pages: tuple[int, ...]
    pool: int


@dataclass(frozen=True)
class End:
    """No more will come."""


@dataclass(frozen=True)
class Ready:
    """A rank is built. What the engine's process must know of its model; ``layouts`` are those it can replay."""

    rank: int
    vocab_size: int
    device: str
    inputs: tuple[str, ...]
    num_pages: int
    page_size: int
    eos_token_ids: tuple[int, ...]
    max_positions: int | None
    made_for: int | None = None
    num_previous: int = 0
    layouts: tuple[BatchLayout, ...] = ()
    pools: int = 1
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """So much of ``what`` is done on a rank."""

    done: int
    total: int
    what: str


@dataclass(frozen=True)
class Result:
    """The tokens of a step."""

    number: int
    drawn: Drawn


@dataclass(frozen=True)
class Failed:
    """A rank failed and ends. ``kind``: the error's class if it is one of adkit's own, with a message for the user.

    ``secondary``: it failed for want of another rank, which is then the one to look at.
    """

    rank: int
    kind: str
    message: str
    traceback: str
    secondary: bool


_HEADER = struct.Struct("<qqqqqqqBBBB")  # number, rows, T, R, M, L, L without padding, then flags, shares
_STEP, _OTHER = b"S", b"O"


def encode(message: Any, with_draws: bool = True) -> bytes:
    """The message in bytes; without draws for ranks that do not sample."""
    if not isinstance(message, Step):
        return _OTHER + pickle.dumps(message)
    host = message.host
    assert isinstance(host, HostBatch), "each rank is sent its own part"
    at, shares = host.layout, array("q", host.shares).tobytes()
    header = _HEADER.pack(
        message.number, message.rows, at.tokens, at.sequences, at.pages, at.logits, host.logits,
        message.replay, message.plain, host.continues, len(host.shares),
    )  # fmt: skip
    draws = pickle.dumps(message.draws) if message.draws and with_draws else b""
    size = len(draws).to_bytes(4, "little")
    return b"".join([_STEP, header, size, draws, shares, host.buffer.numpy().data])


def decode(data: memoryview, pinned: bool = False) -> Any:
    """The message in ``data``; a step's batch in pinned memory if asked for."""
    if bytes(data[:1]) == _OTHER:
        return pickle.loads(data[1:])
    at = 1 + _HEADER.size
    number, rows, tokens, sequences, pages, logits, real, replay, plain, continues, ranks = _HEADER.unpack(
        data[1:at]
    )
    size = int.from_bytes(data[at : at + 4], "little")
    at += 4
    draws = pickle.loads(data[at : at + size]) if size else None
    at += size
    shares = tuple(data[at : at + 8 * ranks].cast("q")) if ranks else ()
    layout = BatchLayout(tokens, sequences, pages, logits)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8, pin_memory=pinned)
    buffer.numpy()[:] = data[at + 8 * ranks :]
    host = HostBatch(layout, buffer, real, bool(continues), shares)
    return Step(number, bool(replay), bool(plain), rows, host, draws)


def step_of(number: int, host: HostBatch | SplitBatch, replay: bool, sampling: Seq[Drawing]) -> Step:
    """The message of a step."""
    plain = all(s.plain for s in sampling)
    draws = None if plain else [Draw.of(s) for s in sampling]
    return Step(number, replay, plain, len(sampling), host, draws)
