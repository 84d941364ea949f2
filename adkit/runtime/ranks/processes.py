"""Ranks as child processes of this one, on this host."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

from adkit.runtime.ranks.link import Link
from adkit.runtime.ranks.messages import Job

_PROGRAM = "import sys; from adkit.runtime.ranks.worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
_LOG_BYTES = 4000  # of the end of a log, to be shown
_DUMP_SECONDS = 5.0  # that a rank gets to write where it stands
_DUMP_REST = 0.3  # seconds without another word after which it has


class Member(Protocol):
    """A rank that is not in this process."""

    rank: int
    link: Link

    def how_it_ended(self, seconds: float) -> str:
        """``"was killed by signal 9 (SIGKILL)"`` or the like; empty if it has not ended in so many seconds."""
        ...

    def log(self) -> str:
        """The last lines it wrote, if they are to be had."""
        ...

    def where(self) -> str:
        """Where it stands, if that is to be had."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...


class Peer:
    """A :class:`Member` that somebody else started and will end; all there is of it is its link."""

    def __init__(self, rank: int, link: Link) -> None:
        self.rank = rank
        self.link = link

    def how_it_ended(self, seconds: float) -> str:
        """Not known."""
        return "has ended" if self.link.fileno() < 0 else ""

    def log(self) -> str:
        """Not known: it wrote to a terminal or file of its own."""
        return ""

    def where(self) -> str:
        """Not known."""
        return ""

    def kill(self) -> None:
        """Whoever started it does that."""


class Child:
    """A :class:`Member` that is a child process; ``pid`` is its id."""

    def __init__(self, job: Job, ranks: int, environment: dict[str, str], timeout: float) -> None:
        self.rank = job.dist.rank
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process; nameless, so never left over
        env = {**os.environ, **environment}
        env["PYTHONUNBUFFERED"] = "1"  # so that the log is whole when a rank is killed
        env["PYTHONPATH"] = os.pathsep.join(str(Path(p).absolute()) for p in sys.path if p or p == "")
        # Ranks that share cores do not take all of them each.
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        with theirs:
            self._process = self._launch(theirs.fileno(), self._log.fileno(), env)
        self.pid = self._process.pid
        self.link = Link(ours, timeout)
        self.link.send(job)

    @staticmethod
    def _launch(fd: int, log: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """A process of :mod:`adkit.runtime.ranks.worker`: not of this program, whose main module may not bear to be
        imported again, and not forked, since a device does not bear that."""
        return subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(fd), str(os.getpid())],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, pass_fds=(fd,),
        )  # fmt: skip

    def how_it_ended(self, seconds: float) -> str:
        """Its end, in words."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return ""
        if status >= 0:
            return f"ended with status {status}"
        name = signal.Signals(-status).name
        why = " - the system does that when memory runs out" if name == "SIGKILL" else ""
        return f"was killed by signal {-status} ({name}{why})"

    def log(self) -> str:
        """The end of what it wrote."""
        size = os.fstat(self._log.fileno()).st_size
        begin = max(0, size - _LOG_BYTES)
        return os.pread(self._log.fileno(), _LOG_BYTES, begin).decode(errors="replace").strip()

    def where(self) -> str:
        """Its stack, which it writes to its log when asked by a signal."""
        if "T" in _state(self.pid):
            return "it is stopped (SIGSTOP)"
        before = size = last = os.fstat(self._log.fileno()).st_size
        self._process.send_signal(signal.SIGUSR1)
        limit = time.monotonic() + _DUMP_SECONDS
        while (size == before or size != last) and time.monotonic() < limit:
            time.sleep(_DUMP_REST)
            last, size = size, os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size - before, before).decode(errors="replace").strip()

    def kill(self) -> None:
        """Kill it, and see that nothing of it is left."""
        self._process.kill()
        self._process.wait()


def _state(pid: int) -> str:
    """The kernel's letter for what a process is doing; empty where the kernel does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
