"""Rotary embeddings whose frequencies depend on the sequence's length, computed for each token.

Hugging Face's ``longrope`` and ``dynamic`` scalings look at the largest position of the whole batch and change the
module's ``inv_freq``. A packed batch holds sequences of many lengths, so here every token brings the length that its
own sequence has (graph input ``rope_lengths`` int64 [B, S]) and frequencies become a tensor [B, S, R/2].
Formulas: Hugging Face's ``ROPE_INIT_FUNCTIONS``, called as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adkit.contract import ExportError

Frequencies = Callable[[Tensor], Tensor]
Layout = Callable[[Tensor, float], tuple[Tensor, ...]]


def _half(freqs: Tensor, scale: float) -> tuple[Tensor, ...]:
    emb = torch.cat((freqs, freqs), -1)
    return emb.cos() * scale, emb.sin() * scale


def _interleaved(freqs: Tensor, scale: float) -> tuple[Tensor, ...]:
    emb = torch.repeat_interleave(freqs, 2, -1)
    return emb.cos() * scale, emb.sin() * scale


def _single(freqs: Tensor, scale: float) -> tuple[Tensor, ...]:
    return freqs.cos() * scale, freqs.sin() * scale


def _complex(freqs: Tensor, scale: float) -> tuple[Tensor, ...]:
    return (torch.polar(torch.ones_like(freqs), freqs) * scale,)


LAYOUTS: tuple[Layout, ...] = (_half, _interleaved, _single, _complex)


def layer_types(module: nn.Module) -> list[str | None]:
    """Keys of a rotary module's frequencies that depend on length: ``[None]`` when it has but one set, [] for none."""
    if not _updates(module):
        return []
    kind: Any = getattr(module, "rope_type", None)
    kinds = kind if isinstance(kind, dict) else {None: kind}
    return [key for key, name in kinds.items() if isinstance(name, str) and ("dynamic" in name or name == "longrope")]


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

    ``lengths()`` gives the graph's ``rope_lengths``. Raises ExportError naming the module when the result of none
    of the known layouts equals the module's at a short and a long length.
    """

    def __init__(self, module: nn.Module, name: str, lengths: Callable[[], Tensor]) -> None:
        self.original = module.forward
        self.lengths = lengths
        keys = layer_types(module)
        self.sets: dict[str | None, tuple[Frequencies, Layout, float]] = {}
        try:
            with torch.device("cpu"):
                twin = type(module)(module.config)
        except Exception as error:
            raise ExportError(f"cannot rebuild {name} ({type(module).__name__}) to check its frequencies: {error}") from error
        for key in keys:
            frequencies, boundary = _frequencies(module, key)
            scale = getattr(twin, "attention_scaling" if key is None else f"{key}_attention_scaling", 1.0)
            layout = _layout(twin, name, key, frequencies, boundary, scale)
            self.sets[key] = (frequencies, layout, scale)

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Cos and sin [B, S, R] in x's dtype (or one complex tensor), as the module returns them."""
        if layer_type not in self.sets:
            return self.original(x, position_ids, layer_type)
        frequencies, layout, scale = self.sets[layer_type]
        return _embed(x, position_ids, self.lengths(), frequencies, layout, scale)


def _embed(x: Tensor, position_ids: Tensor, lengths: Tensor, frequencies: Frequencies, layout: Layout, scale: float) -> Any:
    freqs = position_ids[..., None].float() * frequencies(lengths)
    out = layout(freqs, scale)
    return out[0] if len(out) == 1 else tuple(t.to(x.dtype) for t in out)


def _frequencies(module: nn.Module, key: str | None) -> tuple[Frequencies, int]:
    """The function from lengths [B, S] to frequencies [B, S, R/2], and the length where it changes."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: Any = module.config
    kind: Any = module.rope_type
    kind = kind if key is None else kind[key]
    keyed = {} if key is None else {"layer_type": key}
    init = ROPE_INIT_FUNCTIONS[kind]
    original: Tensor = init(config, torch.device("cpu"), **keyed)[0].clone()
    if kind == "longrope":
        parameters = config.rope_parameters if key is None else config.rope_parameters[key]
        boundary = int(parameters["original_max_position_embeddings"])
        long: Tensor = init(config, torch.device("cpu"), seq_len=boundary + 1, **keyed)[0].clone()

        def longrope(lengths: Tensor) -> Tensor:
            return torch.where((lengths > boundary)[..., None], long.to(lengths.device), original.to(lengths.device))

        return longrope, boundary
    boundary = int(getattr(module, "original_max_seq_len", config.max_position_embeddings))

    def dynamic(lengths: Tensor) -> Tensor:
        grown = init(config, lengths.device, seq_len=lengths[..., None], **keyed)[0]
        return torch.where((lengths > boundary)[..., None], grown, original.to(lengths.device))

    return dynamic, boundary


def _layout(
    twin: nn.Module, name: str, key: str | None, frequencies: Frequencies, boundary: int, scale: float
) -> Layout:
    x = torch.zeros(1, 1)
    for layout in LAYOUTS:
        try:
            if all(_agrees(twin, key, x, length, frequencies, layout, scale) for length in (8, 2 * boundary + 3)):
                return layout
        except (RuntimeError, TypeError):  # shapes of another layout
            continue
    raise ExportError(
        f"{name} ({type(twin).__name__}) scales its rotary frequencies with length in a way that adkit cannot compute "
        "per token; it can only run with another rope_scaling"
    )


def _agrees(
    twin: nn.Module, key: str | None, x: Tensor, length: int, frequencies: Frequencies, layout: Layout, scale: float
) -> bool:
    positions = torch.tensor([[0, 1, 5, length - 1]])
    with torch.no_grad():
        want = twin(x, positions, key) if key is not None else twin(x, positions)
        got = _embed(x, positions, torch.full_like(positions, length), frequencies, layout, scale)
    want, got = (t if isinstance(t, tuple) else (t,) for t in (want, got))
    return len(want) == len(got) and all(
        w.shape == g.shape and torch.allclose(w, g, rtol=1e-6, atol=1e-6) for w, g in zip(want, got, strict=True)
    )
