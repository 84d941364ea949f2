"""Experts that loop over what was chosen become ``torch_moe`` where, and only where, it computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adkit.models.hf.routed import recognise, routed_forwards

D, FFN, E = 16, 8, 4


class Loop(nn.Module):
    """Goes over the experts that some token chose; those past the last pair of matrices return the token."""

    def __init__(
        self, act: Any = F.silu, transposed: bool = False, gated: bool = True, extra: int = 0
    ) -> None:
        super().__init__()
        self.act, self.transposed, self.gated, self.extra = act, transposed, gated, extra
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            stack = torch.randn(shape, generator=generator)
            return nn.Parameter(stack.transpose(1, 2).contiguous() if transposed else stack)

        self.up = parameter(E + extra, 2 * FFN if gated else FFN, D)
        self.down = parameter(E, D, FFN)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            x = hidden[token]
            if e < E:
                h = x @ self.up[e] if self.transposed else F.linear(x, self.up[e])
                if self.gated:
                    gate, h = h.chunk(2, -1)
                    h = self.act(gate) * h
                else:
                    h = self.act(h)
                x = h @ self.down[e] if self.transposed else F.linear(h, self.down[e])
            out.index_add_(0, token, x * weights[token, slot, None])
        return out


class Doubled(Loop):
    """Weighs twice: what the op does not do."""

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(hidden, ids, weights.square())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("act", "gated"), [(F.silu, True), (F.gelu, True), (F.relu, False)])
@pytest.mark.parametrize("extra", [0, 2])
def test_the_op_takes_the_loops_place(act: Any, gated: bool, transposed: bool, extra: int) -> None:
    loop = Loop(act, transposed, gated, extra).requires_grad_(False)
    [(module, forward)] = routed_forwards(nn.Sequential(loop))
    assert module is loop
    generator = torch.Generator().manual_seed(1)
    hidden, weights = torch.randn(9, D, generator=generator), torch.rand(9, 3, generator=generator)
    ids = torch.randint(E + extra, (9, 3), generator=generator)
    torch.testing.assert_close(
        forward(hidden, ids, weights), loop(hidden, ids, weights), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    "module", [Doubled(), Loop(torch.sin), nn.Bilinear(3, 4, 5)], ids=lambda m: type(m).__name__
)
def test_what_computes_something_else_keeps_its_forward(module: nn.Module) -> None:
    assert not list(routed_forwards(nn.Sequential(module)))


def test_a_model_without_weights_tells_as_much() -> None:
    found = recognise(Loop(extra=2).to("meta"))
    assert found is not None
    assert (found.experts, found.identity, found.gate.act) == (E, True, "silu")
