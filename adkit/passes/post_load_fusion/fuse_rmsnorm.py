"""``fuse_rmsnorm``: root-mean-square norms as kernels."""

from __future__ import annotations

from adkit.passes.post_load_fusion._fused import SwapBackend
from adkit.passes.registry import register


@register
class FuseRMSNorm(SwapBackend):
    """Run each RMS norm as one kernel.

    The reference reads its input from memory several times and writes float32 intermediates; a kernel reads a
    row once and writes the result. Runs after ``fuse_add_rms_norm``, which takes the norms that follow a
    residual sum.

        before: torch_rmsnorm(x, w, eps)
        after:  triton_rmsnorm(x, w, eps)
    """

    key = "fuse_rmsnorm"
    ops = ("rmsnorm",)
