"""The data that rooms hand to each other: batches, caches, requests, engine settings, errors."""

from adkit.contract.batch import (
    CACHE_INPUTS,
    BatchLayout,
    HostBatch,
    SequenceBatch,
    SplitBatch,
    fitting_layout,
)
from adkit.contract.cache import CachePool, CacheSpec, MixerDescriptor
from adkit.contract.dist import (
    AllGatherStrategy,
    AllReduceStrategy,
    Communicator,
    Cut,
    DistConfig,
    LocalWeight,
)
from adkit.contract.engine import CompiledModel, EngineConfig, Replay
from adkit.contract.errors import (
    AdkitError,
    CheckpointError,
    ConfigError,
    EngineError,
    ExportError,
    MemoryLimitError,
    ModelError,
    PassError,
    RankError,
    RequestError,
    ShardingError,
    nearest,
)
from adkit.contract.sampling import Completion, Completions, Delta, FinishReason, SamplingParams, TokenLogprob

__all__ = [
    "CACHE_INPUTS",
    "AdkitError",
    "AllGatherStrategy",
    "AllReduceStrategy",
    "BatchLayout",
    "CachePool",
    "CacheSpec",
    "CheckpointError",
    "Communicator",
    "CompiledModel",
    "Completion",
    "Completions",
    "ConfigError",
    "Cut",
    "Delta",
    "DistConfig",
    "EngineConfig",
    "EngineError",
    "ExportError",
    "FinishReason",
    "HostBatch",
    "LocalWeight",
    "MemoryLimitError",
    "MixerDescriptor",
    "ModelError",
    "PassError",
    "RankError",
    "Replay",
    "RequestError",
    "SamplingParams",
    "SequenceBatch",
    "ShardingError",
    "SplitBatch",
    "TokenLogprob",
    "fitting_layout",
    "nearest",
]
