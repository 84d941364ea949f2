"""Operations over the ranks of a world, written once for real ranks and for virtual ones.

Such an op is a generator: it computes, yields an :class:`Exchange` where the ranks must talk, is sent that
exchange's result, and returns. A real rank answers with its communicator (:func:`use`); :func:`lockstep` drives the
generators of all ranks of one process together and answers from their tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from adkit.contract import Communicator, ShardingError
from adkit.graph.cost import CostFn
from adkit.ops import costs
from adkit.ops.backends import pick
from adkit.ops.norm import fake_add_rms, fake_rmsnorm, normalised
from adkit.ops.registry import define, info_of


@dataclass(frozen=True)
class Exchange:
    """One collective, as one rank enters it; see :class:`~adkit.contract.Communicator`."""

    kind: Literal["all_reduce", "all_gather", "reduce_scatter"]
    tensor: Tensor
    dim: int = 0
    strategy: str = "AUTO"


Steps = Generator[Exchange, Tensor, Any]
_STEPS: dict[str, Callable[..., Steps]] = {}
_COMMUNICATOR: Communicator | None = None


@contextmanager
def use(communicator: Communicator) -> Iterator[None]:
    """Ops over ranks talk through ``communicator`` in the block."""
    global _COMMUNICATOR
    before, _COMMUNICATOR = _COMMUNICATOR, communicator
    try:
        yield
    finally:
        _COMMUNICATOR = before


def connected() -> bool:
    """True where there is a communicator: this process is one of several ranks, and not all of them."""
    return _COMMUNICATOR is not None


def communicator() -> Communicator:
    """The communicator in use; ShardingError without one."""
    if _COMMUNICATOR is None:
        raise ShardingError(
            "this graph is one rank's part and talks to the other ranks, but there are none: wb.shard(...).check() "
            "runs all of them in this process, wb.llm(tp=...) and `adkit run --tp N` on processes of their own"
        )
    return _COMMUNICATOR


def define_over_ranks(
    schema: str,
    *,
    fake: Callable[..., Any],
    cost: CostFn | None = None,
    token_local: bool = True,
    at_once: str = "",
) -> Callable[[Callable[..., Steps]], Callable[..., Steps]]:
    """Decorator: define ``torch.ops.adkit.<name>`` over the ranks by a generator function.

    ``at_once`` names a method of communicators that have kernels for the whole op: it takes the op's arguments and
    gives its result, or None where the op must go step by step after all.
    """

    def add(steps: Callable[..., Steps]) -> Callable[..., Steps]:
        def run(*args: Any, **kwargs: Any) -> Any:
            through = communicator()
            whole = getattr(through, at_once, None) if at_once else None
            result = None if whole is None else whole(*args, **kwargs)
            return _drive(steps(*args, **kwargs), through) if result is None else result

        run.__doc__ = steps.__doc__
        define(schema, category="dist", token_local=token_local, fake=fake, cost=cost)(run)
        _STEPS[schema.split("(", 1)[0]] = steps
        return steps

    return add


def over_ranks(target: Any) -> bool:
    """True for a call target that talks to the other ranks."""
    info = info_of(target)
    return info is not None and info.name in _STEPS


def _drive(steps: Steps, through: Communicator) -> Any:
    try:
        ask = next(steps)
        while True:
            ask = steps.send(_answer(ask, through))
    except StopIteration as done:
        return done.value


def _answer(ask: Exchange, through: Communicator) -> Tensor:
    if ask.kind == "all_reduce":
        return through.all_reduce(ask.tensor, ask.strategy)
    if ask.kind == "all_gather":
        return through.all_gather(ask.tensor, ask.dim, ask.strategy)
    return through.reduce_scatter(ask.tensor, ask.dim, ask.strategy)


def lockstep(
    target: Any,
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    on_exchange: Callable[[list[Exchange]], None] = lambda asked: None,
) -> list[Any]:
    """Run one op over ranks for all of them: ``calls[r]`` are rank r's arguments; a result a rank.

    ``on_exchange`` sees each collective, all ranks' sides of it. Raises ShardingError where the ranks do not
    ask for the same thing: on real ranks they would wait for each other for ever, or add what does not belong together.
    """
    info = info_of(target)
    assert info is not None
    running = [_STEPS[info.name](*args, **kwargs) for args, kwargs in calls]
    results: list[Any] = [None] * len(running)
    answers: list[Any] = [None] * len(running)
    while True:
        asked: list[Exchange] = []
        for rank, steps in enumerate(running):
            try:
                asked.append(steps.send(answers[rank]))
            except StopIteration as done:
                results[rank] = done.value
        if not asked:
            return results
        _agree(info.name, asked, len(running))
        on_exchange(asked)
        answers = exchange(asked)


def _agree(name: str, asked: list[Exchange], ranks: int) -> None:
    # sizes as text: on fake tensors they may be symbols, which have no hash
    sides = {(a.kind, a.dim, str(list(a.tensor.shape)), str(a.tensor.dtype)) for a in asked}
    if len(asked) != ranks or len(sides) > 1:
        seen = "; ".join(f"{k} of {d} {s} on dim {n}" for k, n, s, d in sorted(sides))
        raise ShardingError(
            f"{name}: the ranks do not agree on what to exchange ({len(asked)} of {ranks} ask: {seen})"
        )


def exchange(asked: Sequence[Exchange]) -> list[Tensor]:
    """What each rank gets of one collective, all ranks' sides given. Sums are made in order of rank."""
    first = asked[0]
    if first.kind == "all_gather":
        whole = torch.cat([a.tensor for a in asked], first.dim)
        return [whole] * len(asked)
    total = asked[0].tensor.clone()
    for a in asked[1:]:
        total += a.tensor
    if first.kind == "all_reduce":
        return [total.clone() for _ in asked]
    return [t.contiguous() for t in total.chunk(len(asked), first.dim)]


