"""The engine's side of the ranks: a device that is several.

A step is sent to every rank and runs there; only its tokens come back, from rank 0. Rank 0 may live in this process (a
program that torchrun started, or ``adkit run --tp``) or in one of its own like the others (a notebook, which must
outlive whatever happens to ranks).

A rank that fails ends the world: ranks that wait for it in a collective cannot be called back, so all are ended, and
whoever waits gets a :class:`~adkit.contract.RankError` that names the rank at fault. That is not always the first to
complain: ranks that lost a peer say so (``Failed.secondary``), and are blamed only if nobody else is.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, NoReturn, cast

import torch

from adkit.contract import (
    BatchLayout,
    CachePool,
    CompiledModel,
    HostBatch,
    RankError,
    ShardingError,
    fitting_layout,
)
from adkit.contract import errors as known_errors
from adkit.runtime.device import Drawn
from adkit.runtime.ranks.link import uninterrupted
from adkit.runtime.ranks.messages import Collect, End, Failed, Progress, Ready, Result, Wipe, step_of
from adkit.runtime.ranks.processes import Member
from adkit.runtime.sampler import Drawing

_BLAME_SECONDS = 2.0  # how long others may speak up once one has failed
_END_SECONDS = 3.0  # that ranks get to end by themselves
_LOOK_SECONDS = 1.0

ShowProgress = Callable[[int, int, str], None]


@dataclass
class CrewStep:
    """A step that the ranks run; ``count`` rows get a token."""

    crew: Crew
    number: int
    count: int

    def wait(self) -> Drawn:
        """Wait for it; each row's token."""
        return self.crew.collect(self.number)


class Crew:
    """A :class:`~adkit.runtime.device.Device` of ``members`` in processes of their own, all ranks of a world.

    ``timeout`` (seconds): a step that takes longer is taken for stuck.
    """

    pinned = False

    def __init__(self, members: Seq[Member], timeout: float) -> None:
        self.members = list(members)
        self.timeout = timeout
        self.error: RankError | None = None
        self.ready: dict[int, Ready] = {}
        self._gone: set[int] = set()
        self._failures: list[Failed] = []
        self._results: dict[int, Drawn] = {}
        self._number = 0
        self._progress: ShowProgress = lambda done, total, what: None
        self._finalizer = weakref.finalize(self, _end, self.members, 0.0)

    @property
    def size(self) -> int:
        """How many ranks."""
        return len(self.members)

    # --- building

    def wait_until_ready(self, progress: ShowProgress) -> CompiledModel:
        """Wait until every rank is built; returns their model as the engine sees it, which cannot be run by itself.

        Raises what a rank raised, if it is one of adkit's own errors, else RankError.
        """
        self._progress = progress
        try:
            self._listen(lambda: len(self.ready) == self.size, None)
        except BaseException:
            self.close(0.0)
            raise
        first = self.ready[0]
        for rank, other in self.ready.items():
            for what in ("num_pages", "page_size", "vocab_size", "layouts"):
                if getattr(other, what) != getattr(first, what):
                    self.close(0.0)
                    raise ShardingError(
                        f"the ranks were built differently: {what} is {getattr(first, what)} on rank 0 and "
                        f"{getattr(other, what)} on rank {rank}"
                    )
        return outline(first)

    # --- running

    def start(
        self, host: HostBatch, replay: bool, sampling: Seq[Drawing], before: CrewStep | None
    ) -> CrewStep:
        """Send a step to every rank."""
        self._check()
        self._number += 1
        step = step_of(self._number, host, replay, sampling)
        self._tell(step)
        return CrewStep(self, step.number, step.rows)

    def collect(self, number: int) -> Drawn:
        """The tokens of a step, from rank 0."""
        self._check()
        with uninterrupted():
            self._send(self.members[0], Collect(number))
        self._listen(lambda: number in self._results, self.timeout)
        drawn = self._results[number]
        self._results = {n: d for n, d in self._results.items() if n > number}
        return drawn

    def wipe(self, pages: Seq[int]) -> None:
        """Zero pages on every rank; nothing where there are none any more."""
        if self.error is None:
            self._tell(Wipe(tuple(pages)))

    def _tell(self, message: Any) -> None:
        with uninterrupted():  # all ranks or none
            for member in self.members:
                self._send(member, message)

    def _send(self, member: Member, message: Any) -> None:
        try:
            member.link.send(message, with_draws=member.rank == 0)
        except EOFError:
            self._gone.add(member.rank)
            self._lost()
        except TimeoutError:
            self._stuck(f"rank {member.rank} has not read what it was sent")

    def _check(self) -> None:
        if self.error is not None:
            raise RankError(f"the ranks have ended: {self.error}", self.error.rank)

    # --- listening

    def _listen(self, until: Callable[[], bool], timeout: float | None) -> None:
        """Take what ranks say until a condition holds."""
        begin = time.monotonic()
        while not until():
            self._hear(_LOOK_SECONDS)
            if self._failures or self._gone:
                self._lost()
            if timeout is not None and time.monotonic() - begin > timeout:
                self._stuck(f"a step has not ended within {timeout:g} s")

    def _hear(self, seconds: float) -> None:
        """Wait for messages at most so long, and take those that are there."""
        members = {m.link.fileno(): m for m in self.members if m.rank not in self._gone}
        for ready in wait(list(members), seconds):
            member = members[cast(int, ready)]
            try:
                message = member.link.receive()
            except EOFError:
                self._gone.add(member.rank)
                continue
            match message:
                case Result():
                    self._results[message.number] = message.drawn
                case Progress():
                    self._progress(message.done, message.total, message.what)
                case Ready():
                    self.ready[message.rank] = message
                case Failed():
                    self._failures.append(message)

    # --- failing

    def _lost(self) -> NoReturn:
        """Somebody failed: find out who was the first, end all, and say so."""
        begin = time.monotonic()
        while time.monotonic() - begin < _BLAME_SECONDS and self._blamed() is None:
            self._hear(0.1)
        failed = self._blamed()
        if failed is None:
            failed = self._failures[0]
        if isinstance(failed, Failed):
            self._raise(failed.rank, f"failed: {failed.message}", failed)
        member = self.members[failed]
        self._raise(failed, member.how_it_ended(_BLAME_SECONDS) or "closed its connection", None)

    def _blamed(self) -> Failed | int | None:
        """The report of a rank that failed by itself, or a rank that ended without a word."""
        for failed in self._failures:
            if not failed.secondary:
                return failed
        silent = self._gone - {f.rank for f in self._failures}
        return min(silent, default=None)

    def _stuck(self, what: str) -> NoReturn:
        """Nobody failed, and nothing goes on."""
        places = [(m.rank, m.where()) for m in self.members if m.rank not in self._gone]
        stopped = [rank for rank, place in places if "stopped" in place]
        text = "\n".join(_prefixed(rank, place) for rank, place in places if place)
        self._raise(stopped[0] if stopped else -1, f"{what}.\n\nWhere the ranks stand:\n{text}", None)

    def _raise(self, rank: int, what: str, failed: Failed | None) -> NoReturn:
        who = f"rank {rank} of {self.size} " if rank >= 0 and not what.startswith("rank") else ""
        text = f"{who}{what}\n\nAll ranks have been ended; start them anew, as with wb.llm(tp={self.size})."
        if failed is not None:
            text += f"\n\nTraceback of rank {rank}:\n{failed.traceback.rstrip()}"
        log = self.members[rank].log() if rank >= 0 else ""
        if log:
            text += f"\n\nThe end of its log:\n{_prefixed(rank, log)}"
        self.error = RankError(text, rank)
        self.close(0.0)
        own = getattr(known_errors, failed.kind, None) if failed is not None and failed.kind else None
        if failed is not None and own is not None and len(self.ready) < self.size:
            raise own(failed.message) from self.error  # a clear message of its own: no need for the story
        raise self.error

    # --- ending

    def close(self, seconds: float = _END_SECONDS) -> None:
        """End every rank: asked to, and killed if they have not after so many seconds."""
        if self.error is None:
            self.error = RankError(f"close() was called; wb.llm(tp={self.size}) starts anew")
        if self._finalizer.detach():
            _end(self.members, seconds)

    def __repr__(self) -> str:
        return f"Crew({self.size} ranks{', ended' if self.error else ''})"


