"""``fuse_rope``: rotary embeddings as kernels."""

from __future__ import annotations

from adkit.passes.post_load_fusion._fused import SwapBackend
from adkit.passes.registry import register


@register
class FuseRope(SwapBackend):
    """Rotate queries and keys in one kernel.

    The reference slices, negates, concatenates and multiplies in separate sweeps over memory; a kernel turns
    each pair of numbers in registers.

        before: torch_rope_with_explicit_cos_sin(q, k, cos, sin, 2)
        after:  triton_rope_with_explicit_cos_sin(q, k, cos, sin, 2)
    """

    key = "fuse_rope"
    ops = ("rope_with_explicit_cos_sin", "rope_with_qk_interleaving", "rope_with_complex_freqs")
