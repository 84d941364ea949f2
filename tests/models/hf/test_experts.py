"""Gates are recognised by value; one that is not known is computed as it stands."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adkit.models.hf.experts import ExpertsInterface, Gate, dense_experts, is_experts, recognise_gate
from tests.zoo import rmse_ratio, sensitise, tiny

T, D, FFN, E, K = 11, 6, 5, 4, 2


class Experts(nn.Module):
    """Experts as Hugging Face's decorator leaves them, of any layout."""

    def __init__(
        self, gate: Any, transposed: bool = False, bias: bool = False, gated: bool = True, concat: bool = True
    ) -> None:
        super().__init__()
        width = 2 * FFN if gated else FFN
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = (
            gated,
            bias,
            transposed,
            concat,
        )
        self.limit = 3.0
        self.act_fn = F.silu
        self.gate = gate
        name = "gate_up_proj" if gated else "up_proj"
        setattr(self, name, nn.Parameter(torch.empty((E, D, width) if transposed else (E, width, D))))
        self.down_proj = nn.Parameter(torch.empty((E, FFN, D) if transposed else (E, D, FFN)))
        if bias:
            setattr(self, f"{name}_bias", nn.Parameter(torch.empty(E, width)))
            self.down_proj_bias = nn.Parameter(torch.empty(E, D))
        with torch.no_grad():
            for p in self.parameters():
                p.normal_()

    def _apply_gate(self, x: Tensor) -> Tensor:
        return self.gate(self, x)


def halves(fn: Any) -> Any:
    return lambda self, x: fn(*x.chunk(2, -1))


def clamped(self: Any, x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=self.limit), x[..., 1::2].clamp(-self.limit, self.limit)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def odd(self: Any, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.sin(gate) * up


@pytest.mark.parametrize(
    ("gate", "concat", "expected"),
    [
        (halves(lambda g, u: F.silu(g) * u), True, Gate("silu")),
        (halves(lambda g, u: F.gelu(g) * u), True, Gate("gelu")),
        (halves(lambda g, u: F.gelu(g, approximate="tanh") * u), True, Gate("gelu_tanh")),
        (halves(lambda g, u: F.relu(g).square() * u), True, Gate("relu2")),
        (lambda self, x: F.silu(x[..., ::2]) * x[..., 1::2], False, Gate("silu", interleaved=True)),
        (halves(lambda g, u: F.silu(g.clamp(max=3.0)) * u.clamp(-3.0, 3.0)), True, Gate("silu", limit=3.0)),
        (clamped, False, Gate("silu", interleaved=True, alpha=1.702, limit=3.0, up_offset=1.0)),
        (odd, True, None),
    ],
)
def test_gates(gate: Any, concat: bool, expected: Gate | None) -> None:
    torch.manual_seed(0)
    assert recognise_gate(Experts(gate, concat=concat)) == expected


def one_by_one(module: Any, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Token by token, in float64: ids of E or more are no expert."""
    out = torch.zeros_like(hidden, dtype=torch.float64)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    for t in range(hidden.shape[0]):
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if e >= E:
                continue
            up, down = getattr(module, name)[e].double(), module.down_proj[e].double()
            x = hidden[t].double()
            h = x @ up if module.is_transposed else up @ x
            if module.has_bias:
                h = h + getattr(module, f"{name}_bias")[e]
            h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
            y = h @ down if module.is_transposed else down @ h
            if module.has_bias:
                y = y + module.down_proj_bias[e]
            out[t] += y * weights[t, k].double()
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [halves(lambda g, u: F.silu(g) * u), clamped, odd, None])
def test_every_layout_equals_one_token_at_a_time(gate: Any, bias: bool, transposed: bool) -> None:
    torch.manual_seed(1)
    module = Experts(gate, transposed, bias, gated=gate is not None, concat=gate is not clamped)
    hidden = torch.randn(T, D)
    ids = torch.stack([torch.randperm(E + 1)[:K] for _ in range(T)])
    weights = torch.rand(T, K)
    assert is_experts(module)
    interface = ExpertsInterface(nn.Sequential(module))
    assert bool(interface.notes) is (gate is odd)
    want = one_by_one(module, hidden, ids, weights)
    with torch.no_grad():
        torch.testing.assert_close(
            interface(module, hidden, ids, weights).double(), want, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            dense_experts(module, hidden, ids, weights).double(), want, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
def test_hugging_faces_own_loop_agrees_with_the_dense_form(kind: str) -> None:
    config, model = tiny(kind)
    experts = next(m for m in model.modules() if is_experts(m))
    sensitise(experts)
    hidden = torch.randn(T, config.hidden_size)
    ids = torch.randint(config.num_local_experts, (T, 1))
    weights = torch.rand(T, 1)
    config._experts_implementation = "eager"
    with torch.no_grad():
        want = experts(hidden, ids, weights)
        assert rmse_ratio(dense_experts(experts, hidden, ids, weights), want) < 1e-6


def test_a_gate_that_reads_weights_is_not_recognised_and_does_not_raise() -> None:
    def reads(self: Any, x: Tensor) -> Tensor:
        return x[..., :FFN] * SimpleNamespace().missing  # type: ignore[no-any-return]

    assert recognise_gate(Experts(reads)) is None
