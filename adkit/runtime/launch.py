"""The device's side of a step: launched without waiting, its tokens on their way back.

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

import torch
from torch import Tensor

from adkit.contract import CompiledModel, HostBatch, TokenLogprob
from adkit.runtime.batch import DecodeRows, build_batch
from adkit.runtime.sampler import Sampled, sample
from adkit.runtime.sequence import Sequence


@dataclass
class InFlight:
    """A launched step of ``num_tokens`` tokens in R ``sequences``.

    ``computed`` [R]: tokens of each whose keys and values stand in the cache once the step is done. ``sampling`` are
    those that get a token. ``sampled`` is on the device; ``fetched`` is its copy, to be read after :meth:`wait`.
    """

    num_tokens: int
    sequences: list[Sequence]
    computed: list[int]
    sampling: list[Sequence]
    sampled: Sampled | None
    fetched: Sampled | None
    done: torch.cuda.Event | None

    @property
    def tokens(self) -> Tensor | None:
        """The tokens [L] on the device, in the order of ``sampling``."""
        return None if self.sampled is None else self.sampled.token_ids

    def wait(self) -> list[tuple[int, TokenLogprob | None]]:
        """Wait for the step; a token (negative: logits not finite) for each of ``sampling``."""
        if self.done is not None:
            self.done.synchronize()
        return [] if self.fetched is None else self.fetched.to_host([s.params for s in self.sampling])


class Launcher:
    """Starts steps of ``model``, whose cache has pages of ``page_size`` tokens."""

    def __init__(self, model: CompiledModel, page_size: int) -> None:
        self._model = model
        self._page_size = page_size
        self._on_cuda = model.device.type == "cuda"
        #: The latest step, if it was a replayed decode step, and its rows.
        self._latest: tuple[InFlight, DecodeRows] | None = None

    @torch.inference_mode()
    def __call__(self, sequences: list[Sequence], before: InFlight | None) -> InFlight:
        """Run the scheduled tokens of R sequences and sample; ``before`` is the step that is still in flight.

        Sequences are counted as if the step were done: ``num_cached`` grows, and a sampled token is pending; not when
        the model raises.
        """
        previous = None if before is None else before.tokens
        rows, best = self._rows(sequences, before), None
        if rows is not None:
            sampling, num_tokens = sequences, len(sequences)
            logits, best = self._replay(rows.advance(self._on_cuda), previous)
        else:
            num_tokens = sum([s.num_scheduled for s in sequences])
            sampling = [s for s in sequences if s.samples]
            decode = len(sampling) == len(sequences) == num_tokens
            replay = self._model.replay
            padded = None
            if replay is not None and (decode or num_tokens > len(sequences)):
                padded = replay.layout(num_tokens, len(sequences))
            if replay is not None and padded is not None:
                host = self._pack(sequences, num_previous=replay.num_previous, padded=padded)
                logits, best = self._replay(host, previous)
                rows = DecodeRows(sequences, host, self._page_size) if decode else None
            else:
                host = self._pack(sequences, num_previous=0 if previous is None else len(previous))
                logits = self._model(host.to(self._model.device, previous))

        sampled = fetched = done = None
        if sampling:
            sampled = sample(logits, sampling, previous, best)
            fetched = sampled.fetch()
        if self._on_cuda:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._model.device))

        for row, seq in enumerate(sampling):
            seq.num_pending += 1
            seq.row = row
        for seq in sequences:
            seq.num_cached += seq.num_scheduled
            seq.num_scheduled = 0
        computed = [s.num_cached for s in sequences]
        step = InFlight(num_tokens, sequences, computed, sampling, sampled, fetched, done)
        self._latest = None if rows is None else (step, rows)
        return step

    def _rows(self, sequences: list[Sequence], before: InFlight | None) -> DecodeRows | None:
        """The rows to count on from, when the step in flight is a decode step of these very sequences."""
        latest, self._latest = self._latest, None  # not to be used again should the launch fail
        if latest is None or latest[0] is not before or latest[1].sequences != sequences:
            return None
        return latest[1]

    def _pack(self, sequences: list[Sequence], **how: Any) -> HostBatch:
        return build_batch(sequences, self._page_size, pinned=self._on_cuda, **how)

    def _replay(self, host: HostBatch, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self._model.replay is not None
        return self._model.replay(host, previous)
