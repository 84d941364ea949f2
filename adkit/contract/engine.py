"""Engine settings, and what the runtime needs of a compiled model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from adkit.contract.batch import BatchLayout, HostBatch, SequenceBatch
from adkit.contract.cache import CachePool


class EngineConfig(BaseModel):
    """Sizes and placement of the engine; ``dtype`` and ``device`` may be torch's, and become their names."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    max_seq_len: int = Field(2048, ge=1, description="Longest sequence served, prompt and output (tokens)")
    max_batch_size: int = Field(32, ge=1, description="Most sequences in one step")
    max_num_tokens: int = Field(2048, ge=1, description="Most tokens in one step (T)")
    page_size: int = Field(16, ge=1, description="Tokens a cache page holds")
    free_gpu_memory_fraction: float = Field(
        0.9, gt=0, le=1, description="Share of the memory left after loading that the cache may take (GPU)"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights' dtype; auto: the checkpoint's on GPU, float32 on CPU"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    overlap: Literal["auto", True, False] = Field(
        "auto",
        description="Launch a step before the tokens of the one before have come back, so that the host's work "
        "hides behind the device's; auto: on CUDA. Outputs do not depend on it",
    )

    @field_validator("dtype", "device", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """torch's own dtypes and devices by their names."""
        return str(given).removeprefix("torch.") if isinstance(given, torch.dtype | torch.device) else given

    def share(self, pools: int) -> EngineConfig:
        """What one of so many ranks is sized for that have sequences of their own: these sizes are those of all."""
        if pools == 1:
            return self
        shared = {n: -(-getattr(self, n) // pools) for n in ("max_batch_size", "max_num_tokens")}
        return self.model_copy(update=shared)

    def resolved_device(self) -> torch.device:
        """The device meant: CUDA where there is one, else the CPU."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


class Replay(Protocol):
    """Runs steps of some sizes in a faster way than ``forward`` does."""

    #: The sizes, ascending.
    layouts: list[BatchLayout]
    #: Where ``sources`` starts counting ``input_ids``: rows there are for the tokens of the step before.
    num_previous: int

    def layout(self, tokens: int, sequences: int) -> BatchLayout | None:
        """How to lay out a step of T tokens in R sequences, padded; None where it has no such size.

        With T = R every sequence brings one token and is sampled from, and so is every row that pads the batch;
        otherwise tokens that pad it belong to no sequence, and sequences that do have no tokens.
        """
        ...

    def __call__(self, host: HostBatch, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits [L, V] of a batch in such a layout, and each row's best token [L] (-1: not finite).

        Both are valid until the next call. ``previous`` [L'] are the tokens of the step before, if the batch continues
        it. Waits for nothing.
        """
        ...


@dataclass
class CompiledModel:
    """A packed, cached graph ready to run: what the pipeline hands to the runtime.

    ``forward`` takes the graph's inputs by keyword and returns logits [1, L, V] (all T rows when the graph
    does not gather). ``inputs`` are its placeholder names; those in ``caches`` come from the pool.
    ``max_positions`` bounds a sequence where positions are looked up in a learned table; ``made_for`` is how many the
    config names, which a sequence of rotary or no positions may pass. ``replay`` is there
    where the backend can replay steps. ``pools``: ranks that have sequences of their own (attention data parallelism),
    each over ``caches`` of its own; logits are then those of all of them, [pools, L, V].
    """

    forward: Callable[..., Tensor]
    inputs: tuple[str, ...]
    caches: CachePool
    vocab_size: int
    device: torch.device
    eos_token_ids: tuple[int, ...] = ()
    max_positions: int | None = None
    made_for: int | None = None
    replay: Replay | None = None
    pools: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    def __call__(self, batch: SequenceBatch) -> Tensor:
        """Run one packed step; returns float logits [L, V] of the tokens asked for."""
        feed = {
            n: self.caches.tensors[n] if n in self.caches.tensors else getattr(batch, n) for n in self.inputs
        }
        logits = self.forward(**feed).flatten(0, 1)
        return logits if "logits_indices" in self.inputs else logits[batch.logits_indices]
