"""``fuse_l2norm``: Euclidean norms as kernels."""

from __future__ import annotations

from adkit.passes.post_load_fusion._fused import SwapBackend
from adkit.passes.registry import register


@register
class FuseL2Norm(SwapBackend):
    """Run each Euclidean norm as one kernel.

    The reference writes float32 intermediates; a kernel reads a row once and writes the result.

        before: torch_l2norm(x, eps)
        after:  triton_l2norm(x, eps)
    """

    key = "fuse_l2norm"
    ops = ("l2norm",)
