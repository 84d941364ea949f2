"""Ranks as actors of a Ray cluster: on several hosts, or where a cluster is what there is.

The same worker does the same job; only who starts it and who says how it ended differ. The engine's process listens on
the address that Ray knows this host by, and lets in who was given its token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

from adkit.contract import CompiledModel, DistConfig, ShardingError
from adkit.runtime.ranks.crew import Crew
from adkit.runtime.ranks.devices import Elsewhere, outline
from adkit.runtime.ranks.link import Door, Link, knock
from adkit.runtime.ranks.meeting import open_store
from adkit.runtime.ranks.messages import Job
from adkit.runtime.ranks.start import MEET_SECONDS, STEP_SECONDS
from adkit.runtime.ranks.worker import work

_PLACE_SECONDS = 180.0  # for Ray to find room, and to start a process that imports torch
_LOOK_SECONDS = 2.0


def start_actors(
    builder: str,
    options: dict[str, Any],
    dist: DistConfig,
    *,
    device: str = "auto",
    port: int = 0,
    timeout: float = STEP_SECONDS,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[CompiledModel, Elsewhere]:
    """As :func:`~adkit.runtime.ranks.start_processes`, on the Ray cluster this process is connected to.

    Without one it connects to what ``RAY_ADDRESS`` says, or starts Ray on this host until the ranks are closed. Ranks
    are packed on as few hosts as have room; adkit must be installed on all. Raises ShardingError when Ray is missing or
    has too few devices.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    undo: list[Callable[[], object]] = [ray.shutdown] if ours else []
    try:
        return _start(ray, undo, builder, options, dist, device, port, timeout, progress)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _start(
    ray: Any,
    undo: list[Callable[[], object]],
    builder: str,
    options: dict[str, Any],
    dist: DistConfig,
    device: str,
    port: int,
    timeout: float,
    progress: Callable[[int, int, str], None],
) -> tuple[CompiledModel, Elsewhere]:
    size = dist.world_size
    here = ray.util.get_node_ip_address()
    place, needs = _place(size, device, ray.cluster_resources())
    group = ray.util.placement_group([needs] * size, strategy="PACK")
    undo.append(lambda: ray.util.remove_placement_group(group))
    if not group.wait(_PLACE_SECONDS):
        raise ShardingError(f"Ray has found no room for {size} ranks that each need {needs}")
    store = open_store(here, port, MEET_SECONDS)
    door = Door(here)
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group)
    actor = ray.remote(_Actor).options(
        num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), scheduling_strategy=strategy
    )
    handles = [actor.remote() for _ in range(size)]
    futures = [h.work.remote(door.address, door.token, rank) for rank, h in enumerate(handles)]
    members = []
    for _ in range(size):
        link = _let_in(ray, door, futures, timeout)
        rank = link.receive()
        link.send(Job(dist.at(rank), place, (here, store.port), builder, options, MEET_SECONDS))
        members.append(_Member(ray, rank, link, handles[rank], futures[rank]))
    door.close()
    ends = list(reversed(undo))
    undo.clear()  # from here on the crew does it
    crew = Crew(sorted(members, key=lambda m: m.rank), size, timeout, lambda: [step() for step in ends])
    crew.store = store
    return outline(crew.wait_until_ready(progress)), Elsewhere(crew)


def _let_in(ray: Any, door: Door, futures: list[Any], timeout: float) -> Link:
    """The next rank to come; ShardingError when one has ended instead, or none comes."""
    limit = time.monotonic() + _PLACE_SECONDS
    while time.monotonic() < limit:
        try:
            link = door.let_in(_LOOK_SECONDS)
        except TimeoutError:
            ended, _ = ray.wait(futures, timeout=0)
            if ended:
                raise ShardingError(f"a rank that Ray was to start {_story(ray, ended[0])}") from None
        else:
            link.settimeout(timeout)
            return link
    raise ShardingError(f"a rank did not come within {_PLACE_SECONDS:g} s of being started by Ray")


class _Actor:
    """What Ray starts: a worker whose parent is elsewhere."""

    def work(self, address: tuple[str, int], token: bytes, rank: int) -> int:
        """Do the job that the engine's process has for this rank; its exit status."""
        link = knock(address, token, _PLACE_SECONDS)
        link.send(rank)
        return work(link)


class _Member:
    """A :class:`~adkit.runtime.ranks.processes.Member` that is an actor."""

    def __init__(self, ray: Any, rank: int, link: Link, handle: Any, future: Any) -> None:
        self.rank = rank
        self.link = link
        self._ray, self._handle, self._future = ray, handle, future

    def how_it_ended(self, seconds: float) -> str:
        """What Ray says of it."""
        ended, _ = self._ray.wait([self._future], timeout=seconds)
        return _story(self._ray, self._future) if ended else ""

    def log(self) -> str:
        """Nothing: Ray keeps the logs, on the host where it ran."""
        return ""

    def where(self) -> str:
        """Not known."""
        return ""

    def kill(self) -> None:
        """End it now."""
        self._ray.kill(self._handle)


def _story(ray: Any, future: Any) -> str:
    try:
        return f"ended with status {ray.get(future)}"
    except ray.exceptions.RayError as error:
        return f"was lost: {str(error).strip().splitlines()[0]}"


def _place(size: int, device: str, has: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Each rank's device as it sees it, and what it needs of the cluster."""
    gpus = int(has.get("GPU", 0))
    if device == "cpu" or (device == "auto" and not gpus):
        if has.get("CPU", 0) < size:
            raise ShardingError(
                f"{size} ranks need a CPU each and the Ray cluster has {has.get('CPU', 0):g}; lower tp"
            )
        return "cpu", {"CPU": 1}
    if gpus < size:
        raise ShardingError(
            f"{size} ranks need {size} GPUs and the Ray cluster has {gpus}; lower tp, or use device='cpu' to try it out"
        )
    return "cuda:0", {"CPU": 1, "GPU": 1}  # Ray shows each actor no other


def _ray() -> Any:
    try:
        ray = import_module("ray")
        import_module("ray.util.scheduling_strategies")
    except ImportError as error:
        raise ShardingError(
            f"executor='ray' needs Ray, which cannot be imported ({error}); install it with: pip install 'adkit[ray]'"
        ) from None
    return ray
