"""Puts adkit's answers to Hugging Face's extension points in place for one export, then takes them away."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from adkit.models.hf.attention import AttentionInterface
from adkit.models.hf.experts import ExpertsInterface
from adkit.models.hf.masks import KnownOnes, mask_interface
from adkit.models.hf.rope import PerTokenRope, layer_types
from adkit.models.hf.routed import routed_forwards

NAME = "adkit"


class Extensions:
    """What is in place during an export.

    ``rope_lengths`` is set by the exported forward; ``length_dependent`` says whether any module reads it.
    ``masks`` counts calls of the mask interface. ``dropped`` names what attention modules handed to Hugging
    Face's sdpa function and it does not read.
    """

    def __init__(self, model: nn.Module, experts: str) -> None:
        names = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
        self.attention = AttentionInterface(names)
        self.experts = ExpertsInterface(model) if experts == "interface" else None
        self.rope_lengths: Tensor | None = None
        self.masks = 0
        self.dropped: set[str] = set()
        self.rope = {
            name: (module, PerTokenRope(module, name, self._lengths))
            for name, module in model.named_modules()
            if layer_types(module)
        }

    @property
    def length_dependent(self) -> bool:
        """Whether any rotary embedding depends on the sequence's length."""
        return bool(self.rope)

    @property
    def notes(self) -> list[str]:
        """What a reader should know of how the model was captured."""
        return self.attention.notes + (self.experts.notes if self.experts is not None else [])

    def _lengths(self) -> Tensor:
        assert self.rope_lengths is not None
        return self.rope_lengths

    def sdpa(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Hugging Face's sdpa function, watched."""
        reads = set(inspect.signature(own).parameters)
        matters = {"softcap", "s_aux", "position_bias"} - reads

        def watched(*args: Any, **kwargs: Any) -> Any:
            lost = {name for name in matters if kwargs.get(name) is not None}
            self.dropped |= lost
            return own(*args, **{k: v for k, v in kwargs.items() if k not in lost})  # newer ones raise

        return watched

    def mask(self, *args: Any, **kwargs: Any) -> Any:
        """The mask interface, counted."""
        self.masks += 1
        return mask_interface(*args, **kwargs)


@contextmanager
def extension_points(model: nn.Module, attention: str, experts: str = "interface") -> Iterator[Extensions]:
    """Everything in place: ``attention`` is interface, sdpa or eager, ``experts`` interface or batched_mm.

    Nothing of it outlives the block.
    """
    import transformers.masking_utils as masking
    from transformers import AttentionInterface as HFAttention
    from transformers.integrations.moe import ExpertsInterface as HFExperts

    extensions = Extensions(model, experts)
    with ExitStack() as stack:
        for table, value in (
            (HFAttention._global_mapping, extensions.attention),
            (masking.AttentionMaskInterface._global_mapping, extensions.mask),
            (HFExperts._global_mapping, extensions.experts),
        ):
            stack.enter_context(mock.patch.dict(table, {NAME: value}))
        if attention == "sdpa":
            table = HFAttention._global_mapping
            stack.enter_context(mock.patch.dict(table, sdpa=extensions.sdpa(table["sdpa"])))
        # adkit packs sequences by itself, and a batch without padding has none on the left
        stack.enter_context(mock.patch.object(masking, "find_packed_sequence_indices", return_value=None))
        if attention == "interface":
            overlay: Any = masking.chunked_overlay
            unpadded = _NoPadding()
            stack.enter_context(
                mock.patch.object(
                    masking, "chunked_overlay", lambda size, left_padding: overlay(size, unpadded)
                )
            )
        chosen = (NAME if mode == "interface" else mode for mode in (attention, experts))
        stack.enter_context(_configured(model, *chosen))
        routed = routed_forwards(model) if experts == "interface" else ()
        for module, forward in (*extensions.rope.values(), *routed):
            stack.enter_context(mock.patch.object(module, "forward", forward))
        stack.enter_context(KnownOnes())
        yield extensions


class _NoPadding:
    """``left_padding[batch]`` of a batch without padding."""

    def __getitem__(self, index: Any) -> int:
        return 0


@contextmanager
def _configured(model: nn.Module, attention: str, experts: str) -> Iterator[None]:
    """Every config of the model names these implementations in the block."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
            for key in getattr(config, "sub_configs", None) or ():
                sub = getattr(config, key, None)
                if sub is not None:
                    configs[id(sub)] = sub
    fields = {"_attn_implementation_internal": attention, "_experts_implementation_internal": experts}
    before = [(c, f, c.__dict__[f]) for c in configs.values() for f in fields if f in c.__dict__]
    try:
        for config, name, _ in before:
            config.__dict__[name] = fields[name]
        yield
    finally:
        for config, name, value in before:
            config.__dict__[name] = value


@contextmanager
def fake_tensors(model: nn.Module, mode: Any) -> Iterator[None]:
    """The model's parameters and buffers are fake CPU tensors of ``mode`` in the block, whatever they were.

    So a model on meta exports as it would on a CPU: literals and values say ``cpu``, and tensors that the
    forward builds from numbers keep their data. Ties between parameters hold.
    """
    memo: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            with mode:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            memo[id(tensor)] = (
                nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
            )
        return memo[id(tensor)]

    undo: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                undo.append((table, dict(table)))
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = fake(tensor)
        yield
    finally:
        for table, old in undo:
            table.clear()
            table.update(old)