def _end(members: Seq[Member], seconds: float) -> None:
    if seconds:
        for member in members:
            try:
                member.link.send(End())
            except (EOFError, OSError):
                continue
    limit = time.monotonic() + seconds
    for member in members:
        if not seconds or not member.how_it_ended(max(0.0, limit - time.monotonic())):
            member.kill()
        member.link.close()


def _prefixed(rank: int, text: str) -> str:
    return "\n".join(f"[rank {rank}] {line}" for line in text.splitlines())


class _Replays:
    """The layouts that ranks can replay; a :class:`~adkit.contract.Replay` that is asked for nothing else."""

    def __init__(self, layouts: tuple[BatchLayout, ...], num_previous: int) -> None:
        self.num_previous = num_previous
        self.layouts = list(layouts)

    def layout(self, tokens: int, sequences: int) -> BatchLayout | None:
        """The smallest that holds such a step."""
        return fitting_layout(self.layouts, tokens, sequences)

    def __call__(self, host: HostBatch, previous: torch.Tensor | None) -> NoReturn:
        """Ranks do that."""
        raise TypeError("this model runs on ranks in other processes")


def outline(ready: Ready) -> CompiledModel:
    """A rank's model as the engine must know it: sizes, no weights, no cache, nothing to run."""

    def elsewhere(**inputs: Any) -> NoReturn:
        raise TypeError("this model runs on ranks in other processes")

    return CompiledModel(
        forward=elsewhere,
        inputs=ready.inputs,
        caches=CachePool((), ready.page_size, ready.num_pages),
        vocab_size=ready.vocab_size,
        device=torch.device(ready.device),
        eos_token_ids=ready.eos_token_ids,
        max_positions=ready.max_positions,
        replay=_Replays(ready.layouts, ready.num_previous) if ready.layouts else None,
        details=ready.facts,
    )
