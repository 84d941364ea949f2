"""Each clean-up takes away what computes nothing, leaves what computes something, and changes no result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from adkit.passes.base import Context
from adkit.passes.registry import get_pass


def exported(fn: Callable[..., Tensor], *shape: int, dtype: torch.dtype = torch.float32) -> GraphModule:
    """``fn`` of one tensor with dynamic first dimension, as torch.export captures it."""

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fn(x)

    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(
            Module().eval(),
            (),
            kwargs={"x": torch.randn(*shape).to(dtype)},
            strict=False,
            dynamic_shapes=dynamic,
        )
    return program.module()


def targets(gm: GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def run(key: str, gm: GraphModule) -> int:
    context = Context(factory=None, engine=None, device=torch.device("cpu"))  # type: ignore[arg-type]
    info = get_pass(key)().apply(gm, context)
    gm.graph.lint()
    gm.recompile()
    return info.num_matches


def check(
    key: str,
    fn: Callable[..., Tensor],
    shape: tuple[int, ...],
    count: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    gm = exported(fn, *shape, dtype=dtype)
    before, text = targets(gm), str(gm.graph)
    found = run(key, gm)
    assert found == count
    assert len(targets(gm)) == len(before) - count
    assert found or str(gm.graph) == text
    x = torch.randn(5, *shape[1:]).to(dtype)
    torch.testing.assert_close(gm(x=x), fn(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (lambda x: torch.ops.aten.slice.Tensor(x, 0, 0, 2**63 - 1) + 1, 1),
        (lambda x: torch.ops.aten.slice.Tensor(x) + 1, 1),
        (lambda x: torch.ops.aten.slice.Tensor(x, 1, 0, 4) + 1, 1),  # all four columns
        (lambda x: torch.ops.aten.slice.Tensor(x, 0, 0, x.shape[0]) + 1, 1),
        (lambda x: torch.ops.aten.slice.Tensor(x, 1, 1) + 1, 0),
        (lambda x: torch.ops.aten.slice.Tensor(x, 1, 0, 3) + 1, 0),
        (lambda x: torch.ops.aten.slice.Tensor(x, 1, 0, 4, 2) + 1, 0),
        (lambda x: torch.ops.aten.slice.Tensor(x, 0, 0, 2) + 1, 0),  # some rows of an unknown number
        (lambda x: torch.ops.aten.slice.Tensor(x, 1, None, -1) + 1, 0),
    ],
)
def test_noop_slice(fn: Callable[..., Tensor], count: int) -> None:
    check("cleanup_noop_slice", fn, (3, 4), count)


@pytest.mark.parametrize(
    ("fn", "dtype", "count"),
    [
        (lambda x: (x + 0) * 2, torch.float32, 1),
        (lambda x: (x * 1.0).cos(), torch.float32, 1),
        (lambda x: (x - 0).cos() / 1, torch.float32, 2),
        (lambda x: (x + 1) * 2, torch.float32, 0),
        (lambda x: x * 1.0, torch.int64, 0),  # becomes a float
        (lambda x: 0 + x.cos() * 0, torch.float32, 1),
    ],
)
def test_noop_arithmetic(fn: Callable[..., Tensor], dtype: torch.dtype, count: int) -> None:
    check("cleanup_noop_add", fn, (3, 4), count, dtype)


@pytest.mark.parametrize(
    ("fn", "dtype", "count"),
    [
        (lambda x: x.to(torch.float32).cos(), torch.float32, 1),
        (lambda x: x.to("cpu").cos(), torch.float32, 1),
        (lambda x: x.to(torch.float32).cos(), torch.bfloat16, 0),
        (lambda x: x.to(torch.float32).to(torch.bfloat16), torch.bfloat16, 0),
    ],
)
def test_identity_cast(fn: Callable[..., Tensor], dtype: torch.dtype, count: int) -> None:
    gm = exported(fn, 3, 4, dtype=dtype)
    run("cleanup_input_constraints", gm)
    assert run("cleanup_identity_dtype_cast", gm) == count
    x = torch.randn(5, 4).to(dtype)
    torch.testing.assert_close(gm(x=x), fn(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (lambda x: nn.functional.dropout(x, 0.1, training=False).cos(), 1),
        (lambda x: x.expand(x.shape[0], 4).cos(), 1),
        (lambda x: x.view(-1, 4).cos(), 1),
        (lambda x: x.detach().cos(), 1),
        (lambda x: nn.functional.dropout(x, 0.0, training=True).cos(), 1),
        (lambda x: x.view(-1, 2).cos(), 0),
        (lambda x: x[:, :1].expand(-1, 4).cos(), 0),
    ],
)
def test_noop_call(fn: Callable[..., Tensor], count: int) -> None:
    gm = exported(fn, 3, 4)
    before = len(targets(gm))
    assert run("cleanup_noop_call", gm) == count
    assert len(targets(gm)) == before - count
    x = torch.randn(5, 4)
    torch.testing.assert_close(gm(x=x), fn(x), rtol=0, atol=0)


def test_constraints_go_with_what_only_they_read() -> None:
    def fn(x: Tensor) -> Tensor:
        torch._check(x.shape[0] < 1000)
        return x.to(torch.float32).cos()

    gm = exported(fn, 3, 4)
    assert run("cleanup_input_constraints", gm) > 0
    assert not [n for n in gm.graph.nodes if n.op == "call_module"]
    assert targets(gm) == [torch.ops.aten.to.dtype, torch.ops.aten.cos.default]
    assert run("cleanup_input_constraints", gm) == 0


def test_a_chain_of_noops_goes_in_one_run() -> None:
    gm = exported(lambda x: x[:, 0:][:, 0:][0:][:, :, None].cos(), 3, 4)
    run("cleanup_noop_slice", gm)
    assert targets(gm) == [torch.ops.aten.unsqueeze.default, torch.ops.aten.cos.default]


def test_a_copy_that_someone_writes_to_stays() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 1.0
        y[:, :2] = 7.0
        z = x.clone()
        z[:, 0].add_(1)
        return y + z + x

    gm = exported(fn, 3, 4)
    assert run("cleanup_noop_add", gm) == 0
    run("cleanup_noop_call", gm)
    assert torch.ops.aten.clone.default in targets(gm)
    x = torch.randn(5, 4)
    torch.testing.assert_close(gm(x=x.clone()), fn(x.clone()), rtol=0, atol=0)


def test_a_copy_of_what_is_overwritten_later_stays() -> None:
    def fn(x: Tensor) -> Tensor:
        base = x.cos()
        before = base[:, 1:] * 1
        base[:, 2] = 0.0
        return before + base[:, 1:]

    gm = exported(fn, 3, 4)
    assert run("cleanup_noop_add", gm) == 0
    x = torch.randn(5, 4)
    torch.testing.assert_close(gm(x=x), fn(x), rtol=0, atol=0)


def test_a_copy_asked_for_by_a_cast_stays_where_one_of_the_two_is_written() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x.to(torch.float32, copy=True)
        y[:, 0] = 0
        return x + y

    gm = exported(forward, 3, 4)
    x = torch.randn(3, 4)
    assert run("cleanup_identity_dtype_cast", gm) == 0
    assert torch.equal(gm(x=x.clone()), forward(x))
