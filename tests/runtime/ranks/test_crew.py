"""Who is blamed when ranks end, however the news of it is ordered."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from adkit.contract import RankError
from adkit.runtime.ranks.crew import Crew
from adkit.runtime.ranks.link import Link
from adkit.runtime.ranks.messages import End, Failed


class Ended:
    """A rank that has ended; ``said`` was the last that it told."""

    def __init__(self, rank: int, how: str, said: Failed | None = None) -> None:
        here, there = socket.socketpair()
        self.rank, self.link, self._how = rank, Link(here), how
        other = Link(there)
        if said is not None:
            other.send(said)
        other.close()

    def how_it_ended(self, seconds: float) -> str:
        return self._how

    def log(self) -> str:
        return ""

    def where(self) -> str:
        return ""

    def kill(self) -> None:
        pass


def bereft(rank: int) -> Failed:
    return Failed(rank, "", "PeersLost: connection closed by peer", "Traceback ...", secondary=True)


TOLD: list[Callable[[Crew], object]] = [
    lambda crew: crew.tell(End()),  # the first that is told something is the one that only lost its peer
    lambda crew: crew._listen(lambda: False, 60),
]


@pytest.mark.parametrize("tell", TOLD, ids=["telling", "listening"])
@pytest.mark.parametrize("killed", [0, 1])
def test_the_rank_that_was_killed_is_blamed_and_not_the_one_that_lost_it(
    tell: Callable[[Crew], object], killed: int
) -> None:
    members = [Ended(r, "was killed") if r == killed else Ended(r, "ended", bereft(r)) for r in range(2)]
    with pytest.raises(RankError, match=f"rank {killed} of 2 was killed") as caught:
        tell(Crew(members, 2, 60))
    assert caught.value.rank == killed


@pytest.mark.parametrize("tell", TOLD, ids=["telling", "listening"])
def test_a_rank_that_failed_by_itself_is_blamed_before_those_that_ended_silently(
    tell: Callable[[Crew], object],
) -> None:
    own = Failed(1, "", "ValueError: bad luck", "Traceback ...", secondary=False)
    with pytest.raises(RankError, match="rank 1 of 2 failed: ValueError: bad luck"):
        tell(Crew([Ended(0, "ended", bereft(0)), Ended(1, "ended", own)], 2, 60))
