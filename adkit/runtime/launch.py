"""The launch of a step: packed, started without waiting, its tokens on their way back.

A step in flight was launched and its tokens are not known on the host yet. The step after it may be launched all
the same: ids that are still being sampled are taken from the step in flight on the device (``BatchLayout.sources``).

All device work runs on one stream, in the order in which steps are launched. That is why pages may go to another
sequence as soon as their holder gives them back, although a step in flight may still read or write them (that of a
request that was cancelled, or that had already ended when the step was launched: its token is computed in
vain): the new holder's step comes after it on the stream and writes every slot before it reads it. Zeroing the pages
of a failed request is ordered in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adkit.contract import CompiledModel, HostBatch
from adkit.runtime.batch import DecodeRows, build_batch
from adkit.runtime.device import Device, Drawn, Running
from adkit.runtime.sequence import Sequence


@dataclass
class InFlight:
    """A launched step of ``num_tokens`` tokens in R ``sequences``.

    ``computed`` [R]: tokens of each whose keys and values stand in the cache once the step is done. ``sampling`` are
    those that get a token.
    """

    num_tokens: int
    sequences: list[Sequence]
    computed: list[int]
    sampling: list[Sequence]
    running: Running

    def wait(self) -> Drawn:
        """Wait for the step; a token (negative: logits not finite) for each of ``sampling``."""
        return self.running.wait()


class Launcher:
    """Packs steps of ``model``, whose cache has pages of ``page_size`` tokens, and starts them on ``device``."""

    def __init__(self, model: CompiledModel, page_size: int, device: Device) -> None:
        self._replays = model.replay
        self._page_size = page_size
        self._device = device
        #: The latest step, if it was a replayed decode step, and its rows.
        self._latest: tuple[InFlight, DecodeRows] | None = None

    def __call__(self, sequences: list[Sequence], before: InFlight | None) -> InFlight:
        """Run the scheduled tokens of R sequences and sample; ``before`` is the step that is still in flight.

        Sequences are counted as if the step were done: ``num_cached`` grows, and a sampled token is pending; not when
        the model raises.
        """
        previous = None if before is None else before.running
        rows, replayed = self._rows(sequences, before), True
        if rows is not None:
            sampling, num_tokens = sequences, len(sequences)
            host = rows.advance(self._device.pinned)
        else:
            num_tokens = sum([s.num_scheduled for s in sequences])
            sampling = [s for s in sequences if s.samples]
            decode = len(sampling) == len(sequences) == num_tokens
            host, rows, replayed = self._batch(sequences, decode, num_tokens, previous)
        running = self._device.start(host, replayed, sampling, previous)

        for row, seq in enumerate(sampling):
            seq.num_pending += 1
            seq.row = row
        for seq in sequences:
            seq.num_cached += seq.num_scheduled
            seq.num_scheduled = 0
        computed = [s.num_cached for s in sequences]
        step = InFlight(num_tokens, sequences, computed, sampling, running)
        self._latest = None if rows is None else (step, rows)
        return step

    def _batch(
        self, sequences: list[Sequence], decode: bool, num_tokens: int, previous: Running | None
    ) -> tuple[HostBatch, DecodeRows | None, bool]:
        """The batch, rows to count on from, and whether to replay it. ``decode``: each brings a token and samples."""
        replay = self._replays if decode or num_tokens > len(sequences) else None
        padded = None if replay is None else replay.layout(num_tokens, len(sequences))
        if replay is None or padded is None:
            count = 0 if previous is None else previous.count
            return self._pack(sequences, num_previous=count), None, False
        host = self._pack(sequences, num_previous=replay.num_previous, padded=padded)
        return host, DecodeRows(sequences, host, self._page_size) if decode else None, True

    def _rows(self, sequences: list[Sequence], before: InFlight | None) -> DecodeRows | None:
        """The rows to count on from, when the step in flight is a decode step of these very sequences."""
        latest, self._latest = self._latest, None  # not to be used again should the launch fail
        if latest is None or latest[0] is not before or latest[1].sequences != sequences:
            return None
        return latest[1]

    def _pack(self, sequences: list[Sequence], **how: Any) -> HostBatch:
        return build_batch(sequences, self._page_size, pinned=self._device.pinned, **how)
