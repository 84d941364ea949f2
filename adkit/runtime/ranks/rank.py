"""One rank's side of the steps: what the engine's process tells it, it runs on its device.

Rank 0 alone samples. Where every row takes its best token in a replayed step, the tokens are agreed on inside of that
step (``compile_model`` puts it there); after any other step rank 0's are broadcast on the device. So all
ranks have the same tokens in flight, whatever way they were drawn, and no rank waits for a host.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adkit.contract import Communicator, CompiledModel, HostBatch
from adkit.runtime.device import Drawn, Launched, OneDevice
from adkit.runtime.ranks.link import Link
from adkit.runtime.ranks.messages import Collect, End, Ready, Result, Step, Wipe


class Rank:
    """Runs steps of its part of the model, in the order in which every rank gets them."""

    def __init__(self, model: CompiledModel, communicator: Communicator) -> None:
        self.model = model
        self.communicator = communicator
        self.device = OneDevice(model)
        self._before: Launched | None = None
        self._tokens: Tensor | None = None  # of the latest step, on ranks that do not sample

    @torch.inference_mode()
    def start(self, step: Step) -> Launched | None:
        """Start a step (this rank's part); on rank 0 returns what to wait for."""
        assert isinstance(step.host, HostBatch)
        agreed = step.replay and step.plain
        if self.communicator.rank == 0:
            before = self._before if step.host.continues else None
            launched = self.device.start(step.host, step.replay, step.sampling, before)
            if launched.tokens is not None and not agreed:
                self.communicator.broadcast(launched.tokens)
            self._before = launched
            return launched
        previous = self._tokens if step.host.continues else None
        _, best = self.device.logits(step.host, step.replay, previous)
        self._tokens = best
        if not agreed and step.rows:
            tokens = torch.empty(step.rows, dtype=torch.int64, device=self.model.device)
            self._tokens = self.communicator.broadcast(tokens)
        return None

    def wipe(self, pages: tuple[int, ...], pool: int) -> None:
        """Zero pages of every cache, if they are of this rank's pool."""
        if self.model.pools == 1 or pool == self.communicator.rank:
            self.device.wipe(pages)

    def ready(self) -> Ready:
        """What the engine's process must know."""
        model, replay = self.model, self.model.replay
        return Ready(
            self.communicator.rank,
            model.vocab_size,
            str(model.device),
            model.inputs,
            model.caches.num_pages,
            model.caches.page_size,
            tuple(model.eos_token_ids),
            model.max_positions,
            model.made_for,
            0 if replay is None else replay.num_previous,
            () if replay is None else tuple(replay.layouts),
            model.pools,
            dict(model.details),
        )


def serve(rank: Rank, link: Link, at: Callable[[str], object] = lambda what: None) -> None:
    """Do what ``link`` says until it says End; ``at`` is told what is being done."""
    running: dict[int, Launched] = {}
    while True:
        at("waiting for a step")
        message = link.receive(rank.device.pinned)
        match message:
            case Step():
                at(f"running step {message.number}")
                launched = rank.start(message)
                if launched is not None:
                    # The engine waits for its steps in turn, or not at all for those that it gave up.
                    running = {n: s for n, s in running.items() if n == message.number - 1}
                    running[message.number] = launched
            case Collect():
                at(f"waiting for step {message.number} to end")
                drawn: Drawn = running.pop(message.number).wait()
                link.send(Result(message.number, drawn))
            case Wipe():
                rank.wipe(message.pages, message.pool)
            case End():
                return
            case _:
                raise TypeError(f"a rank was sent {type(message).__name__}")
