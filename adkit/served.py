"""Engines that a Workbench handed out: they share weights with the graph that later passes change.

An engine whose weights a pass writes into would go on with other answers and no word of it, so it is told to refuse.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adkit.contract import CachePool
from adkit.passes.pipeline import State
from adkit.passes.tensors import Stamp, Stamps

if TYPE_CHECKING:
    from adkit.runtime.engine import Engine


@dataclass
class _Handed:
    engine: weakref.ref[Engine]
    pool: weakref.ref[CachePool]
    weights: Stamps


class Served:
    """The engines of one Workbench, none of which is kept alive by it."""

    def __init__(self) -> None:
        self._handed: list[_Handed] = []

    def add(self, engine: Engine, state: State) -> None:
        """``engine`` runs what ``state`` came to."""
        held = {name: stamp.tensor() for name, stamp in state.tensors.items()}
        # Stamps of its own: those of the state follow the weights when these are read again.
        weights = {name: Stamp(t, loadable=False) for name, t in held.items() if t is not None}
        self._handed.append(_Handed(weakref.ref(engine), weakref.ref(engine.model.caches), weights))

    def uses(self, pool: CachePool) -> bool:
        """True when an engine writes, or wrote, to these caches."""
        return any(h.pool() is pool for h in self._handed)

    def ran(self, key: str) -> None:
        """The step ``key`` ran or failed: engines whose weights it changed in place refuse from now on."""
        for h in self._handed:
            engine = h.engine()
            if engine is None or engine.refusal:
                continue
            name = next((name for name, stamp in h.weights.items() if stamp.changed), None)
            if name is not None:
                engine.refuse(
                    f"Step {key!r} changed the data of {name!r} in place since this engine was made, and the engine "
                    "uses it: its answers would no longer be those of its pipeline. Take a new engine (wb.llm()); to "
                    "keep both, let the pass set a new Parameter instead of writing into the old one, or make the "
                    "engines from separate Workbenches."
                )


__all__ = ["Served"]
