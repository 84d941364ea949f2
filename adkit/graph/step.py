"""What a pass did, as one object: :class:`Step`, and the list of them, :class:`Steps`."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from adkit.graph.diff import Diff, RewriteClass, diff
from adkit.graph.edit import SiteRecord
from adkit.graph.snapshot import Snapshot

Status = Literal["done", "skipped", "disabled", "failed", "pending"]


@dataclass(slots=True)
class PassInfo:
    """What a pass says of its own run.

    ``num_matches`` sites rewritten; ``is_clean`` no dead code left; ``has_valid_shapes`` every node's
    ``meta["val"]`` holds; ``skipped`` with ``reason`` when it had nothing to work on.
    """

    skipped: bool = False
    num_matches: int = 0
    is_clean: bool = True
    has_valid_shapes: bool = True
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Step:
    """One pass of the pipeline: what it is, and once run, what it did.

    ``seconds`` is the pass's own time, ``record_seconds`` the time spent recording it; ``memory_bytes`` the
    change of tensor memory on the device; ``altered`` names tensors whose data the pass changed.
    """

    name: str
    stage: str
    config: dict[str, Any]
    doc: str
    status: Status = "pending"
    before: Snapshot = field(default_factory=Snapshot)
    after: Snapshot = field(default_factory=Snapshot)
    info: PassInfo = field(default_factory=PassInfo)
    sites: tuple[SiteRecord, ...] = ()
    seconds: float = 0.0
    record_seconds: float = 0.0
    memory_bytes: int = 0
    log: list[str] = field(default_factory=list)
    altered: tuple[str, ...] = ()
    _diff: Diff | None = field(default=None, repr=False)
    _checker: Callable[..., Any] | None = field(default=None, repr=False)
    _profiler: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def diff(self) -> Diff:
        """Exact difference between ``before`` and ``after``."""
        if self._diff is None:
            self._diff = diff(self.before, self.after, self.sites)
        return self._diff

    @property
    def rewrites(self) -> tuple[RewriteClass, ...]:
        """The change as rewrite classes."""
        return self.diff.rewrites

    @property
    def changed(self) -> bool:
        """True when the graph differs after the step."""
        return self.before is not self.after and not self.diff.empty

    def check(self, **options: Any) -> Any:
        """Compare the graph before and after on the same inputs and weights; see ``Workbench.check``."""
        return self._live(self._checker)(self, **options)

    def profile(self, **options: Any) -> Any:
        """Time each node of the graph that the step left; see ``Workbench.profile``."""
        return self._live(self._profiler)(self, **options)

    def _live(self, run: Callable[..., Any] | None) -> Callable[..., Any]:
        if run is None:
            raise RuntimeError(
                f"step {self.name!r} is not part of a live Workbench (loaded from a file?), so it cannot "
                "be run; build a Workbench for the model and look at its step there"
            )
        return run

    def explain(self) -> str:
        """What the pass does and why, what it did here, in prose."""
        lines = [
            f"{self.name}  (stage {self.stage}, {self.status})",
            "",
            textwrap.dedent(self.doc).strip().replace("``", "`"),
            "",
        ]
        if self.info.reason:
            lines.append(f"Here: {self.status}: {self.info.reason}")
        elif self.status == "done" and self.changed:
            lines.append(f"Here: {len(self.before)} -> {len(self.after)} nodes in {self.seconds:.3f} s.")
            lines += [f"  {r}" for r in self._told()]
        elif self.status == "done" and not self.altered:
            lines.append(
                f"Here: {'the graph stays as it is' if self.log else 'nothing to change in this graph'}."
            )
        if self.altered:
            lines.append(f"Here: {self._altered()}.")
        lines += [f"  {entry}" for entry in self.log]
        return Text("\n".join(lines))

    def text_diff(self, *, context: int = 3) -> str:
        """Unified diff of the two code views."""
        return "\n".join(
            difflib.unified_diff(
                self.before.code().splitlines(),
                self.after.code().splitlines(),
                "before",
                "after",
                n=context,
                lineterm="",
            )
        )

    def summary(self) -> str:
        """One line: mark, name, what changed."""
        mark = {"done": "+", "skipped": "-", "disabled": "x", "failed": "!", "pending": " "}[self.status]
        if self.status == "done" and not self.changed and not self.altered:
            mark = "="
        parts = self._told()[:2] if self.changed else []
        what = self.info.reason or "; ".join([*parts, *([self._altered()] if self.altered else [])])
        return f"{mark} {self.name:<32} {what}".rstrip()

    def __repr__(self) -> str:
        head = f"Step {self.name!r} ({self.stage}, {self.status})"
        if self.info.reason:
            return f"{head}: {self.info.reason}"
        if self.status != "done":
            return head
        body = [f"{head}: {len(self.before)} -> {len(self.after)} nodes"]
        body += [f"  {r}" for r in self._told()]
        body += [f"  {self._altered()}"] if self.altered else []
        return "\n".join(body if len(body) > 1 else [*body, "  no change"])

    def _altered(self) -> str:
        names = ", ".join(self.altered[:3]) + (", ..." if len(self.altered) > 3 else "")
        return f"new data in {len(self.altered)} tensors: {names}"

    def _told(self) -> list[str]:
        """The rewrite classes as text; where the graph begins everything is new, which one line says
        better."""
        if not len(self.before) and len(self.after):
            return [f"a graph of {len(self.after):,} nodes"]
        return [str(r) for r in self.rewrites]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from adkit.graph.display import mimebundle

        return mimebundle(self)


class Text(str):
    """A string whose repr is itself, so that a notebook prints it readably."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from adkit.graph.display import mimebundle

        return mimebundle(self)


