"""Continuous batching: which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator

from adkit.contract import EngineConfig
from adkit.runtime.pages import PageAllocator
from adkit.runtime.sequence import Sequence


class Scheduler:
    """First come, first served, under a token budget a step; when pages run out, the youngest makes room.

    ``running`` is ordered by arrival and holds pages; ``waiting`` holds none. A sequence put back to
    ``waiting`` keeps its tokens and computes their keys and values again (less what the prefix cache still
    has). The oldest request always advances, and every request admitted fits the cache when alone, so all of
    them end. ``lengths_matter``: the model's cached keys depend on the prompt's length (see
    ``Sequence.full_page_digests``).
    """

    def __init__(self, config: EngineConfig, pages: PageAllocator, *, lengths_matter: bool = False) -> None:
        self.config = config
        self.pages = pages
        self.lengths_matter = lengths_matter
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self.num_preempted = 0
        self.num_reused_tokens = 0

    def __iter__(self) -> Iterator[Sequence]:
        """Every unfinished sequence, oldest first."""
        yield from self.running
        yield from self.waiting

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a new request."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, each with ``num_scheduled`` set and pages for those tokens.

        Empty only when there is no work.
        """
        budget = self.config.max_num_tokens
        batch: list[Sequence] = []
        preempted = False

        # Those already running, oldest first: a decode token each, or the next chunk of a long prompt.
        while len(batch) < len(self.running) and budget > 0:
            seq = self.running[len(batch)]
            seq.num_scheduled = min(seq.num_uncomputed, budget)
            missing = self.pages.pages_for(seq.num_cached + seq.num_scheduled) - len(seq.pages)
            while missing > self.pages.available:
                preempted = True
                self._preempt(self.running[-1])
                if len(batch) == len(self.running):  # it was seq itself
                    break
            else:
                seq.pages.extend(self.pages.allocate(max(missing, 0)))
                batch.append(seq)
                budget -= seq.num_scheduled

        # Then newcomers in order of arrival, unless room was just made for someone older.
        while (
            self.waiting and not preempted and budget > 0 and len(self.running) < self.config.max_batch_size
        ):
            seq = self.waiting[0]
            if not self._admit(seq):
                break
            self.running.append(self.waiting.popleft())
            seq.num_scheduled = min(seq.num_uncomputed, budget)
            batch.append(seq)
            budget -= seq.num_scheduled

        assert batch or not len(self), "there is work, but nothing could be scheduled"
        return batch

    def advance(self, seq: Sequence) -> None:
        """Count the tokens a step computed as cached, and let others find the pages they filled."""
        page_size = self.pages.page_size
        full_before = seq.num_cached // page_size
        seq.num_cached += seq.num_scheduled
        seq.num_scheduled = 0
        if seq.num_cached // page_size > full_before:
            digests = list(seq.full_page_digests(page_size, seq.num_cached, self.lengths_matter))
            for n in range(full_before, len(digests)):
                self.pages.publish(seq.pages[n], digests[n])

    def remove(self, seq: Sequence, *, keep_pages: bool = True) -> None:
        """A sequence has ended: forget it and give its pages back."""
        (self.running if seq in self.running else self.waiting).remove(seq)
        self._release(seq, keep=keep_pages)

    def _admit(self, seq: Sequence) -> bool:
        """Take pages for all tokens of a waiting sequence, reusing those that are in the cache already.

        One page a running sequence is left over, since each will soon want one more.
        """
        # The last token must be computed even if its page is known: its logits are wanted.
        known = seq.full_page_digests(self.pages.page_size, len(seq.tokens) - 1, self.lengths_matter)
        found = self.pages.find(known)
        total = self.pages.pages_for(len(seq.tokens))
        if self.pages.cost(found, total) + len(self.running) > self.pages.available:
            return False
        self.pages.hold(found)
        seq.pages = array("i", found + self.pages.allocate(total - len(found)))
        seq.num_cached = len(found) * self.pages.page_size
        self.num_reused_tokens += seq.num_cached
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Put the youngest running sequence back to the front of the queue."""
        assert seq is self.running[-1]
        self.waiting.appendleft(self.running.pop())
        self._release(seq)
        self.num_preempted += 1

    def _release(self, seq: Sequence, *, keep: bool = True) -> None:
        self.pages.release(seq.pages, keep=keep)
        seq.pages = array("i")
        seq.num_cached = seq.num_scheduled = 0
