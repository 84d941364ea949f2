"""Exact differences between two snapshots, grouped into rewrite classes.

Nodes are compared by id, so a difference is a set operation, never a guess from names. Changes that
belong together form a *site*; sites of the same shape form a *rewrite class* ("65 x [7 nodes] ->
torch_rmsnorm, layers 0-31"). That is what a person reads.
"""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from adkit.graph.edit import SiteRecord
from adkit.graph.provenance import without_layer
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot, _map


@dataclass(frozen=True, slots=True)
class Site:
    """One place a pass changed: ids erased, created, and kept but rewired or retargeted."""

    label: str
    erased: tuple[int, ...]
    created: tuple[int, ...]
    changed: tuple[int, ...]
    module_path: str
    layer: int | None


@dataclass(frozen=True, repr=False)
class RewriteClass:
    """Sites of one shape: the same operations became the same operations.

    ``before`` and ``after`` are the target names in execution order; the sites say where; ``diff`` is the
    difference that it is a part of.
    """

    label: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    changed: tuple[str, ...]
    sites: tuple[Site, ...]
    diff: Diff | None = field(default=None, compare=False)

    @property
    def count(self) -> int:
        """Number of sites."""
        return len(self.sites)

    @property
    def layers(self) -> str:
        """The layers touched, as ranges: ``0-31``, ``0-3, 5``, with ``+ n`` sites outside the layers."""
        inside = sorted({s.layer for s in self.sites if s.layer is not None})
        outside = sum(s.layer is None for s in self.sites)
        text = ranges(inside)
        if outside and text:
            return f"{text} + {outside} outside"
        return text or "outside the layers"

    def __repr__(self) -> str:
        made = ", ".join(_tally(self.after)) or "nothing"
        was = ", ".join(_tally(self.before))
        if not self.before and not self.after and not self.changed:
            sides = ("erased", "created")
            gone, new = (sum(len(getattr(s, side)) for s in self.sites) for side in sides)
            what = " and ".join(([f"{gone} dropped"] if gone else []) + ([f"{new} added"] if new else []))
            return f"{self.count} x parameters: {what} ({self.where})"
        if not self.before and not self.after:
            return f"{self.count} x rewired {', '.join(_tally(self.changed))} ({self.where})"
        was = f"[{len(self.before)} nodes: {was}]" if len(self.before) > 1 else (was or "nothing")
        return f"{self.count} x {was} -> {made} ({self.where})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from adkit.graph.display import mimebundle

        return mimebundle(self)

    @property
    def where(self) -> str:
        """``layers 0-31``, ``layer 4``, or the module paths when the sites lie outside the layers."""
        if any(s.layer is not None for s in self.sites):
            return f"{'layer' if self.layers.isdigit() else 'layers'} {self.layers}"
        return ", ".join(dict.fromkeys(s.module_path or "root" for s in self.sites)) or "root"


def _tally(names: Iterable[str], most: int = 6) -> list[str]:
    counts = Counter(n.split(".", 1)[-1] if n.startswith(("aten.", "adkit.")) else n for n in names)
    parts = [n if c == 1 else f"{c} {n}" for n, c in counts.items()]
    return parts if len(parts) <= most else [*parts[:most], "..."]


def ranges(numbers: list[int]) -> str:
    """Sorted integers as text: ``0-3, 5``."""
    parts: list[str] = []
    start = prev = None
    for n in [*numbers, None]:
        if prev is not None and n == prev + 1:
            prev = n
            continue
        if start is not None:
            parts.append(str(start) if start == prev else f"{start}-{prev}")
        start = prev = n
    return ", ".join(parts)


class Diff:
    """What changed between two snapshots of one graph."""

    def __init__(self, before: Snapshot, after: Snapshot, sites: Iterable[SiteRecord] = ()) -> None:
        self.before = before
        self.after = after
        self._declared = tuple(sites)

    @cached_property
    def created(self) -> tuple[int, ...]:
        """Ids only in ``after``, in order."""
        old = self.before.by_id
        return tuple([n.id for n in self.after if n.id not in old])

    @cached_property
    def erased(self) -> tuple[int, ...]:
        """Ids only in ``before``, in order."""
        new = self.after.by_id
        return tuple([n.id for n in self.before if n.id not in new])

    @cached_property
    def changed(self) -> tuple[int, ...]:
        """Ids in both whose target or arguments differ, beyond reading a replacement of what they read."""
        old = self.before.by_id
        gone, new = set(self.erased), set(self.created)
        found = []
        for n in self.after:
            o = old.get(n.id)
            if o is None or o is n or (o.target == n.target and o.args == n.args and o.kwargs == n.kwargs):
                continue
            if o.target == n.target and _same_but(o, n, gone, new, self.before):
                continue
            found.append(n.id)
        return tuple(found)

    @property
    def empty(self) -> bool:
        """True when nothing changed."""
        return not (self.created or self.erased or self.changed)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The places changed: declared by the pass where it did, else connected components of the change."""
        return _sites(self)

    @cached_property
    def rewrites(self) -> tuple[RewriteClass, ...]:
        """Sites grouped by shape, largest class first."""
        groups: dict[Any, list[Site]] = {}
        for s in self.sites:
            groups.setdefault(self._signature(s), []).append(s)
        classes = []
        for key, found in groups.items():
            label, before, after, changed = key
            classes.append(RewriteClass(label, before, after, changed, tuple(found), self))
        return tuple(sorted(classes, key=lambda c: (-c.count, c.label)))

    def _signature(self, s: Site) -> tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        gone, made = [self.before[i] for i in s.erased], [self.after[i] for i in s.created]
        calls = any(
            n.op == "call_function" for n in (*gone, *made)
        )  # reads of weights go without saying, unless alone
        return (
            s.label,
            tuple(_label(n) for n in gone if n.op != "get_attr" or not calls),
            tuple(_label(n) for n in made if n.op != "get_attr" or not calls),
            tuple(_label(self.after[i]) for i in s.changed),
        )

    def __repr__(self) -> str:
        if self.empty:
            return "Diff(nothing changed)"
        lines = [f"Diff(+{len(self.created)} -{len(self.erased)} ~{len(self.changed)} nodes)"]
        lines += [f"  {r}" for r in self.rewrites]
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from adkit.graph.display import mimebundle

        return mimebundle(self)


def diff(before: Snapshot, after: Snapshot, sites: Iterable[SiteRecord] = ()) -> Diff:
    """The difference of two snapshots of one graph's history; ``sites`` as a pass declared them."""
    return Diff(before, after, sites)


