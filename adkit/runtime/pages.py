"""Who owns which cache page: allocation, sharing of equal prefixes, eviction.

A page is in exactly one of three places: free (holds nothing), held (by one or more sequences, counted), or
idle (held by nobody, but its content is known by digest and may be reused until somebody needs the page).
Page 0 is in none of them: padding writes there.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from enum import IntEnum
from hashlib import blake2b

import numpy as np

Digest = bytes


class PageState(IntEnum):
    """Where a page is, as ``PageAllocator.states`` tells it."""

    PADDING = 0  #: page 0, never handed out
    FREE = 1
    IDLE = 2  #: held by nobody, its content still findable
    HELD = 3
    SHARED = 4  #: held by several sequences that begin alike


def page_digest(parent: Digest, content: bytes) -> Digest:
    """Name of a full page: a hash of all before it (``parent``, its predecessor's digest) and in it."""
    return blake2b(content, digest_size=16, key=parent).digest()


class PageAllocator:
    """Hands out pages 1 to P - 1, counts who holds them, and finds full pages again by digest."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = deque(range(1, num_pages))
        self._holders = [0] * num_pages
        self._digest: dict[int, Digest] = {}
        self._page_of: dict[Digest, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def capacity(self) -> int:
        """Pages that sequences can hold altogether."""
        return self.num_pages - 1

    @property
    def available(self) -> int:
        """Pages that can be handed out now, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that some sequence holds."""
        return self.capacity - self.available

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-tokens // self.page_size)

    def holders(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._holders[page]

    def states(self) -> np.ndarray:
        """The ``PageState`` of every page, uint8 [P].

        Only looks, at whole copies, so another thread may ask while the engine runs: what it gets may then be
        a step behind, page by page, which a picture can bear.
        """
        holders = np.array(self._holders.copy())
        states = np.minimum(holders + PageState.IDLE, PageState.SHARED).astype(np.uint8)
        states[holders == 0] = PageState.FREE
        named = np.array(list(self._digest), dtype=np.int64)
        states[named[holders[named] == 0]] = PageState.IDLE
        states[0] = PageState.PADDING
        return states

    def find(self, digests: Iterable[Digest]) -> list[int]:
        """Pages of the longest run of digests, from the first, whose content is still in the cache."""
        found = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def cost(self, found: Iterable[int], total: int) -> int:
        """How much ``available`` drops when a sequence takes ``total`` pages, ``found`` among them."""
        return total - sum(self._holders[p] > 0 for p in found)

    def hold(self, found: Iterable[int]) -> None:
        """Count one more holder of pages that ``find`` returned."""
        for page in found:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def allocate(self, count: int) -> list[int]:
        """``count`` pages for one holder: free ones first, then the idle ones longest unused."""
        assert count <= self.available, f"{count} pages asked for, {self.available} available"
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            pages.append(page)
        return pages

    def publish(self, page: int, digest: Digest) -> None:
        """Make a full page findable, unless another page is known for this content."""
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._digest[page] = digest

    def release(self, pages: Iterable[int], *, keep: bool = True) -> None:
        """One holder gives its pages back; without ``keep`` their content is forgotten.

        The last pages of a sequence become idle first, so that eviction eats prefixes from their end.
        """
        for page in reversed(list(pages)):
            if not keep:
                self._forget(page)
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} released more often than held"
            if self._holders[page] == 0:
                if page in self._digest:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _forget(self, page: int) -> None:
        digest = self._digest.pop(page, None)
        if digest is not None:
            del self._page_of[digest]

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Assert that the books agree with the pages each sequence says it holds."""
        count = [0] * self.num_pages
        for pages in owners:
            for page in pages:
                count[page] += 1
        assert count == self._holders, "holders differ from what sequences hold"
        held = {p for p, n in enumerate(count) if n}
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        places = sorted([*free, *idle, *held])
        assert places == list(range(1, self.num_pages)), "a page is lost, in two places, or is page 0"
        assert idle <= set(self._digest), "an idle page has no name to be found by"
        assert not free & set(self._digest), "a free page can still be found"
        assert {d: p for p, d in self._digest.items()} == self._page_of