@define_over_ranks(
    'torch_dist_all_reduce(Tensor x, str strategy="AUTO") -> Tensor',
    fake=lambda x, *_, **__: torch.empty_like(x),
)
def torch_dist_all_reduce(x: Tensor, strategy: str = "AUTO") -> Steps:
    """The sum of every rank's ``x`` [...] -> [...]."""
    return (yield Exchange("all_reduce", x, strategy=strategy))


def _gathered(x: Tensor, dim: int, world: int, *_: Any, **__: Any) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] * world
    return x.new_empty(shape)


@define_over_ranks(
    'torch_dist_all_gather(Tensor x, int dim, int world, str strategy="AUTO") -> Tensor', fake=_gathered
)
def torch_dist_all_gather(x: Tensor, dim: int, world: int, strategy: str = "AUTO") -> Steps:
    """Every rank's ``x`` [..., n, ...] joined on ``dim`` in order of rank -> [..., world * n, ...]."""
    return (yield Exchange("all_gather", x, dim % x.dim(), strategy))


def _scattered(x: Tensor, dim: int, world: int, *_: Any, **__: Any) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] // world
    return x.new_empty(shape)


@define_over_ranks(
    'torch_dist_reduce_scatter(Tensor x, int dim, int world, str strategy="AUTO") -> Tensor', fake=_scattered
)
def torch_dist_reduce_scatter(x: Tensor, dim: int, world: int, strategy: str = "AUTO") -> Steps:
    """The sum of every rank's ``x`` [..., n, ...], of which each keeps its share of ``dim`` [..., n / world, ...]."""
    return (yield Exchange("reduce_scatter", x, dim % x.dim(), strategy))


@define_over_ranks(
    "torch_dist_sharded_rmsnorm(Tensor input, Tensor? weight, float eps, float weight_offset=0.0, "
    'bool weight_in_float=False, *, int world, str strategy="AUTO") -> Tensor',
    fake=lambda input, weight, eps, weight_offset=0.0, weight_in_float=False, **_: fake_rmsnorm(
        input, weight, eps, weight_offset, weight_in_float
    ),
    cost=costs.per_element(4),
)
def torch_dist_sharded_rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    *,
    world: int,
    strategy: str = "AUTO",
) -> Steps:
    """``torch_rmsnorm`` of rows that are cut over the ranks: input [..., D/world], weight [D/world].

    Ranks add up each row's mean square. Where several ranks hold copies of one piece (kv heads fewer than ranks) every
    piece has equally many copies, so the mean is the same.
    """
    total = yield Exchange("all_reduce", input.float().square().mean(-1, keepdim=True), strategy=strategy)
    return normalised(input, total / world, weight, eps, weight_offset, weight_in_float)


@define_over_ranks(
    "torch_dist_allreduce_residual_rmsnorm(Tensor x, Tensor residual, Tensor? weight, float eps, "
    "float weight_offset=0.0, bool weight_in_float=False, ScalarType? out_dtype=None, *, "
    'str strategy="AUTO") -> (Tensor normed, Tensor sum)',
    fake=lambda x, residual, *args, strategy="AUTO", **kwargs: fake_add_rms(x, residual, *args, **kwargs),
    cost=costs.per_element(6),
    at_once="allreduce_residual_rmsnorm",
)
def torch_dist_allreduce_residual_rmsnorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    out_dtype: torch.dtype | None = None,
    *,
    strategy: str = "AUTO",
) -> Steps:
    """``torch_fused_add_rmsnorm`` of the ranks' sum of ``x`` and the residual, which every rank has.

    x and residual [..., D], of which one may be wider, weight [D] or None -> normed [..., D] in ``out_dtype`` where
    that is given, sum [..., D]. The ranks' sum is rounded to x's dtype before the residual is added.
    """
    total = yield Exchange("all_reduce", x, strategy=strategy)
    norm = pick("fused_add_rmsnorm", "auto", x.device)
    return norm(total, residual, weight, eps, weight_offset, weight_in_float, out_dtype)
