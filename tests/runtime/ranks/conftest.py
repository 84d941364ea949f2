"""Worlds of two toy ranks, in processes over gloo."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from adkit.contract import CompiledModel, DistConfig, EngineConfig
from adkit.runtime import Engine
from adkit.runtime.ranks import processes, start_processes, worker
from adkit.runtime.ranks.devices import Elsewhere

LAUNCH = processes.Child._launch
World = tuple[CompiledModel, Elsewhere]


def start(tp: int = 2, timeout: float = 10, **toy: object) -> World:
    return start_processes(
        "tests.runtime.ranks.toy:build", toy, DistConfig.of(tp=tp), device="cpu", timeout=timeout
    )


def engine_of(world: World, **settings: object) -> Engine:
    model, device = world
    config = EngineConfig(**{"max_seq_len": 64, "device": "cpu", "page_size": 4, **settings})
    return Engine(model, config, device=device)


class Forked:
    """A rank forked from this process, to save the time that importing torch takes: what Child needs of a process."""

    def __init__(self, fd: int, log: int, env: dict[str, str]) -> None:
        parent = os.getpid()
        self.pid = os.fork()
        self._status: int | None = None
        if not self.pid:
            try:
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                os.environ.update(env)
                torch.set_num_threads(1)  # the threads of the pool were not forked
                gc.freeze()  # nor those of this process's stores, for which their destructors would wait
                worker.main(os.dup(fd), parent)
            finally:
                os._exit(99)

    def wait(self, timeout: float | None = None) -> int:
        limit = time.monotonic() + (60 if timeout is None else timeout)
        while self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > limit:
                raise subprocess.TimeoutExpired("rank", timeout or 0)
            else:
                time.sleep(0.005)
        return self._status

    def send_signal(self, number: int) -> None:
        if self._status is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


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


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """Ranks are forked, but for tests that start other programs or take the fixture ``real``."""
    processes.Child._launch = staticmethod(Forked)
    yield
    processes.Child._launch = staticmethod(LAUNCH)


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
