"""``torch.ops.adkit.*``: canonical reference ops (``torch_*``), kernels, and token mixers' descriptors.

Importing this package defines every op; it needs neither triton nor CUDA.
"""

from adkit.ops import (
    attention,
    cached_attention,
    dist,
    hints,
    linear,
    mlp,
    moe,
    norm,
    ranks,
    rope,
    rope_cache,
    triton,
)
from adkit.ops.backends import pick
from adkit.ops.mixers import MIXERS
from adkit.ops.registry import OPS, OpInfo, define, info_of

__all__ = [
    "MIXERS",
    "OPS",
    "OpInfo",
    "attention",
    "cached_attention",
    "define",
    "dist",
    "hints",
    "info_of",
    "linear",
    "mlp",
    "moe",
    "norm",
    "pick",
    "ranks",
    "rope",
    "rope_cache",
    "triton",
]
