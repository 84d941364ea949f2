"""``fuse_moe``: experts as kernels."""

from __future__ import annotations

from adkit.passes.post_load_fusion._fused import SwapBackend
from adkit.passes.registry import register


@register
class FuseMoE(SwapBackend):
    """Run the experts of a layer as grouped kernels.

    The reference loops over experts in Python, which waits for the device at each; a backend sorts tokens by
    expert and runs all experts in a few launches. Without such a backend the reference stays.

        before: torch_moe(hidden, ids, weights, gate_up, down)
        after:  triton_moe(hidden, ids, weights, gate_up, down)
    """

    key = "fuse_moe"
    ops = ("moe",)
