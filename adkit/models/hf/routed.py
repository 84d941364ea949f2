"""Experts that do not go through Hugging Face's interface: modules that loop over what the router chose.

Such a loop cannot be exported, since how often it runs depends on the tokens. A module that holds two
stacks of matrices and takes tokens, ids and weights is tried out instead: a small copy of it runs on random
numbers, and where ``torch_moe`` gives the same, the op takes its place in the graph. LongCat-Flash's
experts, the last of which return the token as it is (arXiv 2509.01322), are of this kind.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adkit.models.hf.experts import Gate, gate_by_value, is_experts

_F, _TOKENS, _CHOICES = 6, 24, 3  # sizes of a trial


@dataclass(frozen=True)
class Routed:
    """How a module's experts are written with ``torch_moe``.

    ``up`` and ``down`` are names of its parameters; ids from ``experts`` on stand for no expert, or with
    ``identity`` for one that returns the token.
    """

    up: str
    down: str
    experts: int
    gate: Gate
    gated: bool
    transposed: bool
    identity: bool

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """hidden [T, D], ids and weights [T, k], stacks of matrices -> [T, D]."""
        out: Tensor = torch.ops.adkit.torch_moe(
            hidden,
            ids,
            weights,
            up[: self.experts] if up.shape[0] > self.experts else up,
            down,
            act=self.gate.act,
            transposed=self.transposed,
            interleaved=self.gate.interleaved,
            gated=self.gated,
            alpha=self.gate.alpha,
            limit=self.gate.limit,
            up_offset=self.gate.up_offset,
        )
        if self.identity:
            kept = torch.where(ids >= self.experts, weights, 0.0).sum(-1, keepdim=True)
            out = out + (hidden * kept).to(hidden.dtype)
        return out


def routed_forwards(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Modules of the model that ``torch_moe`` can stand for, each with the forward that calls it."""
    known: dict[Any, Routed | None] = {}
    for module in model.modules():
        if is_experts(module) or not _may_be_routed(module):
            continue
        numbers = tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, int | float)))
        key = (type(module), numbers, tuple(p.shape for p in module.parameters()))
        if key not in known:
            known[key] = recognise(module)
        found = known[key]
        if found is not None:
            yield module, _forward(module, found)


def _forward(module: nn.Module, found: Routed) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return found(hidden, ids, weights, getattr(module, found.up), getattr(module, found.down))

    return forward


def _may_be_routed(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    if [p.dim() for p in parameters] != [3, 3] or len(list(module.parameters(recurse=False))) != 2:
        return False
    return len(inspect.signature(module.forward).parameters) == 3


def recognise(module: nn.Module) -> Routed | None:
    """How ``torch_moe`` computes a module of two stacked parameters; None when no way of it is known."""
    (up, a), (down, b) = module.named_parameters()
    for transposed in (False, True):
        (d, f), (w, into) = (b.shape[1:], a.shape[1:]) if not transposed else (b.shape[:0:-1], a.shape[:0:-1])
        if into != d or w not in (f, 2 * f):
            continue
        trial = _Trial(module, up, down, a.shape[0], b.shape[0], w == 2 * f, transposed)
        try:
            gate = trial.gate()
            if gate is None:
                continue
            for identity in (False, True):
                found = Routed(up, down, b.shape[0], gate, w == 2 * f, transposed, identity)
                if trial.agrees(found):
                    return found
        except Exception:  # a module that cannot run on its own, or wants other arguments
            continue
    return None


@dataclass(frozen=True)
class _Trial:
    """A copy of ``module`` with small matrices."""

    module: nn.Module
    up: str
    down: str
    ups: int
    downs: int
    gated: bool
    transposed: bool

    def gate(self) -> Gate | None:
        """What lies between the products: they are made to pass everything on."""
        width = 2 * _F if self.gated else _F
        up, down = torch.eye(width), torch.eye(width, _F)
        stacks = up.expand(self.ups, -1, -1), down.expand(self.downs, -1, -1)
        numbers = [v for v in vars(self.module).values() if isinstance(v, int | float)]

        def run(x: Tensor) -> Tensor:
            ids = torch.zeros(len(x), 2, dtype=torch.long)  # some loops fail on one choice a token
            return self._run(x, ids, torch.tensor([1.0, 0.0]).expand(len(x), 2), *stacks)[:, :_F]

        return gate_by_value(run, width, gated=self.gated, numbers=numbers)

    def agrees(self, found: Routed) -> bool:
        """Whether ``found`` gives what the module gives, for every id that either has a matrix for."""
        generator = torch.Generator().manual_seed(0)
        width, d = 2 * _F if self.gated else _F, _F + 4
        up = torch.randn(self.ups, width, d, generator=generator)
        down = torch.randn(self.downs, d, _F, generator=generator)
        rows = max(_TOKENS, -(-self.ups // _CHOICES))
        ids = torch.arange(rows * _CHOICES).remainder(max(self.ups, self.downs)).view(rows, _CHOICES)
        hidden = torch.randn(rows, d, generator=generator)
        weights = torch.rand(rows, _CHOICES, generator=generator)
        want = self._run(hidden, ids, weights, up, down)
        got = found(hidden, ids, weights, *(self._laid(t) for t in (up, down)))
        return want.shape == got.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-4)

    def _laid(self, stack: Tensor) -> Tensor:
        return stack.transpose(1, 2).contiguous() if self.transposed else stack

    def _run(self, hidden: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        twin = copy.copy(self.module)
        stacks = {self.up: up, self.down: down}
        twin.__dict__["_parameters"] = {
            n: nn.Parameter(self._laid(stacks[n]), requires_grad=False) for n in self.module._parameters
        }
        with torch.no_grad():
            return twin(hidden.clone(), ids, weights)
