"""Worlds of two toy ranks, in processes over gloo."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from adkit.contract import CompiledModel, DistConfig, EngineConfig
from adkit.runtime import Engine
from adkit.runtime.ranks import Crew, start_processes

World = tuple[CompiledModel, Crew]


def start(tp: int = 2, timeout: float = 60, **toy: object) -> World:
    return start_processes(
        "tests.runtime.ranks.toy:build", toy, DistConfig.of(tp=tp), device="cpu", timeout=timeout
    )


def engine_of(world: World, **settings: object) -> Engine:
    model, crew = world
    config = EngineConfig(**{"max_seq_len": 64, "device": "cpu", "page_size": 4, **settings})
    return Engine(model, config, device=crew)


def gone(pids: list[int], within: float = 5.0) -> bool:
    """True once none of these processes is there (one that is dead but not waited for counts as gone)."""
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


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
    pids = [m.pid for _, crew in made.values() for m in crew.members]
    for _, crew in made.values():
        crew.close()
    assert gone(pids)
