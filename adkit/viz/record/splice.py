"""Lists told from each other: edits from one to the next, what moved, runs of positions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise

from adkit.graph.snapshot import Snapshot
from adkit.viz.record import format as f


def splices(old: list[int], new: list[int]) -> list[f.Splice]:
    """Edits that turn ``old`` into ``new``, from front to back; each list without repeats."""
    place = {r: p for p, r in enumerate(old)}
    shared = [k for k, r in enumerate(new) if r in place]
    at = [place[new[k]] for k in shared]
    found: list[f.Splice] = []
    i = j = 0
    for s in [*rising(at), None]:
        k, upto = (shared[s], at[s]) if s is not None else (len(new), len(old))
        if upto > i or k > j:
            found.append(f.Splice.model_construct(at=j, drop=upto - i, rows=new[j:k]))
        i, j = upto + 1, k + 1
    return found


def apply_splices(old: list[int], edits: Iterable[f.Splice]) -> list[int]:
    """``old`` edited."""
    rows = list(old)
    for e in edits:
        rows[e.at : e.at + e.drop] = e.rows
    return rows


def moved(before: Snapshot, after: Snapshot) -> list[int]:
    """Ids in both graphs that stand in another order: the fewest whose moving explains it."""
    place = {n.id: p for p, n in enumerate(before)}
    kept = [n.id for n in after if n.id in place]
    still = set(rising([place[i] for i in kept]))
    return [i for k, i in enumerate(kept) if k not in still]


def rising(numbers: Sequence[int]) -> list[int]:
    """Places of a longest rising subsequence of distinct ``numbers`` (patience sorting)."""
    if all(a < b for a, b in pairwise(numbers)):
        return list(range(len(numbers)))  # what a pass keeps it seldom moves
    tails: list[int] = []
    at: list[int] = []
    before: list[int] = []
    for k, n in enumerate(numbers):
        p = bisect_left(tails, n)
        before.append(at[p - 1] if p else -1)
        if p == len(tails):
            tails.append(n)
            at.append(k)
        else:
            tails[p], at[p] = n, k
    found: list[int] = []
    k = at[-1]
    while k >= 0:
        found.append(k)
        k = before[k]
    return found[::-1]


def runs(places: list[int]) -> list[int]:
    """Positions as runs, in order: start, length, start, length."""
    found: list[int] = []
    for p in places:
        if found and found[-2] + found[-1] == p:
            found[-1] += 1
        else:
            found += [p, 1]
    return found


def ragged(lists: Iterable[Iterable[int]]) -> f.Ragged:
    """Lists as one :class:`~adkit.viz.record.format.Ragged`."""
    made = f.Ragged(starts=[0], items=[])
    for one in lists:
        made.items.extend(one)
        made.starts.append(len(made.items))
    return made


__all__ = ["apply_splices", "moved", "ragged", "rising", "runs", "splices"]
