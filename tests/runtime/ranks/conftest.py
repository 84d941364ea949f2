"""Worlds of two toy ranks, in processes over gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from adkit.contract import CompiledModel, DistConfig, EngineConfig
from adkit.runtime import Engine
from adkit.runtime.ranks import processes, start_processes
from adkit.runtime.ranks.devices import Elsewhere
from tests.forked_ranks import LAUNCH, forked, gone

World = tuple[CompiledModel, Elsewhere]


def start(tp: int = 2, timeout: float = 60, attention_dp: bool = False, **toy: object) -> World:
    dist = DistConfig.of(tp=tp, enable_attention_dp=attention_dp)
    return start_processes("tests.runtime.ranks.toy:build", toy, dist, device="cpu", timeout=timeout)


def engine_of(world: World, **settings: object) -> Engine:
    model, device = world
    config = EngineConfig(**{"max_seq_len": 64, "device": "cpu", "page_size": 4, **settings})
    return Engine(model, config, device=device)


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """Ranks are forked, but for tests that start other programs or take the fixture ``real``."""
    with forked():
        yield


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are started as they are outside of tests."""
    monkeypatch.setattr(processes.Child, "_launch", staticmethod(LAUNCH))


@pytest.fixture(scope="session")
def worlds() -> Iterator[Callable[..., World]]:
    """``worlds(**toy)``: a world that lasts, one for each kind of toy."""
    made: dict[str, World] = {}

    def world(**toy: object) -> World:
        key = repr(sorted(toy.items()))
        if key not in made:
            made[key] = start(**toy)
        return made[key]

    yield world
    pids = [m.pid for _, device in made.values() for m in device.crew.members.values()]
    for _, device in made.values():
        device.close()
    assert gone(pids)