def _label(n: NodeRecord) -> str:
    if n.op == "call_function":
        return n.target_name
    name = re.sub(r"[0-9]+", "*", n.target_name) if n.op == "placeholder" else without_layer(n.target_name)
    return f"{n.op} {name}"


def _same_but(old: NodeRecord, new: NodeRecord, gone: set[int], made: set[int], before: Snapshot) -> bool:
    """True when only references differ: an erased node before, a created one or its own source after."""
    was, now = old.inputs(), new.inputs()
    if len(was) != len(now):
        return False
    for a, b in zip(was, now, strict=True):
        if a != b and not (a in gone and (b in made or _passed_through(a, b, gone, before))):
            return False
    blank = lambda v: _map(v, lambda r: None, Ref)  # noqa: E731
    return bool(blank(old.args) == blank(new.args) and blank(old.kwargs) == blank(new.kwargs))


def _passed_through(erased: int, kept: int, gone: set[int], before: Snapshot) -> bool:
    """True when ``kept`` is reached backward from ``erased`` through erased nodes only."""
    stack, seen = [erased], set()
    while stack:
        i = stack.pop()
        if i == kept:
            return True
        if i in gone and i not in seen:
            seen.add(i)
            stack += before[i].inputs()
    return False


def _sites(d: Diff) -> tuple[Site, ...]:
    parent: dict[int, int] = {}  # an id of the graph after; ~id is the one before

    def root(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def join(a: int, b: int) -> None:
        parent[root(a)] = root(b)

    erased, created, changed = set(d.erased), set(d.created), set(d.changed)
    parent.update((~i, ~i) for i in erased)
    parent.update((i, i) for i in (*created, *changed))

    label: dict[int, str] = {}
    claimed: set[int] = set()
    for s in d._declared:
        members = [~i for i in s.matched if i in erased and ~i not in claimed]
        members += [i for i in s.created if i in created and i not in claimed]
        members += [i for i in s.matched if i in changed and i not in claimed]
        if members:
            claimed.update(members)
            parent.update(dict.fromkeys(members, members[0]))
            label[members[0]] = s.label

    # what no declared site claims: joined by origin, then along edges, but never merging two declared sites
    free = dict.fromkeys(m for m in parent if m not in claimed)
    for n in d.after if free else ():
        if n.id in free and n.id in created:
            for o in n.origins:
                if ~o in free:
                    join(n.id, ~o)
    for snap, side in ((d.before, operator.invert), (d.after, operator.pos)) if free else ():
        for n in snap:
            if side(n.id) in free:
                for i in n.inputs():
                    if side(i) in free:
                        join(side(n.id), side(i))
    # a free erased node read only by one declared site's nodes is that site's litter
    litter = [m for m in free if m < 0]
    users = d.before.users() if litter else {}
    for m in reversed(litter):
        if all(~u not in free for u in users[~m]):
            owners = {root(~u) for u in users[~m] if ~u in parent}
            if len(owners) == 1:
                join(m, owners.pop())
    labels = {root(m): text for m, text in label.items()}

    groups: dict[int, tuple[list[int], list[int], list[int]]] = defaultdict(lambda: ([], [], []))
    for i in d.erased:
        groups[root(~i)][0].append(i)
    for n in d.after:
        if n.id in created:
            groups[root(n.id)][1].append(n.id)
        elif n.id in changed:
            groups[root(n.id)][2].append(n.id)
    sites = []
    for key, (gone, made, kept) in groups.items():
        at = d.after[made[-1]] if made else d.before[gone[-1]] if gone else d.after[kept[-1]]
        path = at.module_path
        sites.append(Site(labels.get(key, ""), tuple(gone), tuple(made), tuple(kept), path, at.layer))
    return tuple(sites)
