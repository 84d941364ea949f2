"""``fuse_moe``: experts as kernels."""

from __future__ import annotations

from adkit.passes.post_load_fusion._fused import SwapBackend
from adkit.passes.registry import register


@register
class FuseMoE(SwapBackend):
    """Run routing and experts of a layer as kernels.

    The reference loops over experts in Python, which waits for the device at each. The kernels read ids on the
    device: a few tokens read their experts' weights as they are, many are sorted by expert and go through one
    matrix product a block. So a CUDA graph can hold the step. Routing is one launch of its own.

        before: w, ids = torch_moe_topk(logits, 8); torch_moe(hidden, ids, w, gate_up, down)
        after:  w, ids = triton_moe_topk(logits, 8); triton_moe(hidden, ids, w, gate_up, down)
    """

    key = "fuse_moe"
    ops = ("moe_topk", "moe")
