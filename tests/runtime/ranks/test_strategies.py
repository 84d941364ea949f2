"""Which strategy adds up what, and what stands in where one cannot be had."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.distributed as torch_dist
from torch import Tensor

from adkit.contract.dist import AllReduceStrategy
from adkit.ops import dist
from adkit.runtime.ranks import strategies
from adkit.runtime.ranks.communicator import TorchCommunicator
from adkit.runtime.ranks.peers import Unavailable
from adkit.runtime.ranks.strategies import Site, Strategies, automatic

KB, MB = 1 << 10, 1 << 20
MOST = {"ONESHOT": MB, "TWOSHOT": 64 * MB, "NCCL": 1 << 40}


class Known:
    """A strategy that adds nothing up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[torch.dtype] = []

    def refuses(self, x: Tensor) -> str:
        return "too long" if x.nbytes > MOST[self.name] else ""

    def all_reduce(self, x: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return x.clone()


def known(monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...] = ()) -> dict[str, Known]:
    made = {name: Known(name) for name in MOST}

    def maker(name: str) -> Any:
        def make(site: Site) -> Known:
            if name in missing:
                raise Unavailable("no link between the devices")
            return made[name]

        return make

    monkeypatch.setattr(strategies, "MAKERS", {name: maker(name) for name in MOST})
    return made


def site(size: int = 2, device: str = "cuda") -> Site:
    return Site(None, 0, size, torch.device(device))  # type: ignore[arg-type]


def message(nbytes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(nbytes // dtype.itemsize, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("name", "nbytes", "taken"),
    [
        ("AUTO", 8 * KB, "ONESHOT"),
        ("AUTO", 2 * MB, "TWOSHOT"),
        ("AUTO", 128 * MB, "NCCL"),
        ("NCCL", 8 * KB, "NCCL"),
        ("ONESHOT", 8 * KB, "ONESHOT"),
        ("ONESHOT", 2 * MB, "NCCL"),
        ("TWOSHOT", 8 * KB, "TWOSHOT"),
        ("TWOSHOT", 128 * MB, "NCCL"),
        ("MIN_LATENCY", MB, "ONESHOT"),
        ("MIN_LATENCY", 2 * MB, "TWOSHOT"),
        ("MIN_LATENCY", 128 * MB, "NCCL"),
        ("LOWPRECISION", 8 * KB, "ONESHOT"),
    ],
)
def test_a_name_and_a_size_decide(
    monkeypatch: pytest.MonkeyPatch, recwarn: Any, name: str, nbytes: int, taken: str
) -> None:
    made = known(monkeypatch)
    assert Strategies(site()).choose(message(nbytes), name) is made[taken]
    assert not recwarn.list


@pytest.mark.parametrize("name", ["UB", "MNNVL", "NCCL_SYMMETRIC"])
def test_what_is_not_there_is_auto_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, recwarn: Any, name: str
) -> None:
    made = known(monkeypatch)
    world = Strategies(site())
    for _ in range(2):
        assert world.choose(message(8 * KB), name) is made["ONESHOT"]
    assert [str(w.message).split(":")[0] for w in recwarn.list] == [f"all-reduce strategy {name}"]
    assert list(world.fallen) == [name]


def test_without_a_link_the_library_does_it_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    made = known(monkeypatch, missing=("ONESHOT", "TWOSHOT"))
    world = Strategies(site())
    for _ in range(2):
        assert world.choose(message(8 * KB), "AUTO") is made["NCCL"]
    assert [str(w.message) for w in recwarn.list] == [
        "all-reduce strategy ONESHOT: no link between the devices; NCCL instead"
    ]


def test_low_precision_sends_float32_as_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    made = known(monkeypatch)
    world = Strategies(site())
    for dtype in (torch.float32, torch.float16):
        assert world.all_reduce(message(8 * KB, dtype), "LOWPRECISION").dtype == dtype
    assert made["ONESHOT"].seen == [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_automatic_goes_from_one_shot_to_the_library_as_messages_grow(ranks: int) -> None:
    order = [(automatic(1 << n, ranks) or ("NCCL",))[0] for n in range(10, 28)]
    ranking = ["ONESHOT", "TWOSHOT", "NCCL"]
    assert order == sorted(order, key=ranking.index)
    assert order[0] == "ONESHOT"
    assert order[-1] == "NCCL"


@pytest.fixture
def alone(tmp_path: Any) -> Any:
    store = torch_dist.FileStore(str(tmp_path / "store"), 1)
    torch_dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield TorchCommunicator(torch_dist.group.WORLD, torch.device("cpu"))
    finally:
        torch_dist.destroy_process_group()


def test_on_a_cpu_every_name_adds_up_and_leaves_its_operand(alone: TorchCommunicator, recwarn: Any) -> None:
    x = torch.arange(32.0).view(4, 8)  # LOWPRECISION holds these, too
    with dist.use(alone):
        for name in get_args(AllReduceStrategy):
            got = torch.ops.adkit.torch_dist_all_reduce(x, name)
            assert torch.equal(got, x)
            assert got.data_ptr() != x.data_ptr()
    assert {str(w.message).split()[2].rstrip(":") for w in recwarn.list} == {
        "UB", "MNNVL", "NCCL_SYMMETRIC", "ONESHOT", "TWOSHOT",
    }  # fmt: skip
