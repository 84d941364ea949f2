"""Ranks as forks of the test's process: a world costs tenths of a second instead of the seconds that imports take."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adkit.runtime.ranks import processes, worker

#: How a rank is started outside of tests.
LAUNCH = processes.Child._launch


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


def gone(pids: list[int], within: float = 60.0) -> bool:
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


@contextmanager
def forked() -> Iterator[None]:
    """Ranks started in the block are forked."""
    processes.Child._launch = staticmethod(Forked)  # type: ignore[assignment]
    try:
        yield
    finally:
        processes.Child._launch = staticmethod(LAUNCH)  # type: ignore[method-assign]
