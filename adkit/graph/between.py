"""The difference between any two points of a pipeline, told by the rewrites of the steps between them.

A graph thirty passes later has nothing in common with its beginning but the nodes that nobody touched; compared by
connection alone, all the rest would be one change. The steps know better: what one site made and a later one took
is one rewrite, from the first nodes to the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from adkit.graph.diff import Diff, diff
from adkit.graph.edit import SiteRecord
from adkit.graph.step import Step


@dataclass(slots=True)
class _Chain:
    """Sites of several steps that are one rewrite: every id they took or made, and what the last was called."""

    label: str = ""
    taken: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)


def between(steps: Sequence[Step], a: int, b: int) -> Diff:
    """What changed from the graph after step ``a`` to the one after step ``b``; backwards where ``b`` is earlier."""
    first, last = sorted((a, b))
    chains = _chains(s for s in steps[first + 1 : last + 1] if s.changed)
    if a <= b:
        sites = [SiteRecord(c.label, tuple(c.taken), created=tuple(c.made)) for c in chains]
    else:
        sites = [SiteRecord(c.label, (*c.made, *c.taken), created=tuple(c.taken)) for c in chains]
    return diff(steps[a].after, steps[b].after, sites)


def _chains(steps: Iterable[Step]) -> list[_Chain]:
    """The sites of ``steps``, those joined where a later one takes what an earlier one made."""
    home: dict[int, _Chain] = {}  # of every id made so far
    found: dict[int, _Chain] = {}
    for s in steps:
        for site in s.diff.sites:
            chain = _Chain()
            for i in (*site.erased, *site.changed):
                older = home.get(i)
                if older is None or older is chain:
                    continue
                chain.label = chain.label or older.label
                chain.taken += older.taken
                chain.made += older.made
                home.update(dict.fromkeys(older.made, chain))
                del found[id(older)]
            chain.label = site.label or chain.label
            chain.taken += (*site.erased, *site.changed)
            chain.made += site.created
            home.update(dict.fromkeys(site.created, chain))
            found[id(chain)] = chain
    return list(found.values())


__all__ = ["between"]
