"""The page books balance under any use."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adkit.runtime.pages import PageAllocator, PageState, page_digest


class Books(RuleBasedStateMachine):
    """Random takes, shares, publications and releases, against a list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(9, 4)
        self.owners: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    @rule(count=st.integers(0, 9), share=st.lists(st.binary(min_size=1, max_size=1), max_size=3))
    def take(self, count, share):
        found = self.pages.find(share)
        assert [self.content[p] for p in found] == share[: len(found)], "a page was found by another's name"
        total = len(set(found)) + count
        if len(set(found)) < len(found) or self.pages.cost(found, total) > self.pages.available:
            return
        available = self.pages.available - self.pages.cost(found, total)
        self.pages.hold(found)
        self.owners.append(found + self.pages.allocate(count))
        assert self.pages.available == available

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data(), digest=st.binary(min_size=1, max_size=1))
    def publish(self, data, digest):
        owner = data.draw(st.sampled_from([o for o in self.owners if o]))
        page = data.draw(st.sampled_from(owner))
        if page not in self.pages._digest:
            self.content[page] = digest
            self.pages.publish(page, digest)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data, keep):
        self.pages.release(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))), keep=keep)

    @invariant()
    def balanced(self):
        self.pages.check(self.owners)

    @invariant()
    def pictured(self):
        states = self.pages.states().tolist()
        assert len(states) == self.pages.num_pages
        for page, state in enumerate(states[1:], start=1):
            holders = sum(page in owner for owner in self.owners)
            known = page in self.pages.find([self.content[page]]) if page in self.content else False
            by_hand = {0: PageState.IDLE if known else PageState.FREE, 1: PageState.HELD}
            assert state == by_hand.get(holders, PageState.SHARED), f"page {page}"
        assert states[0] == PageState.PADDING


Books.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestBooks = Books.TestCase


def test_published_pages_outlive_their_holder_until_the_room_is_needed():
    pages = PageAllocator(4, 4)
    first = pages.allocate(2)
    pages.publish(first[0], b"a")
    pages.publish(first[1], b"b")
    pages.release(first)
    assert pages.find([b"a", b"b"]) == first
    assert pages.available == 3
    pages.allocate(1)
    assert pages.find([b"a", b"b"]) == first, "a free page goes before one worth keeping"
    pages.allocate(1)
    assert pages.find([b"a", b"b"]) == first[:1], "a prefix is eaten from its end"


def test_a_page_held_twice_is_freed_once_both_let_go():
    pages = PageAllocator(4, 4)
    first = pages.allocate(1)
    pages.publish(first[0], b"a")
    pages.hold(pages.find([b"a"]))
    pages.release(first)
    assert pages.available == 2
    pages.release(first)
    assert pages.available == 3
    with pytest.raises(AssertionError, match="more often than held"):
        pages.release(first)


def test_digest_names_everything_up_to_the_page():
    a, b = b"a" * 32, b"b" * 32
    assert page_digest(page_digest(b"", a), b) != page_digest(page_digest(b"", b), b)
    assert page_digest(page_digest(b"", a), b) == page_digest(page_digest(b"", a), b)
