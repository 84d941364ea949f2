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
from tests.ops.test_triton import needs_triton

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


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@needs_triton
@pytest.mark.parametrize(
    ("x", "residual", "weight", "in_float", "out_dtype", "taken"),
    [
        (BF16, BF16, BF16, False, None, True),
        (BF16, BF16, F32, False, None, False),  # the normed rows would be float32
        (BF16, BF16, F32, False, BF16, True),
        (BF16, BF16, F32, True, None, True),
        (F32, F32, F32, False, None, True),
        (F32, F32, F32, False, BF16, False),
        (BF16, F32, BF16, False, BF16, True),
        (F16, F32, F32, True, F16, True),
        (F16, F32, None, False, F16, True),
        (BF16, F32, BF16, False, None, False),
        (BF16, F32, BF16, False, F16, False),
        (F32, BF16, F32, False, F32, False),
        (BF16, F16, BF16, False, BF16, False),
    ],
)
def test_the_kernel_with_a_norm_takes_residuals_like_the_message_or_in_float32(
    monkeypatch: pytest.MonkeyPatch,
    x: torch.dtype,
    residual: torch.dtype,
    weight: torch.dtype | None,
    in_float: bool,
    out_dtype: torch.dtype | None,
    taken: bool,
) -> None:
    from adkit.ops.triton import collectives

    def kernel(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(residual)

    def inboxes(site: Site, programs: int, width: int) -> collectives.Inboxes:
        nothing = torch.zeros(1)
        return collectives.Inboxes(site.rank, site.size, nothing, nothing, programs, width)

    monkeypatch.setattr(collectives, "oneshot_all_reduce_residual_rmsnorm", kernel)
    monkeypatch.setattr(strategies.peers, "check", lambda site: None)
    monkeypatch.setattr(strategies.peers, "inboxes", inboxes)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # some builds have none
    tensors = [torch.zeros(4, 64, dtype=x), torch.zeros(4, 64, dtype=residual)]
    norm = None if weight is None else torch.zeros(64, dtype=weight)
    found = Strategies(site()).all_reduce_residual_rmsnorm(
        *tensors, norm, 1e-5, 0.0, in_float, out_dtype, "ONESHOT"
    )
    assert (found is not None) == taken
    if found is not None:  # what the op goes on with must not depend on the way
        want = torch.ops.adkit.torch_fused_add_rmsnorm(*tensors, norm, 1e-5, 0.0, in_float, out_dtype)
        assert [t.dtype for t in found] == [t.dtype for t in want]


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


def test_on_a_cpu_a_wider_residual_is_added_step_by_step(alone: TorchCommunicator) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.randn(8).bfloat16()
    args = (residual, weight, 1e-5, 1.0, False, torch.bfloat16)
    with dist.use(alone):
        got = torch.ops.adkit.torch_dist_allreduce_residual_rmsnorm(x, *args)
    want = torch.ops.adkit.torch_fused_add_rmsnorm(x, *args)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.float32]
    assert all(map(torch.equal, got, want))


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
