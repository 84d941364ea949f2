"""What a model needs of a device's memory, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adkit.contract import EngineConfig, MemoryLimitError


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes needed against bytes free on a device.

    ``weights_by_dtype``: parameters and buffers, tied ones once. ``kv_cache``: ``max_batch_size`` sequences
    of ``max_seq_len`` tokens; ``kv_minimum``: one such sequence, since the cache shrinks to what is left.
    ``workspace``: activations of one step, logits, and the largest tensor while it is converted (rough).
    """

    name: str
    device: str
    free: int
    weights_by_dtype: dict[str, int] = field(default_factory=dict)
    kv_cache: int = 0
    kv_minimum: int = 0
    workspace: int = 0

    @property
    def weights(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(self.weights_by_dtype.values())

    @property
    def needed(self) -> int:
        """Least bytes that work: weights, workspace, cache for one full sequence."""
        return self.weights + self.workspace + self.kv_minimum

    @property
    def wanted(self) -> int:
        """Bytes for the whole batch: weights, workspace, cache at full batch and length."""
        return self.weights + self.workspace + self.kv_cache

    @property
    def fits(self) -> bool:
        """Whether the least needed is free."""
        return self.needed <= self.free

    def over(self, pools: int) -> MemoryEstimate:
        """The same on one of so many ranks that share out the sequences."""
        sequences = self.kv_cache // self.kv_minimum if self.kv_minimum else 0
        return replace(self, kv_cache=self.kv_minimum * -(-sequences // pools))

    def require(self) -> None:
        """Raise MemoryLimitError when the model cannot fit."""
        if not self.fits:
            raise MemoryLimitError(
                f"{self.name} needs at least {human(self.needed)} ({human(self.weights)} weights, "
                f"{human(self.kv_minimum)} KV cache for one sequence, {human(self.workspace)} workspace) and "
                f"{self.device} has {human(self.free)} free: use {', '.join(self._savings())}, "
                "another device, or force=True to try all the same"
            )

    def _savings(self) -> list[str]:
        """What makes each part smaller, the largest part first."""
        advice = [
            (self.weights, "a smaller dtype"),
            (self.kv_minimum, "a shorter max_seq_len or smaller pages (page_size)"),
            (self.workspace, "a smaller max_batch_size or max_num_tokens"),
        ]
        return [what for _, what in sorted(advice, key=lambda part: -part[0])]

    def __repr__(self) -> str:
        by_dtype = ", ".join(f"{human(n)} {d}" for d, n in sorted(self.weights_by_dtype.items()))
        verdict = "fits"
        if not self.fits:
            verdict = "does not fit"
        elif self.wanted > self.free:
            verdict = "fits with a smaller KV cache"
        rows = [
            ("weights", human(self.weights) + (f"  ({by_dtype})" if len(self.weights_by_dtype) > 1 else "")),
            ("KV cache", f"{human(self.kv_cache)}  (one sequence: {human(self.kv_minimum)})"),
            ("workspace", human(self.workspace)),
            ("total", human(self.wanted)),
            ("free", f"{human(self.free)}  -> {verdict}"),
        ]
        return "\n".join([f"Memory of {self.name} on {self.device}", *(f"  {k:<10}{v}" for k, v in rows)])


def estimate(
    name: str,
    config: Any,
    dtype: torch.dtype,
    tensors: Iterable[Tensor],
    engine: EngineConfig,
    device: torch.device,
    kv_per_token: int | None = None,
) -> MemoryEstimate:
    """Estimate for a model with these (meta) tensors, each given once, under an engine's sizes.

    ``kv_per_token``: bytes of keys and values a token; None: what the config says.
    """
    by_dtype: dict[str, int] = {}
    largest = 0
    for t in tensors:
        kind, size = str(t.dtype).removeprefix("torch."), t.numel() * t.element_size()
        by_dtype[kind] = by_dtype.get(kind, 0) + size
        largest = max(largest, size)
    text = config.get_text_config(decoder=True)
    per_token = kv_bytes_per_token(text, dtype) if kv_per_token is None else kv_per_token
    pages = -(-engine.max_seq_len // engine.page_size)
    sequence = per_token * pages * engine.page_size
    inner = getattr(text, "intermediate_size", None) or 0
    width = max(*(inner if isinstance(inner, (list, tuple)) else [inner]), text.hidden_size)
    # Two MLP-wide, six model-wide rows a token are alive at once in an unfused layer; logits in float32.
    activations = engine.max_num_tokens * (2 * width + 6 * text.hidden_size) * dtype.itemsize
    workspace = activations + engine.max_batch_size * text.vocab_size * 4 + largest
    return MemoryEstimate(
        name, str(device), free_bytes(device), by_dtype, sequence * engine.max_batch_size, sequence, workspace
    )


def kv_bytes_per_token(text: Any, dtype: torch.dtype) -> int:
    """Bytes that all layers' keys and values take for a token: sum over layers of K * (H_k + H_v) elements.

    Layers that keep a fixed state instead (linear attention, convolutions) count nothing.
    """
    types = getattr(text, "layer_types", None) or ["attention"] * text.num_hidden_layers
    attends = [t.endswith("attention") and not t.startswith("linear") for t in types]
    own = getattr(text, "per_layer_config", None)  # layers may differ in their heads (Gemma 4)
    layers = [own[i] if own else text for i, yes in enumerate(attends) if yes]
    return sum(map(_kv_numbers, layers)) * dtype.itemsize


def _kv_numbers(config: Any) -> int:
    """Numbers that one layer keeps of a token."""
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    nope, rope = getattr(config, "qk_nope_head_dim", None), getattr(config, "qk_rope_head_dim", None)
    key_dim = nope + rope if nope is not None and rope is not None else head_dim
    value_dim = getattr(config, "v_head_dim", None) or head_dim
    return int(kv_heads * (key_dim + value_dim))


@contextmanager
def limited(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """Say what ran out of memory and what helps: MemoryLimitError for a device's own error inside."""
    try:
        yield
    except RuntimeError as error:
        cause = _out_of_memory(error)
        if cause is None:
            raise
        raise MemoryLimitError(f"no memory left on {device} {what}: {advice}. {cause}") from error


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The lack of memory that an error tells of or stems from: a capture that was broken off fails once more."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error


def free_bytes(device: torch.device) -> int:
    """Bytes free on a device: CUDA's own count, else the host's available memory within its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_host_available(), _group_available())


def _host_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_available() -> int:
    """What the container may still take (cgroup v2); reclaimable file pages count as free."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return 1 << 62
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        return max(int(limit) - used, 0)
    except (OSError, ValueError):
        return 1 << 62


def human(count: float) -> str:
    """Bytes for people: ``16.1 GB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
