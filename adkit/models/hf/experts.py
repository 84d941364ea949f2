"""Hugging Face's experts interface, answered with ``torch.ops.adkit.torch_moe``.

An experts module says how its weights lie (``is_transposed``, ``is_concatenated``, ``has_bias``,
``has_gate``) and brings its gate as code (``_apply_gate``). The gate is recognised by its values on random
inputs; one that is not recognised is traced as it stands over every expert: right, and as slow as dense.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adkit.ops.activation import ACTIVATIONS
from adkit.ops.moe import gate_fn


@dataclass(frozen=True)
class Gate:
    """Arguments of ``torch_moe`` that say what happens between an expert's two projections."""

    act: str = "silu"
    interleaved: bool = False
    alpha: float | None = None
    limit: float | None = None
    up_offset: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        """The arguments, those with their default value left out."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}


def is_experts(module: nn.Module) -> bool:
    """Whether the module goes through Hugging Face's experts interface."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))


def recognise_gate(module: nn.Module) -> Gate | None:
    """The gate of an experts module, by value on random float32 inputs; None for an unknown one."""
    numbers = [v for v in vars(module).values() if isinstance(v, float | int)]
    concatenated = getattr(module, "is_concatenated", True)
    if not module.has_gate:
        return gate_by_value(module.act_fn, 64, gated=False)  # type: ignore[arg-type]
    return gate_by_value(
        module._apply_gate,  # type: ignore[arg-type]
        2 * _ffn_dim(module),
        numbers=numbers,
        concatenated=concatenated,
    )


def gate_by_value(
    gate: Callable[[Tensor], Tensor],
    width: int,
    *,
    gated: bool = True,
    numbers: Iterable[float] = (),
    concatenated: bool = True,
) -> Gate | None:
    """What ``gate`` computes on [T, ``width``], found by comparing values on random float32 inputs.

    ``numbers`` may be among its constants. ``concatenated`` gates hold all gates, then all ups; the other
    layout is tried second. None when it is no known gate, or cannot run on its own.
    """
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 4.0, 30.0]).repeat(8)[:, None]
    x = torch.randn(32, width, generator=generator) * scales
    try:
        with torch.no_grad():
            want = gate(x.clone())
            if not gated:
                return next((Gate(act) for act, fn in ACTIVATIONS.items() if _same(fn(x), want)), None)
            for found in _candidates(numbers, concatenated):
                first, second = (x[..., ::2], x[..., 1::2]) if found.interleaved else x.chunk(2, -1)
                if _same(gate_fn(first, second, found.act, found.alpha, found.limit, found.up_offset), want):
                    return found
    except Exception:  # a gate that cannot run on its own (it reads weights, say) is not a known one
        return None
    return None


def _ffn_dim(module: nn.Module) -> int:
    down: Any = module.down_proj
    return int(down.shape[1] if module.is_transposed else down.shape[2])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=2e-6, atol=1e-6)


def _candidates(numbers: Iterable[float], concatenated: bool) -> Iterator[Gate]:
    """Gates to try, plainest first; constants are ``numbers`` that could be one."""
    constants = sorted({float(v) for v in numbers if not isinstance(v, bool) and 0 < v <= 1000})
    layouts = (False, True) if concatenated else (True, False)
    offsets = (0.0, 1.0)
    for limit, interleaved, offset in itertools.product((None, *constants), layouts, offsets):
        for act in ACTIVATIONS:
            yield Gate(act, interleaved, None, limit, offset)
        for alpha in (1.702, *constants):
            yield Gate("silu", interleaved, alpha, limit, offset)


class ExpertsInterface:
    """Calls ``torch_moe`` for every experts module; ``gates`` by module id, recognised before tracing."""

    def __init__(self, model: nn.Module) -> None:
        self.gates: dict[int, Gate | None] = {}
        self.notes: list[str] = []
        known: dict[Any, Gate | None] = {}
        for name, module in model.named_modules():
            if not is_experts(module):
                continue
            key = (
                type(module),
                tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, int | float))),
            )
            if key not in known:
                known[key] = recognise_gate(module)
                if known[key] is None:
                    self.notes.append(
                        f"{name} ({type(module).__name__}): gate not recognised, every expert is computed"
                    )
            self.gates[id(module)] = known[key]

    def __call__(self, module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden [T, D], topk_ids and topk_weights [T, k] -> [T, D]."""
        gate = self.gates.get(id(module))
        if gate is None or getattr(module, "has_post_expert_norm", False):
            return dense_experts(module, hidden, topk_ids, topk_weights)
        first = "gate_up_proj" if module.has_gate else "up_proj"
        biased = module.has_bias
        return torch.ops.adkit.torch_moe(
            hidden,
            topk_ids,
            topk_weights,
            getattr(module, first),
            module.down_proj,
            getattr(module, f"{first}_bias") if biased else None,
            module.down_proj_bias if biased else None,
            act=gate.act,
            transposed=module.is_transposed,
            interleaved=gate.interleaved,
            gated=module.has_gate,
            alpha=gate.alpha,
            limit=gate.limit,
            up_offset=gate.up_offset,
        )


def dense_experts(module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Every expert on every token with the module's own gate, weighted by the router; [T, D] -> [T, D].

    Ids of E or more stand for no expert.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    up: Tensor = getattr(module, first)
    down: Tensor = module.down_proj
    experts = up.shape[0]
    h = torch.einsum("td,edf->tef" if module.is_transposed else "td,efd->tef", hidden, up)
    if module.has_bias:
        h = h + getattr(module, f"{first}_bias")
    flat = h.flatten(0, 1)
    flat = module._apply_gate(flat) if module.has_gate else module.act_fn(flat)
    h = flat.unflatten(0, (-1, experts))
    y = torch.einsum("tef,efd->ted" if module.is_transposed else "tef,edf->ted", h, down)
    if module.has_bias:
        y = y + module.down_proj_bias
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    chosen = F.one_hot(topk_ids.clamp(max=experts), experts + 1)[..., :experts]
    weights = (chosen.to(topk_weights.dtype) * topk_weights[..., None]).sum(1)
    return (y * weights[..., None]).sum(1).to(hidden.dtype)
