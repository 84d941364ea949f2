"""A record that grows with the walk: opening the explorer then costs what has not been told yet, often nothing.

Telling a walk takes at most :data:`SECONDS_A_NODE` for each node of its graph. An export takes fifty times that, so a
walk that begins with one is told as it goes; where the graph came out of a cache and the passes alone would have to
pay for it, it is left until somebody looks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from adkit.graph.step import Step

if TYPE_CHECKING:
    from adkit.viz.record import Walked

#: Of a walk's time, the part that may go into telling it to who may never look.
SHARE = 0.04
#: What telling a whole walk takes at most (llama-3.1-405b: 0.4 s for 8,481 nodes).
SECONDS_A_NODE = 5e-5


class Growing:
    """What was told so far of one Workbench's walk, and what that cost; no graph is held that the Workbench gave up."""

    def __init__(self) -> None:
        self._walked: Walked | None = None
        self._worked = self._spent = 0.0

    @property
    def walked(self) -> Walked:
        """What was told so far."""
        if self._walked is None:
            from adkit.viz.record import Walked

            self._walked = Walked()
        return self._walked

    def keep(self, steps: Sequence[Step]) -> None:
        """The steps are others than before: what was told of those that are gone is dropped."""
        if self._walked is not None:
            self._walked.keep(steps)

    def ran(self, steps: Sequence[Step]) -> None:
        """The last of ``steps`` has just run: tell what is untold, if the walk took so long that it does not count."""
        step = steps[-1]
        self._worked += step.seconds + step.record_seconds
        if self._spent + SECONDS_A_NODE * len(step.after) > SHARE * self._worked:
            return
        start = time.perf_counter()
        told = len(self.walked.told)
        try:
            self.walked.follow(steps)
            for s in steps[told:]:
                s.summary()  # its rewrites, which the step keeps
        except Exception:  # a pass must not fail for want of a picture: who asks for the record is told why
            pass
        self._spent += time.perf_counter() - start


__all__ = ["SECONDS_A_NODE", "SHARE", "Growing"]
