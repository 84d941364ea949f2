"""Scheduling over several pools of pages: ranks that have sequences, and a cache, of their own.

Each pool has a :class:`~adkit.runtime.scheduler.Scheduler` that knows of no other; here is decided who goes where.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from adkit.contract import EngineConfig
from adkit.runtime.pages import PageAllocator
from adkit.runtime.scheduler import Scheduler
from adkit.runtime.sequence import Sequence


class PooledScheduler:
    """A scheduler over ``pools``, to be used as :class:`~adkit.runtime.scheduler.Scheduler` is.

    Requests wait in one queue. In order of arrival each goes to the pool that would have most pages left, and stays
    there until it ends or has to make room: then it queues up again, before all younger ones, for any pool. Sizes of
    ``config`` are those of all pools together, and each has its share (:meth:`EngineConfig.share`).
    """

    def __init__(
        self, config: EngineConfig, pools: Seq[PageAllocator], *, lengths_matter: bool = False
    ) -> None:
        self.config = config
        share = config.share(len(pools))
        self.pools = [Scheduler(share, pages, lengths_matter=lengths_matter) for pages in pools]
        self.waiting: deque[Sequence] = deque()

    def __iter__(self) -> Iterator[Sequence]:
        """Every unfinished sequence, those that hold pages first."""
        for pool in self.pools:
            yield from pool
        yield from self.waiting

    def __len__(self) -> int:
        return sum(map(len, self.pools)) + len(self.waiting)

    @property
    def running(self) -> dict[int, Sequence]:
        """Sequences that hold pages, by id."""
        return {i: s for pool in self.pools for i, s in pool.running.items()}

    @property
    def num_preempted(self) -> int:
        """How often a sequence had to make room."""
        return sum(pool.num_preempted for pool in self.pools)

    @property
    def num_reused_tokens(self) -> int:
        """Tokens whose keys and values were in a cache already."""
        return sum(pool.num_reused_tokens for pool in self.pools)

    def add(self, seq: Sequence) -> None:
        """Queue a new request."""
        self.waiting.append(seq)

    def schedule(self) -> list[Sequence] | None:
        """The sequences of the next step, pool after pool; otherwise as a :class:`Scheduler` gives it.

        None where one pool must know a token in flight first: asking again is safe, and the others answer the same.
        """
        self._deal()
        batches = [pool.schedule() for pool in self.pools]
        self._take_back()
        if any(batch is None for batch in batches):
            return None
        return [seq for batch in batches for seq in batch or ()]

    def publish(self, seq: Sequence, computed: int) -> None:
        """As :meth:`Scheduler.publish`, within the sequence's pool."""
        self.pools[seq.pool].publish(seq, computed)

    def remove(self, seq: Sequence, *, keep_pages: bool = True) -> None:
        """A sequence has ended: forget it and give its pages back."""
        pool = self.pools[seq.pool]
        if seq.id in pool.running:
            pool.remove(seq, keep_pages=keep_pages)
        else:
            self.waiting.remove(seq)

    def _deal(self) -> None:
        """Send those that wait to pools that can take them, until one finds none."""
        room = self.config.max_batch_size - sum(len(pool.running) for pool in self.pools)
        while self.waiting and room > 0:
            seq = self.waiting[0]
            left = [self._left(pool, seq) for pool in self.pools]
            best = max(range(len(left)), key=left.__getitem__)
            if left[best][0] < 0:
                return
            seq.pool = best
            self.pools[best].add(self.waiting.popleft())
            room -= 1

    def _left(self, pool: Scheduler, seq: Sequence) -> tuple[int, int]:
        """Pages that ``pool`` would have left with ``seq``, less than 0 where it cannot take it; then fewer sequences
        are better."""
        load = len(pool.running) + len(pool.waiting)
        if load >= pool.config.max_batch_size:
            return -1, -load
        pages, size = pool.pages, pool.pages.page_size
        found = pages.find(seq.full_page_digests(size, len(seq.tokens) - 1, pool.lengths_matter))
        dealt = sum(pages.pages_for(len(s.tokens)) for s in pool.waiting)
        total = pages.pages_for(len(seq.tokens))
        # As it decides itself, one page a running sequence aside. Pages found do not count as taken, held or idle.
        if dealt + pages.cost(found, total) + load > pages.available:
            return -1, -load
        return pages.available - dealt - (total - len(found)), -load

    def _take_back(self) -> None:
        """Those that a pool did not take after all, or that made room, wait for any pool again, oldest first."""
        back = [seq for pool in self.pools for seq in pool.waiting]
        if back:
            for pool in self.pools:
                pool.waiting.clear()
            self.waiting = deque(sorted([*back, *self.waiting], key=lambda s: s.id))
