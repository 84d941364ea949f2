"""Checkpoints made on the fly, and the comparison with what Hugging Face loads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.zoo import tiny


def save_tiny(directory: Path, model_type: str, shard: str = "20KB", **more: Any) -> nn.Module:
    """Save a tiny sensitive model in its original key layout, in many shards."""
    _, model = tiny(model_type, **more)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def named(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, tied names and computed buffers included."""
    pairs = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in pairs}


def hugging_face(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What transformers itself makes of the directory."""
    return named(AutoModelForCausalLM.from_pretrained(directory, dtype=dtype))


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names that are not bit-equal (dtype and shape included), or only on one side."""
    wrong = sorted(set(actual) ^ set(expected))
    for name in set(actual) & set(expected):
        a, b = actual[name], expected[name]
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            wrong.append(name)
    return wrong


def rewrite(directory: Path, change: Any) -> None:
    """Put a one-file checkpoint in place of what is there: ``change(tensors)`` edits the stored table."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
        file.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **values: Any) -> None:
    """Change fields of ``config.json``."""
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
