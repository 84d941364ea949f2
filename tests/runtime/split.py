"""Ranks that have sequences of their own, as hash models of one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from adkit.contract import CompiledModel, EngineConfig, SplitBatch
from adkit.passes.compile.cuda_graphs import StepGraphs, decode_layouts, ladder, prompt_layouts
from adkit.runtime import Engine
from adkit.runtime.device import OneDevice, picked
from tests.runtime.conftest import INPUTS, VOCAB, HashModel


class Share(HashModel):
    """A rank's model, which may have to run a step in which it has nobody."""

    def forward(self, **inputs: Tensor) -> Tensor:
        if not bool((inputs["page_table"][:, 0] > 0).any()):
            assert not inputs["slot_mapping"].any(), "padding went to somebody's page"
            assert not inputs["cache_lens"].any()
            self.idle = getattr(self, "idle", 0) + 1
            return torch.full((1, len(inputs["logits_indices"]), VOCAB), float("nan"))
        return super().forward(**inputs)


class Ranks(OneDevice):
    """A device: every rank runs its part, and rows are picked from the logits of all."""

    def __init__(self, model: CompiledModel, shares: Sequence[CompiledModel]) -> None:
        super().__init__(model)
        self.shares = shares
        self.layouts: list[set[object]] = []

    def logits(self, host: SplitBatch, replay: bool, previous: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert len(host.parts) == len(self.shares)
        self.layouts.append({part.layout for part in host.parts})
        found = []
        for model, part in zip(self.shares, host.parts, strict=True):
            if replay:
                assert model.replay is not None
                found.append(model.replay(part, previous))
            else:
                logits = model(part.to("cpu", previous))
                found.append((logits, logits.argmax(-1)))
        logits, best = (torch.cat(t) for t in zip(*found, strict=True))
        return picked(host.parts[0], logits, best if replay else None)

    def wipe(self, pages: Sequence[int], pool: int = 0) -> None:
        self.shares[pool].caches.wipe(pages)


def engine_of(
    pools: int, num_pages: int, page_size: int = 4, *, replay: bool = False, **settings: object
) -> tuple[Engine, list[Share]]:
    """An engine over so many ranks, ``num_pages`` each, and their models."""
    config = EngineConfig(**{"max_seq_len": 64, "device": "cpu", "page_size": page_size, **settings})
    models = [Share(num_pages, page_size) for _ in range(pools)]
    shares = [m.compiled() for m in models]
    if replay:
        most, width = config.share(pools).max_batch_size, -(-config.max_seq_len // page_size)
        layouts = decode_layouts(ladder(most), width) + prompt_layouts([4, 16], width, most)
        for s in shares:
            s.replay = StepGraphs(s.forward, INPUTS, s.caches, layouts, config.max_batch_size, s.device)
    whole = dataclasses.replace(shares[0], pools=pools)
    return Engine(whole, config, device=Ranks(whole, shares)), models


def balanced(engine: Engine) -> None:
    """Every pool's books agree with what its sequences hold."""
    held: list[list[Sequence[int]]] = [[] for _ in engine.pools]
    for seq in engine.scheduler:
        held[seq.pool].append(seq.pages)
    for pages, owners in zip(engine.pools, held, strict=True):
        pages.check(owners)


def drain(engine: Engine) -> None:
    """Run to the end; nothing may leak."""
    while engine.has_work:
        engine.step()
        balanced(engine)
    assert not any(pages.held for pages in engine.pools), "pages leaked"
