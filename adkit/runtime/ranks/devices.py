"""Several ranks as one device of an engine.

A step is sent to every rank and runs there; only its tokens come back, from rank 0. Rank 0 may live in a process of its
own like the others (:class:`Elsewhere`: a notebook must outlive whatever happens to ranks), or in the engine's
(:class:`Here`: a program that torchrun started, or ``adkit run --tp``).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from adkit.contract import (
    BatchLayout,
    CachePool,
    CompiledModel,
    HostBatch,
    RankError,
    SplitBatch,
    fitting_layout,
)
from adkit.runtime.device import Drawn, Launched
from adkit.runtime.ranks.crew import Crew
from adkit.runtime.ranks.messages import Ready, Wipe
from adkit.runtime.ranks.rank import Rank
from adkit.runtime.sampler import Drawing


@dataclass
class CrewStep:
    """A step that the ranks run; ``count`` rows get a token."""

    crew: Crew
    number: int
    count: int

    def wait(self) -> Drawn:
        """Wait for it; each row's token."""
        return self.crew.collect(self.number)


class Elsewhere:
    """A :class:`~adkit.runtime.device.Device`: all ranks are in processes of their own."""

    pinned = False

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    def start(
        self, host: HostBatch | SplitBatch, replay: bool, sampling: Seq[Drawing], before: CrewStep | None
    ) -> CrewStep:
        """Send a step to every rank."""
        step = self.crew.start(host, replay, sampling)
        return CrewStep(self.crew, step.number, step.rows)

    def wipe(self, pages: Seq[int], pool: int) -> None:
        """Zero pages on the ranks that they are of; nothing where there are none any more."""
        if self.crew.error is None:
            self.crew.tell(Wipe(tuple(pages), pool))

    def close(self) -> None:
        """End every rank."""
        self.crew.close()

    @property
    def closed(self) -> bool:
        """True once the ranks have ended."""
        return self.crew.error is not None


class Here:
    """A :class:`~adkit.runtime.device.Device`: rank 0 is ``rank``, in this process, and ``crew`` are the others."""

    def __init__(self, rank: Rank, crew: Crew) -> None:
        self.crew = crew
        self._rank = rank
        self.pinned = rank.device.pinned

    def start(
        self, host: HostBatch | SplitBatch, replay: bool, sampling: Seq[Drawing], before: Launched | None
    ) -> Launched:
        """Send a step to the others, and start it here."""
        step = self.crew.start(host, replay, sampling)
        try:
            launched = self._rank.start(step.of(0))
        except BaseException as error:  # the others wait for this rank now, and always would
            self.crew.error = RankError(f"rank 0 failed: {type(error).__name__}: {error}", 0)
            self.crew.close(0.0)
            raise
        assert launched is not None
        return launched

    def wipe(self, pages: Seq[int], pool: int) -> None:
        """Zero pages on the ranks that they are of."""
        if self.crew.error is None:
            self.crew.tell(Wipe(tuple(pages), pool))
            self._rank.wipe(tuple(pages), pool)

    def close(self) -> None:
        """End the other ranks."""
        self.crew.close()

    @property
    def closed(self) -> bool:
        """True once the ranks have ended."""
        return self.crew.error is not None


class _Replays:
    """The layouts that ranks can replay; a :class:`~adkit.contract.Replay` that is asked for nothing else."""

    def __init__(self, layouts: tuple[BatchLayout, ...], num_previous: int) -> None:
        self.num_previous = num_previous
        self.layouts = list(layouts)

    def layout(self, tokens: int, sequences: int) -> BatchLayout | None:
        """The smallest that holds such a step."""
        return fitting_layout(self.layouts, tokens, sequences)

    def __call__(self, host: HostBatch, previous: torch.Tensor | None) -> NoReturn:
        """Ranks do that."""
        raise TypeError("this model runs on ranks in other processes")


def outline(ready: Ready) -> CompiledModel:
    """A rank's model as the engine must know it: sizes, no weights, no cache, nothing to run."""

    def elsewhere(**inputs: Any) -> NoReturn:
        raise TypeError("this model runs on ranks in other processes")

    return CompiledModel(
        forward=elsewhere,
        inputs=ready.inputs,
        caches=CachePool((), ready.page_size, ready.num_pages),
        vocab_size=ready.vocab_size,
        device=torch.device(ready.device),
        eos_token_ids=ready.eos_token_ids,
        max_positions=ready.max_positions,
        made_for=ready.made_for,
        replay=_Replays(ready.layouts, ready.num_previous) if ready.layouts else None,
        pools=ready.pools,
        details=ready.facts,
    )
