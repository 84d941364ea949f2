"""What goes wrong with ranks: one clear error each, nothing that hangs, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from adkit.contract import DistConfig, EngineError, RankError, SamplingParams, ShardingError
from adkit.runtime import LiveModel
from adkit.runtime.ranks import meeting, start, start_processes
from adkit.runtime.ranks.link import Door, knock
from tests.forked_ranks import gone
from tests.runtime.ranks import conftest
from tests.runtime.ranks.conftest import engine_of

LONG = SamplingParams(max_tokens=50, ignore_eos=True)


@pytest.fixture
def children(monkeypatch) -> list[int]:
    """Process ids of the ranks that are started."""
    pids: list[int] = []

    class Noted(start.Child):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pids.append(self.pid)

    monkeypatch.setattr(start, "Child", Noted)
    return pids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_while_it_is_built_ends_the_others(children, rank):
    with pytest.raises(RankError, match="bad luck") as caught:
        conftest.start(fault=(rank, "raise", 0))
    text = str(caught.value)
    assert caught.value.rank == rank
    assert f"rank {rank} of 2 failed: ValueError: bad luck" in text
    assert "toy.py" in text  # the traceback
    assert f"[rank {rank}] rank {rank} says hello" in text  # the log
    assert len(children) == 2
    assert gone(children)


def test_an_error_of_adkits_own_comes_as_it_is(children):
    with pytest.raises(ShardingError, match=r"^3 heads cannot be cut over 2 ranks$"):
        conftest.start(fault=(1, "refuse", 0))
    assert gone(children)


def test_a_rank_that_dies_while_it_is_built(children):
    with pytest.raises(RankError, match=r"rank 1 of 2 was killed by signal 9 \(SIGKILL"):
        conftest.start(fault=(1, "die", 0))
    assert gone(children)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_fails_the_call_at_once_and_every_later_one(children, rank):
    world = conftest.start()
    live = LiveModel(world[0], engine_of(world, overlap=True).config, device=world[1])
    stream = live.stream([[1, 2], [3, 4]], LONG)
    next(stream)
    os.kill(children[rank], signal.SIGKILL)
    with pytest.raises(EngineError, match=rf"rank {rank} of 2 was killed by signal 9"):
        list(stream)  # not by its timeout, which would say something else
    assert gone(children)
    with pytest.raises(EngineError, match=r"the ranks have ended: rank . of 2 was killed"):
        live.generate([1, 2], LONG, progress=False)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_in_a_step_is_the_one_to_blame(children, rank):
    """The other one loses its peer and says so too, perhaps sooner."""
    world = conftest.start(fault=(rank, "raise", 4))
    live = LiveModel(world[0], engine_of(world).config, device=world[1])
    with pytest.raises(RankError) as caught:
        live.generate([[1, 2], [3, 4]], LONG, progress=False)
    assert f"rank {rank} of 2 failed: ValueError: bad luck" in str(caught.value)
    assert 'raise ValueError("bad luck")' in str(caught.value)
    assert gone(children)


def test_a_rank_that_is_stopped_or_stuck_is_found_out(children, real):
    world = conftest.start(fault=(1, "stop", 3), timeout=5)
    live = LiveModel(world[0], engine_of(world).config, device=world[1])
    with pytest.raises(RankError, match=r"a step has not ended within 5 s") as caught:
        live.generate([1, 2], LONG, progress=False)
    assert caught.value.rank == 1
    assert "[rank 1] it is stopped (SIGSTOP)" in str(caught.value)
    assert "in all_reduce" in str(caught.value)  # where rank 0 waits for it
    assert gone(children)


def test_ranks_end_with_their_parent_however_it_ends():
    program = (
        "import os, signal\nfrom tests.runtime.ranks.conftest import start\n"
        "_, device = start()\nprint(*[m.pid for m in device.crew.members.values()], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pids = [int(p) for p in done.stdout.split()]
    assert len(pids) == 2
    assert gone(pids)


@pytest.mark.slow
def test_a_program_that_ends_without_closing_leaves_nothing():
    program = (
        "from tests.runtime.ranks.conftest import start\n"
        "_, device = start()\nprint(*[m.pid for m in device.crew.members.values()], flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert gone([int(p) for p in done.stdout.split()])


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ShardingError, match=rf"port {port} of 127.0.0.1 cannot be had \(Address already in"
        ):
            start_processes("nothing:at_all", {}, DistConfig.of(tp=2), device="cpu", port=port)


def test_more_ranks_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ShardingError, match=r"2 ranks need 2 GPUs and torch sees 1; lower tp"):
        start_processes("nothing:at_all", {}, DistConfig.of(tp=2), device="auto")
    with pytest.raises(ShardingError, match="device is 'cuda:0', but 2 ranks need one device each"):
        meeting.check_devices(2, "cuda:0")
    assert meeting.check_devices(2, "cuda", 4) == ["cuda:0", "cuda:1"]
    assert meeting.check_devices(2, "auto", 0) == ["cpu", "cpu"]


def test_nccl_is_missing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ShardingError, match="has no NCCL"):
        meeting.join(None, 0, 2, torch.device("cuda:0"), 1)


def test_only_who_knows_the_token_comes_in():
    door = Door()
    with socket.create_connection(door.address) as stranger:
        stranger.sendall(b"x" * 32)
        link = knock(door.address, door.token, 60)
        inside = door.let_in(60)
        link.send("hello")
        assert inside.receive() == "hello"
        assert stranger.recv(1) == b""
    link.close()
    with pytest.raises(EOFError):
        inside.receive()
    door.close()
