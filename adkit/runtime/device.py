"""Where steps run: one device of this process. Ranks (:mod:`adkit.runtime.ranks`) are another such place.

All work of a step runs on one stream, in the order in which steps are started.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adkit.contract import CompiledModel, HostBatch, SamplingParams, TokenLogprob
from adkit.runtime.sampler import Drawing, Sampled, sample

#: What :meth:`Running.wait` gives for each row that samples: the token (negative: its logits were not finite).
Drawn = list[tuple[int, TokenLogprob | None]]


class Running(Protocol):
    """A step that was started."""

    @property
    def count(self) -> int:
        """Rows [L] that get a token."""
        ...

    def wait(self) -> Drawn:
        """Wait for the step; each row's token."""
        ...


class Device(Protocol):
    """Runs steps of a compiled model. ``pinned``: batches are to be packed in pinned memory."""

    pinned: bool

    def start(self, host: Any, replay: bool, sampling: Seq[Drawing], before: Any) -> Running:
        """Start a step, and do not wait for it. ``before``: what this returned for the one that still runs, or None.

        ``host``: a HostBatch, for a model of several pools a SplitBatch. ``replay``: the batch is laid out for the
        model's ``replay``. ``sampling`` are those that get a token.
        """
        ...

    def wipe(self, pages: Seq[int], pool: int) -> None:
        """Zero these pages of every cache of ``pool``, behind all steps started."""
        ...

    def close(self) -> None:
        """Let go of what is not of this process."""
        ...

    @property
    def closed(self) -> bool:
        """True once nothing can be started any more."""
        ...


@dataclass
class Launched:
    """A step on a device of this process: tokens there, and their copy on its way to the host."""

    sampled: Sampled | None
    fetched: Sampled | None
    params: list[SamplingParams]
    done: torch.cuda.Event | None

    @property
    def count(self) -> int:
        """Rows that get a token."""
        return len(self.params)

    @property
    def tokens(self) -> Tensor | None:
        """The tokens [L] on the device."""
        return None if self.sampled is None else self.sampled.token_ids

    def wait(self) -> Drawn:
        """Wait for the step; each row's token."""
        if self.done is not None:
            self.done.synchronize()
        return [] if self.fetched is None else self.fetched.to_host(self.params)


class OneDevice:
    """The device that ``model`` was compiled for, in this process."""

    def __init__(self, model: CompiledModel) -> None:
        self.model = model
        self.pinned = model.device.type == "cuda"

    def logits(self, host: HostBatch, replay: bool, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of a step, and the best tokens where known; ``previous`` [L'] as for ``Replay``."""
        best: Tensor | None = None
        if replay:
            assert self.model.replay is not None
            logits, best = self.model.replay(host, previous)
        else:
            logits = self.model(host.to(self.model.device, previous))
        return picked(host, logits, best) if host.shares else (logits, best)

    @torch.inference_mode()
    def start(
        self, host: HostBatch, replay: bool, sampling: Seq[Drawing], before: Launched | None
    ) -> Launched:
        """Start a step."""
        previous = None if before is None else before.tokens
        logits, best = self.logits(host, replay, previous)
        sampled = fetched = None
        if sampling:
            sampled = sample(logits, sampling, previous, best)
            fetched = sampled.fetch()
        return Launched(sampled, fetched, [s.params for s in sampling], self.mark())

    def mark(self) -> torch.cuda.Event | None:
        """An event behind all work started; None where the host waits for each operation anyway."""
        if not self.pinned:
            return None
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.model.device))
        return done

    def wipe(self, pages: Seq[int], pool: int = 0) -> None:
        """Zero these pages; all caches of this process are of one pool."""
        self.model.caches.wipe(pages)

    def close(self) -> None:
        """Nothing to do: memory goes with the model."""

    @property
    def closed(self) -> bool:
        """Never."""
        return False


def picked(host: HostBatch, logits: Tensor, best: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of the logits [ranks * L, V] and best tokens of all ranks the rows that get a token, as ``host`` says."""
    size = host.layout.logits
    rows = [rank * size + i for rank, count in enumerate(host.shares) for i in range(count)]
    index = torch.tensor(rows, dtype=torch.int64, pin_memory=logits.is_cuda)
    index = index.to(logits.device, non_blocking=True)
    return logits.index_select(0, index), None if best is None else best.index_select(0, index)
