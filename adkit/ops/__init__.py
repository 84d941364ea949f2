"""``torch.ops.adkit.*``: canonical reference ops (``torch_*``), kernels, and token mixers' descriptors.

Importing this package defines every op.
"""

from adkit.ops import attention, linear, mlp, moe, norm, rope
from adkit.ops.registry import OPS, OpInfo, define, info_of

__all__ = ["OPS", "OpInfo", "attention", "define", "info_of", "linear", "mlp", "moe", "norm", "rope"]
