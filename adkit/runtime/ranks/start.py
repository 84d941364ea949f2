"""Starting ranks: all of them beside this process, or with this process among them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist

from adkit.contract import CompiledModel, DistConfig, ShardingError
from adkit.ops import dist as over_ranks
from adkit.runtime.ranks.communicator import TorchCommunicator
from adkit.runtime.ranks.crew import Crew
from adkit.runtime.ranks.devices import Elsewhere, Here, outline
from adkit.runtime.ranks.link import Door, Link, knock
from adkit.runtime.ranks.meeting import (
    LOOPBACK,
    check_devices,
    join,
    open_store,
    quiet_interfaces,
)
from adkit.runtime.ranks.messages import Job
from adkit.runtime.ranks.processes import Child, Peer
from adkit.runtime.ranks.rank import Rank, serve
from adkit.runtime.ranks.worker import builder_of, failure

#: Seconds that ranks wait for each other while they are built: one may be compiling kernels, or have the slower disk.
MEET_SECONDS = 1800.0
#: Seconds after which a step counts as stuck.
STEP_SECONDS = 300.0
_KNOCK_SECONDS = 60.0
_DOOR = "adkit/door"

ShowProgress = Callable[[int, int, str], None]


def start_processes(
    builder: str,
    options: dict[str, Any],
    dist: DistConfig,
    *,
    device: str = "auto",
    port: int = 0,
    timeout: float = STEP_SECONDS,
    progress: ShowProgress = lambda done, total, what: None,
) -> tuple[CompiledModel, Elsewhere]:
    """A process a rank of ``dist``, each with what ``builder`` (see :class:`Job`) makes of ``options``.

    Returns once all are built: the model as an engine sees it, and the ranks as the engine's device. They listen on
    127.0.0.1 alone, meet on ``port`` (0: a free one), and end with this process, however it ends. ``progress`` is rank
    0's. Raises ShardingError when there are not enough devices or the port is taken, the error of a rank that
    could not be built, RankError where a rank ended without one.
    """
    devices = check_devices(dist.world_size, device)
    store = open_store(LOOPBACK, port, MEET_SECONDS)
    jobs = [
        Job(dist.at(rank), place, (LOOPBACK, store.port), builder, options, MEET_SECONDS)
        for rank, place in enumerate(devices)
    ]
    crew = _children(jobs, timeout)
    crew.store = store  # libraries look into it now and then, as long as they live
    return outline(crew.wait_until_ready(progress)), Elsewhere(crew)


def _children(jobs: list[Job], timeout: float) -> Crew:
    size = jobs[0].dist.world_size
    children: list[Child] = []
    try:
        for job in jobs:
            children.append(Child(job, size, quiet_interfaces(LOOPBACK), timeout))
        return Crew(children, size, timeout)
    except BaseException:
        for child in children:
            child.kill()
        raise


@dataclass
class Program:
    """This process as one rank of ``dist``, on ``device``, while it is in a block of :func:`program`.

    A rank other than 0 has done all its work when it gets one.
    """

    dist: DistConfig
    device: str
    _communicator: TorchCommunicator
    _crew: Crew | None = None
    _rank: Rank | None = None

    def _close(self) -> None:
        if self._crew is not None:
            self._crew.close()
        if self._communicator.device.type == "cuda":
            # NCCL's clean-up would wait for ranks that have ended and for graphs that were captured with it.
            _KEPT.append(self)
        else:
            torch_dist.destroy_process_group()

    def lead(self, model: CompiledModel) -> Here:
        """Rank 0's ``model`` and those of the other ranks as an engine's device, once all are built."""
        assert self._crew is not None, "rank 0 leads"
        rank = Rank(model, self._communicator)
        self._crew.wait_until_ready(here=rank.ready())
        self._rank = rank
        return Here(rank, self._crew)


@dataclass
class _Follower(Program):
    """A rank other than 0 that torchrun started; ``link`` leads to rank 0."""

    link: Link | None = None

    def follow(self, builder: str, options: dict[str, Any]) -> None:
        """Build this rank's part and run steps until rank 0 says that it is over."""
        assert self.link is not None
        try:
            model = builder_of(builder)(
                dist=self.dist, device=self.device, progress=lambda done, total, what: None, **options
            )
            rank = Rank(model, self._communicator)
            self.link.send(rank.ready())
            serve(rank, self.link)
        except EOFError:
            os._exit(1)  # rank 0 is gone, and has told why
        except BaseException as error:
            self.link.send(failure(self.dist.rank, error))
            raise