class Steps:
    """The steps of a pipeline, in order; takes a key, an index (negative from the end) or a slice.

    ``heading`` stands above them in a notebook. Raises KeyError for an unknown key, with the nearest one.
    """

    def __init__(self, steps: list[Step], heading: str = "") -> None:
        self._steps = steps
        self.heading = heading

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, key: object) -> bool:
        return any(s.name == key for s in self._steps)

    @overload
    def __getitem__(self, key: str | int) -> Step: ...

    @overload
    def __getitem__(self, key: slice) -> Steps: ...

    def __getitem__(self, key: str | int | slice) -> Step | Steps:
        if isinstance(key, slice):
            return Steps(self._steps[key])
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                raise IndexError(f"no step {key}: the pipeline has {len(self)}")
            return self._steps[key]
        for s in self._steps:
            if s.name == key:
                return s
        close = difflib.get_close_matches(str(key), [s.name for s in self._steps], 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise KeyError(f"no step {key!r} in this pipeline{hint}")

    def diff(self, a: str | int, b: str | int | None = None) -> Diff:
        """What changed from the graph after step ``a`` to the one after step ``b`` (default: the last that ran).

        Sites of the steps between that build on each other are one rewrite. Raises KeyError or IndexError for an
        unknown step, ValueError for one that left no graph.
        """
        from adkit.graph.between import between

        first = self[a]
        last = self[b] if b is not None else next((s for s in reversed(self._steps) if len(s.after)), first)
        for s in (first, last):
            if not len(s.after):
                raise ValueError(
                    f"step {s.name!r} ({s.status}) left no graph to compare; run through it first"
                )
        names = self.keys()
        return between(self._steps, names.index(first.name), names.index(last.name))

    def keys(self) -> list[str]:
        """Names of all steps, in order."""
        return [s.name for s in self._steps]

    def table(self) -> Any:
        """The steps as a pandas DataFrame (stage, status, matches, nodes, seconds)."""
        import pandas as pd

        return pd.DataFrame(
            {
                "step": s.name,
                "stage": s.stage,
                "status": s.status,
                "matches": s.info.num_matches,
                "nodes": len(s.after),
                "added": len(s.diff.created) if s.changed else 0,
                "removed": len(s.diff.erased) if s.changed else 0,
                "seconds": s.seconds,
            }
            for s in self._steps
        ).set_index("step")

    def __repr__(self) -> str:
        return "\n".join(s.summary() for s in self._steps)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from adkit.graph.display import mimebundle

        return mimebundle(self)
