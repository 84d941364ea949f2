"""Starting ranks on this host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adkit.contract import CompiledModel, DistConfig
from adkit.runtime.ranks.crew import Crew
from adkit.runtime.ranks.meeting import LOOPBACK, check_devices, open_store, quiet_interfaces
from adkit.runtime.ranks.messages import Job
from adkit.runtime.ranks.processes import Child

#: Seconds that ranks wait for each other while they are built: one may be compiling kernels, or have the slower disk.
MEET_SECONDS = 1800.0
#: Seconds after which a step counts as stuck.
STEP_SECONDS = 300.0


def start_processes(
    builder: str,
    options: dict[str, Any],
    dist: DistConfig,
    *,
    device: str = "auto",
    port: int = 0,
    timeout: float = STEP_SECONDS,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[CompiledModel, Crew]:
    """A process a rank of ``dist``, each with what ``builder`` (see :class:`Job`) makes of ``options``.

    Returns once all are built: the model as an engine sees it, and the ranks as the engine's device. They listen on
    127.0.0.1 alone, meet on ``port`` (0: a free one), and end with this process, however it ends. ``progress`` is rank
    0's. Raises ShardingError when there are not enough devices or the port is taken, the error of a rank that
    could not be built, RankError where a rank ended without one.
    """
    devices = check_devices(dist.world_size, device)
    store = open_store(LOOPBACK, port, MEET_SECONDS)
    environment = quiet_interfaces(LOOPBACK)
    children: list[Child] = []
    try:
        for rank, place in enumerate(devices):
            job = Job(dist.at(rank), place, (LOOPBACK, store.port), builder, options, MEET_SECONDS)
            children.append(Child(job, dist.world_size, environment, timeout))
        crew = Crew(children, timeout)
    except BaseException:
        for child in children:
            child.kill()
        raise
    model = crew.wait_until_ready(progress)
    del store  # all have met
    return model, crew
