"""The engine's side of the ranks in other processes: tell them what to do, listen, find out who failed.

A rank that fails ends the world: ranks that wait for it in a collective cannot be called back, so all are ended, and
whoever waits gets a :class:`~adkit.contract.RankError` that names the rank at fault. That is not always the first to
complain: ranks that lost a peer say so (``Failed.secondary``), and are blamed only if nobody else is.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq
from multiprocessing.connection import wait
from typing import Any, NoReturn, cast

from adkit.contract import HostBatch, RankError, ShardingError, SplitBatch
from adkit.contract import errors as known_errors
from adkit.runtime.device import Drawn
from adkit.runtime.ranks.link import uninterrupted
from adkit.runtime.ranks.messages import Collect, End, Failed, Progress, Ready, Result, Step, step_of
from adkit.runtime.ranks.processes import Member
from adkit.runtime.sampler import Drawing

_STATUS_SECONDS = 5.0  # for processes that closed their connections to be gone: their threads must end first
_BLAME_SECONDS = 2.0  # how long others may speak up once one has failed
_END_SECONDS = 3.0  # that ranks get to end by themselves
_LOOK_SECONDS = 1.0

_NAP_SECONDS = 0.01

ShowProgress = Callable[[int, int, str], None]


def _unseen(done: int, total: int, what: str) -> None:
    """Progress that nobody is shown."""


class Crew:
    """The ranks of a world of ``size`` that are in processes of their own.

    ``timeout`` (seconds): a step that takes longer is taken for stuck. ``after`` is called once all have ended.
    """

    def __init__(
        self, members: Seq[Member], size: int, timeout: float, after: Callable[[], object] = lambda: None
    ) -> None:
        self.members = {m.rank: m for m in members}
        self.size = size
        self.timeout = timeout
        self.error: RankError | None = None
        self.ready: dict[int, Ready] = {}
        self.store: Any = None  #: where the ranks have met, kept while they live
        self._progress: ShowProgress = _unseen
        self._gone: set[int] = set()
        self._failures: list[Failed] = []
        self._results: dict[int, Drawn] = {}
        self._number = 0
        self._watched = False
        self._finalizer = weakref.finalize(self, _end, list(members), 0.0, after)

    def watch(self, lost: Callable[[Exception], object]) -> None:
        """Listen in a thread of its own from now on; ``lost`` is called there with the error when a rank fails."""

        def listen() -> None:
            try:
                self._listen(lambda: self.error is not None, None)
            except Exception as error:
                lost(error)

        threading.Thread(target=listen, name="adkit-ranks", daemon=True).start()
        self._watched = True

    def wait_until_ready(self, progress: ShowProgress = _unseen, here: Ready | None = None) -> Ready:
        """Wait until every rank is built; returns what they have in common. ``here``: the one of this process.

        Raises what a rank raised, if it is one of adkit's own errors, else RankError; ShardingError where they were
        built differently.
        """
        self._progress = progress
        if here is not None:
            self.ready[here.rank] = here
        try:
            while self._watched and len(self.ready) < self.size:
                time.sleep(_NAP_SECONDS)
            self._listen(lambda: len(self.ready) == self.size, None)
        except BaseException:
            self.close(0.0)
            raise
        first = self.ready[0]
        for rank, other in self.ready.items():
            for what in ("num_pages", "page_size", "vocab_size", "layouts", "pools"):
                if getattr(other, what) != getattr(first, what):
                    self.close(0.0)
                    raise ShardingError(
                        f"the ranks were built differently: {what} is {getattr(first, what)} on rank 0 and "
                        f"{getattr(other, what)} on rank {rank}"
                    )
        return first

    # --- telling

    def start(self, host: HostBatch | SplitBatch, replay: bool, sampling: Seq[Drawing]) -> Step:
        """Send a step to every rank; returns it."""
        self.check()
        self._number += 1
        step = step_of(self._number, host, replay, sampling)
        self.tell(step)
        return step

    def collect(self, number: int) -> Drawn:
        """The tokens of a step, from rank 0."""
        self.check()
        with uninterrupted():
            self._send(self.members[0], Collect(number))
        self._listen(lambda: number in self._results, self.timeout)
        drawn = self._results[number]
        self._results = {n: d for n, d in self._results.items() if n > number}
        return drawn

    def tell(self, message: Any) -> None:
        """Send a message to every rank."""
        with uninterrupted():  # all ranks or none
            step = isinstance(message, Step)
            for member in self.members.values():
                self._send(member, message.of(member.rank) if step else message)

    def _send(self, member: Member, message: Any) -> None:
        try:
            member.link.send(message, with_draws=member.rank == 0)
        except EOFError:  # gone, but what it said before that is still to be heard
            self._lost()
        except TimeoutError:
            self._stuck(f"rank {member.rank} has not read what it was sent")

    def check(self) -> None:
        """Raises RankError when the ranks have ended."""
        if self.error is not None:
            raise RankError(f"the ranks have ended: {self.error}", self.error.rank)

    # --- listening

    def _listen(self, until: Callable[[], bool], timeout: float | None) -> None:
        """Take what ranks say until a condition holds."""
        begin = time.monotonic()
        while not until():
            self._hear(_LOOK_SECONDS)
            if (self._failures or self._gone) and not until():
                self._lost()
            if timeout is not None and time.monotonic() - begin > timeout:
                self._stuck(f"a step has not ended within {timeout:g} s")

    def _hear(self, seconds: float) -> None:
        """Wait for messages at most so long, and take those that are there."""
        members = {m.link.fileno(): m for m in self.members.values() if m.rank not in self._gone}
        for ready in wait(list(members), seconds):
            member = members[cast(int, ready)]
            try:
                message = member.link.receive()
            except (EOFError, OSError):
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
            failed = self._failures[0] if self._failures else min(self._gone, default=None)
        if failed is None:
            self._raise(-1, "a rank can no longer be sent anything, and none has said why", None)
        if isinstance(failed, Failed):
            self._raise(failed.rank, f"failed: {failed.message}", failed)
        silent = sorted(self._gone - {f.rank for f in self._failures})
        limit = time.monotonic() + _STATUS_SECONDS
        ends = {
            r: self.members[r].how_it_ended(max(0.0, limit - time.monotonic())) or "closed its connection"
            for r in silent
        }
        # A library that lost its peer may abort its own process: that is a consequence, not the cause.
        rank = min(ends, key=lambda r: ("SIGABRT" in ends[r], r))
        others = "".join(f"; rank {r} {ends[r]}, too" for r in ends if r != rank)
        self._raise(rank, ends[rank] + others, None)

    def _blamed(self) -> Failed | int | None:
        """The report of a rank that failed by itself, or a rank that ended without a word."""
        for failed in self._failures:
            if not failed.secondary:
                return failed
        silent = self._gone - {f.rank for f in self._failures}
        return min(silent, default=None)

    def _stuck(self, what: str) -> NoReturn:
        """Nobody failed, and nothing goes on."""
        places = [(m.rank, m.where()) for m in self.members.values() if m.rank not in self._gone]
        stopped = [rank for rank, place in places if "stopped" in place]
        text = "\n".join(_prefixed(rank, place) for rank, place in places if place)
        self._raise(stopped[0] if stopped else -1, f"{what}.\n\nWhere the ranks stand:\n{text}", None)

    def _raise(self, rank: int, what: str, failed: Failed | None) -> NoReturn:
        who = f"rank {rank} of {self.size} " if rank >= 0 and not what.startswith("rank") else ""
        text = f"{who}{what}\n\nAll ranks have been ended; start them anew, as with wb.llm(tp={self.size})."
        if failed is not None:
            text += f"\n\nTraceback of rank {rank}:\n{failed.traceback.rstrip()}"
        log = self.members[rank].log() if rank in self.members else ""
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
        if found := self._finalizer.detach():
            _, _, (members, _, after), _ = found
            _end(members, seconds, after)

    def __repr__(self) -> str:
        return f"Crew({self.size} ranks{', ended' if self.error else ''})"


def _end(members: Seq[Member], seconds: float, after: Callable[[], object]) -> None:
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
    after()


def _prefixed(rank: int, text: str) -> str:
    return "\n".join(f"[rank {rank}] {line}" for line in text.splitlines())
