"""Rotary embeddings whose frequencies depend on the sequence's length, computed for each token.

Hugging Face's ``longrope`` and ``dynamic`` scalings look at the largest position of the whole batch and
change the module's ``inv_freq``. A packed batch holds sequences of many lengths, so here every token brings
the length that its own sequence has (graph input ``rope_lengths`` int64 [B, S]) and frequencies become a
tensor [B, S, R/2]. Formulas: Hugging Face's ``ROPE_INIT_FUNCTIONS``, called as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adkit.contract import ExportError

Frequencies = Callable[[Tensor], Tensor]
Layout = Callable[[Tensor], tuple[Tensor, ...]]


def _half(freqs: Tensor) -> tuple[Tensor, ...]:
    emb = torch.cat((freqs, freqs), -1)
    return emb.cos(), emb.sin()


def _interleaved(freqs: Tensor) -> tuple[Tensor, ...]:
    emb = torch.repeat_interleave(freqs, 2, -1)
    return emb.cos(), emb.sin()


def _single(freqs: Tensor) -> tuple[Tensor, ...]:
    return freqs.cos(), freqs.sin()


def _complex(freqs: Tensor) -> tuple[Tensor, ...]:
    return (torch.polar(torch.ones_like(freqs), freqs),)


LAYOUTS: tuple[Layout, ...] = (_half, _interleaved, _single, _complex)


@dataclass(frozen=True)
class _Regime:
    """What a module does on one side of its boundary: frequencies from lengths, their layout, a factor."""

    frequencies: Frequencies
    layout: Layout
    scale: float


@dataclass(frozen=True)
class _Scaling:
    """Cos and sin for short sequences and for those longer than ``boundary`` tokens."""

    boundary: int
    short: _Regime
    long: _Regime

    def __call__(self, x: Tensor, position_ids: Tensor, lengths: Tensor) -> Any:
        """Cos and sin [B, S, R] in x's dtype, or one complex tensor; positions and lengths int64 [B, S]."""
        is_long = (lengths > self.boundary)[..., None]
        inv_freq = self.short.frequencies(lengths)
        if self.long.frequencies is not self.short.frequencies:
            inv_freq = torch.where(is_long, self.long.frequencies(lengths), inv_freq)
        scale: Any = self.short.scale
        if self.long.scale != scale:
            scale = torch.where(is_long, self.long.scale, scale)
        out = tuple(t * scale for t in self.short.layout(position_ids[..., None].float() * inv_freq))
        return out[0] if len(out) == 1 else tuple(t.to(x.dtype) for t in out)


def layer_types(module: nn.Module) -> list[str | None]:
    """Keys of the frequencies that depend on length: [] for none, ``[None]`` for a module of one set."""
    if not _updates(module):
        return []
    kind: Any = getattr(module, "rope_type", None)
    kinds = kind if isinstance(kind, dict) else {None: kind}
    return [
        key
        for key, name in kinds.items()
        if isinstance(name, str) and ("dynamic" in name or name == "longrope")
    ]


def _updates(module: nn.Module) -> bool:
    """Whether ``forward`` is wrapped by Hugging Face's ``dynamic_rope_update``."""
    fn: Any = type(module).forward
    while fn is not None:
        if getattr(fn, "__globals__", {}).get("__name__") == "transformers.modeling_rope_utils":
            return True
        fn = getattr(fn, "__wrapped__", None)
    return False


class PerTokenRope:
    """The forward of one rotary module with per-token frequencies, checked against the module itself.

    ``lengths()`` gives the graph's ``rope_lengths``. Raises ExportError naming the module when no known
    layout, frequencies and factor give what the module gives on both sides of its boundary.
    """

    def __init__(self, module: nn.Module, name: str, lengths: Callable[[], Tensor]) -> None:
        self.original = module.forward
        self.lengths = lengths
        self.scalings = {key: _scaling(module, name, key) for key in layer_types(module)}

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Cos and sin [B, S, R] in x's dtype (or one complex tensor), as the module returns them."""
        if layer_type not in self.scalings:
            return self.original(x, position_ids, layer_type)
        return self.scalings[layer_type](x, position_ids, self.lengths())


def _scaling(module: nn.Module, name: str, key: str | None) -> _Scaling:
    boundary, candidates = _frequencies(module, key)
    try:
        with torch.device("cpu"):
            twin = type(module)(module.config)
        short = _fit(twin, key, candidates, (min(8, boundary), boundary))
        long = _fit(twin, key, candidates, (boundary + 1, 2 * boundary + 3, 3 * boundary + 5))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(
            f"the rotary scaling of {name} ({type(module).__name__}) cannot be evaluated: {error}"
        ) from error
    if short is None or long is None or short.layout is not long.layout:
        raise ExportError(
            f"{name} ({type(module).__name__}) changes its frequencies with length in a way that adkit "
            "cannot compute for each token; only another rope scaling can be served"
        )
    return _Scaling(boundary, short, long)


def _frequencies(module: nn.Module, key: str | None) -> tuple[int, tuple[Frequencies, ...]]:
    """The length above which frequencies may change, and what they may be: functions of lengths [B, S]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: Any = module.config
    kind: Any = module.rope_type
    kind = kind if key is None else kind[key]
    keyed = {} if key is None else {"layer_type": key}
    init = ROPE_INIT_FUNCTIONS[kind]
    cpu = torch.device("cpu")

    def constant(seq_len: int | None) -> Frequencies:
        values: Tensor = init(config, cpu, seq_len=seq_len, **keyed)[0].clone()
        return lambda lengths: values.to(lengths.device)

    if kind == "longrope":
        parameters = config.rope_parameters if key is None else config.rope_parameters[key]
        boundary = int(parameters["original_max_position_embeddings"])
        return boundary, (constant(None), constant(boundary + 1))
    boundary = int(getattr(module, "original_max_seq_len", config.max_position_embeddings))
    return boundary, (
        constant(None),
        lambda lengths: init(config, lengths.device, seq_len=lengths[..., None], **keyed)[0],
    )


def _fit(
    twin: nn.Module, key: str | None, candidates: tuple[Frequencies, ...], lengths: tuple[int, ...]
) -> _Regime | None:
    """The frequencies, layout and factor that give the module's output at every one of ``lengths``."""
    samples = []
    for length in lengths:
        positions = torch.tensor([[0, 1, 5, length - 1]])
        with torch.no_grad():
            want = twin(torch.zeros(1, 1), positions, *(() if key is None else (key,)))
        samples.append(
            (positions, torch.full_like(positions, length), want if isinstance(want, tuple) else (want,))
        )
    scale = float(samples[0][2][0][0, 0, 0].real)  # at position 0 cos is 1
    for layout in LAYOUTS:
        for frequencies in candidates:
            regime = _Regime(frequencies, layout, scale)
            if all(_gives(regime, *sample) for sample in samples):
                return regime
    return None


def _gives(regime: _Regime, positions: Tensor, lengths: Tensor, want: tuple[Tensor, ...]) -> bool:
    freqs = positions[..., None].float() * regime.frequencies(lengths)
    got = tuple(t * regime.scale for t in regime.layout(freqs))
    return len(want) == len(got) and all(
        w.shape == g.shape and w.dtype == g.dtype and torch.allclose(w, g, rtol=1e-6, atol=1e-6)
        for w, g in zip(want, got, strict=True)
    )
