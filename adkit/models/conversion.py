"""Checkpoint names -> model names, by transformers' own conversion rules.

transformers 5 renames keys and merges tensors (per-expert ``w1``/``w3`` into one ``gate_up_proj``) while it
loads. This module is the only one that touches that private API (``core_model_loading``,
``conversion_mapping``; written against 5.17 and 5.23). It turns stored names into a :class:`Plan`: groups of
stored tensors, each of which becomes one or more of the model's tensors. A plan is made from headers alone:
converters are run on meta tensors, so every shape is known before a byte of weights is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from adkit.contract import LocalWeight
from adkit.models.checkpoint import Stored

# Path segments under which a multi-modal checkpoint keeps its language model.
_NESTED = re.compile(r"(^|\.)(?:language_model|text_model)\.")


@dataclass
class Group:
    """Stored tensors that become one or more tensors of the model.

    ``sources``: (stored name, the converter's pattern that it matched); ``converter`` None: one tensor under
    a new name; ``shapes``: what the group makes, known before reading.
    """

    key: str
    sources: list[tuple[str, str]] = field(default_factory=list)
    converter: WeightConverter | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def convert(self, tensors: Iterable[Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The model's tensors made from the stored ones (in the order of ``sources``)."""
        if self.converter is None:
            (tensor,) = tensors
            return {self.key: tensor}
        converter = deepcopy(self.converter)
        for (name, pattern), tensor in zip(self.sources, tensors, strict=True):
            converter.add_tensor(self.key, name, pattern, cast(Any, tensor))
        made = converter.convert(self.key, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def experts(self) -> Experts | None:
        """How the one tensor that this makes is stacked, where it is stacked index by index; else None.

        That is so where the conversion stacks as many tensors a pattern as dimension 0 is long, and does no more than
        join the patterns' stacks along another dimension.
        """
        if self.converter is None or len(self.shapes) != 1:
            return None
        first, *rest = self.converter.operations
        (shape,) = self.shapes.values()
        if not isinstance(first, MergeModulelist) or first.dim != 0 or len(rest) > 1:
            return None
        dim = rest[0].dim % len(shape) if rest and isinstance(rest[0], Concatenate) else None
        patterns = [p for p in self.converter.source_patterns if any(p == found for _, found in self.sources)]
        stacks = [[name for name, found in self.sources if found == p] for p in patterns]
        if any(len(stack) != shape[0] for stack in stacks):
            return None
        if (rest and not dim) or (not rest and len(stacks) != 1):
            return None
        return Experts([list(row) for row in zip(*stacks, strict=True)], dim or 1)


@dataclass(frozen=True)
class Experts:
    """Stored tensors of each index of dimension 0, which lie side by side along ``dim`` of the model's tensor."""

    sources: list[list[str]]
    dim: int

    def copy(self, stored: list[Tensor], part: LocalWeight, made: Tensor) -> None:
        """Write one index's part into ``made`` [1, ...], straight from its stored tensors (without dimension 0)."""
        total = sum(t.shape[self.dim - 1] for t in stored)
        ranges = next((c.ranges for c in part.cuts if c.dim == self.dim), ((0, total),))
        others = LocalWeight(part.name, tuple(c for c in part.cuts if c.dim not in (0, self.dim)))
        at = 0
        for start, stop in ranges:
            offset = 0
            for tensor in stored:
                size = tensor.shape[self.dim - 1]
                low, high = max(start, offset), min(stop, offset + size)
                if low < high:
                    piece = tensor[None].narrow(self.dim, low - offset, high - low)
                    others.copy(piece, made.narrow(self.dim, at, high - low))
                    at += high - low
                offset += size


@dataclass
class Plan:
    """How a checkpoint becomes a model.

    ``where`` model name -> group; ``unexpected`` stored name with no place in the model -> the name it would have
    there; ``mismatched`` model name -> what is wrong with its shape or assembly.
    """

    groups: list[Group]
    where: dict[str, Group]
    unexpected: dict[str, str]
    mismatched: dict[str, str]


def make_plan(model: Any, stored: Mapping[str, Stored], *, nested: bool = False) -> Plan:
    """Match stored tensors to a (meta) model's names.

    ``nested``: the checkpoint is a multi-modal model's and ``model`` its language model alone; the other parts are then
    not unexpected.
    """
    state = {k: t for k, t in model.state_dict().items() if isinstance(t, Tensor)}
    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    prefix = model.base_model_prefix

    groups: dict[str, Group] = {}
    unexpected: dict[str, str] = {}
    # Natural order puts expert 2 before expert 10: converters stack in the order they are given.
    for name in sorted(stored, key=dot_natural_key):
        candidate = _NESTED.sub(r"\1", name, count=1) if nested else name
        key, pattern = rename_source_key(candidate, renamings, converters, prefix, state)
        if key not in state and candidate in state:  # a rule fired on a name that already fits
            key, pattern = rename_source_key(candidate, [], [], prefix, state)
        if key not in state:
            if not nested or _of(model, key):
                unexpected[name] = key
        elif pattern is None:
            groups[key] = Group(key, [(name, name)])
        else:
            groups.setdefault(key, Group(key, converter=by_pattern[pattern])).sources.append((name, pattern))

    where: dict[str, Group] = {}
    mismatched: dict[str, str] = {}
    for group in groups.values():
        shells = [
            torch.empty(stored[n].shape, dtype=stored[n].dtype or torch.uint8, device="meta")
            for n, _ in group.sources
        ]
        try:
            made = group.convert(shells, model)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            names = [n for n, _ in group.sources]
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            mismatched[group.key] = f"cannot be made from {shown}: {type(error).__name__}: {error}"
            continue
        for target, shell in made.items():
            if target not in state:
                unexpected[f"{target} (made from {group.sources[0][0]})"] = target
                continue
            where[target] = group
            group.shapes[target] = tuple(shell.shape)
            if shell.shape != state[target].shape:
                source = (
                    group.sources[0][0] if len(group.sources) == 1 else f"{len(group.sources)} stored tensors"
                )
                mismatched[target] = (
                    f"{list(shell.shape)} from {source}, the model has {list(state[target].shape)}"
                )
    return Plan(list(groups.values()), where, unexpected, mismatched)


def _of(model: Any, key: str) -> bool:
    """Whether a name begins as the model's own do, at its top or in its base model: other modalities' do not."""
    prefix = f"{model.base_model_prefix}."
    owner = model.base_model if key.startswith(prefix) else model
    return hasattr(owner, key.removeprefix(prefix).split(".")[0])


def may_be_missing(model: Any) -> re.Pattern[str] | None:
    """Names that the model class itself says a checkpoint need not have."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return re.compile("|".join(f"({p})" for p in patterns)) if patterns else None


def may_be_unexpected(model: Any) -> re.Pattern[str] | None:
    """Stored names that mean nothing today: those the class lists, and buffers that old ones stored."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({p})" for p in patterns)) if patterns else None


def float32_names(model: Any, dtype: torch.dtype) -> list[str]:
    """Parameters and persistent buffers that the model class keeps in float32 when the rest is ``dtype``."""
    plan = model._get_dtype_plan(dtype)
    keep = [re.compile(p.replace("*", ".*")) for p, kept in plan.items() if kept == torch.float32]
    return [
        n for n, t in model.state_dict().items() if isinstance(t, Tensor) and any(p.search(n) for p in keep)
    ]