_PROGRAM: Program | None = None
_KEPT: list[Program] = []  # ranks on GPUs that have done their work


def current_program() -> Program | None:
    """The program this process is a rank of, if it is one of several."""
    return _PROGRAM


def launched_ranks() -> int | None:
    """How many ranks torchrun started, if it started this process."""
    return int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= set(os.environ) else None


@contextmanager
def program(
    builder: str, options: dict[str, Any], dist: DistConfig, *, device: str = "auto"
) -> Iterator[Program]:
    """This process as a rank: rank 0 of processes started for the others, or the rank that torchrun made it.

    Rank 0 goes on in the block, with a communicator in use. Another rank builds what ``builder`` makes of ``options``
    and serves until rank 0 has left its block; it enters its own with nothing left to do. A rank that fails ends this
    process with its story on stderr. Raises ShardingError when torchrun started another number of ranks than
    ``dist`` has, and as :func:`start_processes` does.
    """
    global _PROGRAM
    launched = launched_ranks()
    if launched is not None and launched != dist.world_size:
        raise ShardingError(
            f"torchrun started {launched} ranks, but tp is {dist.world_size}; give both the same number, or no tp"
        )
    made = _as_launched(dist, device) if launched is not None else _as_parent(builder, options, dist, device)
    try:
        with over_ranks.use(made._communicator):
            if isinstance(made, _Follower):
                made.follow(builder, options)
            _PROGRAM = made
            yield made
    finally:
        _PROGRAM = None
        made._close()


def _as_parent(builder: str, options: dict[str, Any], dist: DistConfig, device: str) -> Program:
    """Rank 0, whose children are the others."""
    devices = check_devices(dist.world_size, device)
    store = open_store(LOOPBACK, 0, MEET_SECONDS)
    address = (LOOPBACK, store.port)
    jobs = [
        Job(dist.at(rank), place, address, builder, options, MEET_SECONDS)
        for rank, place in enumerate(devices)
    ]
    crew = _children(jobs[1:], STEP_SECONDS)
    crew.store = store
    crew.watch(_give_up)
    os.environ.update(quiet_interfaces(LOOPBACK))
    communicator = join(store, 0, dist.world_size, torch.device(devices[0]), MEET_SECONDS)
    return Program(dist.at(0), devices[0], communicator, crew)


def _as_launched(dist: DistConfig, device: str) -> Program:
    """The rank that torchrun's environment says."""
    here, on_host = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    place = check_devices(on_host, device)[here]
    store, rank, size = next(torch_dist.rendezvous("env://", timeout=timedelta(seconds=MEET_SECONDS)))
    communicator = join(store, rank, size, torch.device(place), MEET_SECONDS)
    if rank:
        address, token = json.loads(store.get(_DOOR))
        link = knock((address[0], address[1]), bytes.fromhex(token), _KNOCK_SECONDS)
        link.send(rank)
        return _Follower(dist.at(rank), place, communicator, link=link)
    door = Door(os.environ.get("MASTER_ADDR", LOOPBACK))
    store.set(_DOOR, json.dumps([door.address, door.token.hex()]))
    links = [door.let_in(_KNOCK_SECONDS) for _ in range(size - 1)]
    door.close()
    crew = Crew([Peer(link.receive(), link) for link in links], size, STEP_SECONDS)
    crew.watch(_give_up)
    return Program(dist.at(0), place, communicator, crew)


def leave(status: int) -> None:
    """End a command's process at once, if it was a rank on a GPU: clean-up would never end."""
    if _KEPT:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _give_up(error: Exception) -> None:
    """A rank is lost, and the main thread may wait for it where no exception can reach it."""
    print(f"adkit: {error}", file=sys.stderr, flush=True)
    os._exit(1)
