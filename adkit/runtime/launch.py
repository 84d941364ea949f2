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

import torch
from torch import Tensor

from adkit.contract import CompiledModel, TokenLogprob
from adkit.runtime.batch import build_batch
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


@torch.inference_mode()
def launch(
    model: CompiledModel, sequences: list[Sequence], page_size: int, before: InFlight | None
) -> InFlight:
    """Run the scheduled tokens of R sequences and sample; ``before`` is the step that is still in flight.

    Sequences are counted as if the step were done: ``num_cached`` grows, and a sampled token is pending; not when
    the model raises.
    """
    on_cuda = model.device.type == "cuda"
    previous = None if before is None else before.tokens
    num_tokens = sum([s.num_scheduled for s in sequences])
    sampling = [s for s in sequences if s.samples]
    decode = len(sampling) == len(sequences) == num_tokens
    padded = model.decode.layout(len(sequences)) if decode and model.decode is not None else None
    if padded is not None and model.decode is not None:
        host = build_batch(
            sequences, page_size, num_previous=model.decode.num_previous, padded=padded, pinned=on_cuda
        )
        logits = model.decode(host, previous)[: len(sequences)]
    else:
        rows = 0 if previous is None else len(previous)
        host = build_batch(sequences, page_size, num_previous=rows, pinned=on_cuda)
        logits = model(host.to(model.device, previous))

    sampled = fetched = done = None
    if sampling:
        sampled = sample(logits, sampling, previous)
        fetched = sampled.fetch()
    if on_cuda:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(model.device))

    for row, seq in enumerate(sampling):
        seq.num_pending += 1
        seq.row = row
    for seq in sequences:
        seq.num_cached += seq.num_scheduled
        seq.num_scheduled = 0
    computed = [s.num_cached for s in sequences]
    return InFlight(num_tokens, sequences, computed, sampling, sampled, fetched, done)
