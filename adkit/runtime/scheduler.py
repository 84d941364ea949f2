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

    ``running`` (by id) is ordered by arrival and holds pages; ``waiting`` holds none. A sequence put back to
    ``waiting`` keeps its tokens and computes their keys and values again (less what the prefix cache still
    has). The oldest request always advances, and every request admitted fits the cache when alone, so all of
    them end. Steps may be scheduled while one is in flight: its tokens count, though only the device knows them.
    ``lengths_matter``: the model's cached keys depend on the prompt's length (see
    ``Sequence.full_page_digests``).
    """

    def __init__(self, config: EngineConfig, pages: PageAllocator, *, lengths_matter: bool = False) -> None:
        self.config = config
        self.pages = pages
        self.lengths_matter = lengths_matter
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self.num_preempted = 0
        self.num_reused_tokens = 0

    def __iter__(self) -> Iterator[Sequence]:
        """Every unfinished sequence, oldest first."""
        yield from self.running.values()
        yield from self.waiting

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a new request."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence] | None:
        """The sequences of the next step, each with ``num_scheduled`` set and pages for those tokens.

        Empty only when there is no work but what is in flight. None when a sequence in flight would have to make
        room: its token must be known first. Asking again is safe at any time.
        """
        budget = self.config.max_num_tokens
        batch: list[Sequence] = []
        preempted = False

        # Those already running, oldest first: a decode token each, or the next chunk of a long prompt.
        page_size = self.pages.page_size
        for seq in list(self.running.values()):
            if budget <= 0 or (preempted and seq.id not in self.running):
                break
            length = len(seq.tokens) + seq.num_pending
            if length >= seq.max_len:  # a token in flight is its last
                continue
            seq.num_scheduled = min(length - seq.num_cached, budget)
            missing = -(-(seq.num_cached + seq.num_scheduled) // page_size) - len(seq.pages)
            if missing > 0:
                while missing > self.pages.available and seq.id in self.running:
                    youngest = next(reversed(self.running.values()))
                    if youngest.num_pending:
                        return None
                    preempted = True
                    self._preempt(youngest)
                if seq.id not in self.running:  # it was the youngest itself
                    break
                seq.pages.extend(self.pages.allocate(missing))
            batch.append(seq)
            budget -= seq.num_scheduled

        # Then newcomers in order of arrival, unless room was just made for someone older.
        while (
            self.waiting and not preempted and budget > 0 and len(self.running) < self.config.max_batch_size
        ):
            seq = self.waiting[0]
            if not self._admit(seq):
                break
            self.running[seq.id] = self.waiting.popleft()
            seq.num_scheduled = min(seq.num_uncomputed, budget)
            batch.append(seq)
            budget -= seq.num_scheduled

        assert batch or not len(self) or any(s.num_pending for s in self), (
            "there is work, but nothing could be scheduled"
        )
        return batch

    def publish(self, seq: Sequence, computed: int) -> None:
        """Let others find the pages that a sequence's first ``computed`` tokens, all known now, have filled."""
        computed = min(computed, seq.num_cached)  # none if it had to make room in the meantime
        if computed < (seq.num_published + 1) * self.pages.page_size:
            return
        digests = list(seq.full_page_digests(self.pages.page_size, computed, self.lengths_matter))
        for n in range(seq.num_published, len(digests)):
            self.pages.publish(seq.pages[n], digests[n])
        seq.num_published = len(digests)

    def remove(self, seq: Sequence, *, keep_pages: bool = True) -> None:
        """A sequence has ended: forget it and give its pages back."""
        if self.running.pop(seq.id, None) is None:
            self.waiting.remove(seq)
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
        seq.num_published = len(found)
        self.num_reused_tokens += seq.num_cached
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Put the youngest running sequence back to the front of the queue."""
        self.waiting.appendleft(self.running.pop(seq.id))
        self._release(seq)
        self.num_preempted += 1

    def _release(self, seq: Sequence, *, keep: bool = True) -> None:
        self.pages.release(seq.pages, keep=keep)
        seq.pages = array("i")
        seq.num_cached = seq.num_scheduled = seq.num_published = 0
