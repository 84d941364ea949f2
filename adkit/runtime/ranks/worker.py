"""A rank as a process: builds its part of the model, then runs steps until told to end.

It ends by itself when its parent is gone, however that came about, and prints to nobody's terminal: what it writes goes
to a file that the engine's process shows when something fails.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from adkit.contract import AdkitError
from adkit.ops import dist
from adkit.runtime.ranks.communicator import PeersLost
from adkit.runtime.ranks.link import Link
from adkit.runtime.ranks.meeting import join, visit_store
from adkit.runtime.ranks.messages import Failed, Job, Progress
from adkit.runtime.ranks.rank import Rank, serve

_LOOK_SECONDS = 0.5  # between looks at whether the parent is alive
_TELL_SECONDS = 0.1  # between reports of progress


def main(fd: int, parent: int) -> None:
    """The process's program: a socket to the parent is open under ``fd``."""
    os.set_inheritable(fd, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the engine's process, which decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=False)  # "where do you stand?"
    status = work(Link(socket.socket(fileno=fd)))
    sys.stdout.flush()
    os._exit(status)  # at once: libraries may wait in their own clean-up for ranks that are gone


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def work(link: Link) -> int:
    """Take a job from ``link`` and do it to its end; returns the exit status."""
    rank = -1
    try:
        job: Job = link.receive()
        rank = job.dist.rank
        store = visit_store(job.store, job.timeout)
        communicator = join(store, rank, job.dist.world_size, torch.device(job.device), job.timeout)
        with dist.use(communicator):
            model = builder_of(job.builder)(
                dist=job.dist,
                device=job.device,
                progress=_teller(link) if rank == 0 else _nothing,
                **job.options,
            )
            built = Rank(model, communicator)
            link.send(built.ready())
            serve(built, link)
    except EOFError:
        return 1  # the engine's process is gone, and nobody is left to tell
    except BaseException as error:
        sys.stdout.flush()  # before the report, which brings the end
        try:
            link.send(failure(rank, error))
        except (EOFError, OSError):
            traceback.print_exc()
        return 1
    return 0


def builder_of(name: str) -> Callable[..., Any]:
    """The function that ``"module:function"`` names."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), function)
    return found


def failure(rank: int, error: BaseException) -> Failed:
    """An error as it is told to the engine's process."""
    causes = []
    at: BaseException | None = error
    while at is not None:
        causes.append(at)
        at = at.__cause__ or at.__context__
    return Failed(
        rank,
        type(error).__name__ if isinstance(error, AdkitError) else "",
        str(error) if isinstance(error, AdkitError) else f"{type(error).__name__}: {error}",
        "".join(traceback.format_exception(error)),
        any(isinstance(e, PeersLost) for e in causes),
    )


def _teller(link: Link) -> Callable[[int, int, str], None]:
    """Reports progress, now and then, and the end of everything."""
    last: dict[str, float] = {}

    def tell(done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done >= total or now - last.get(what, 0.0) > _TELL_SECONDS:
            last[what] = now
            link.send(Progress(done, total, what))

    return tell


def _nothing(done: int, total: int, what: str) -> None:
    """Progress that nobody is shown."""
