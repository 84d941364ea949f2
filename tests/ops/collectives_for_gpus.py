"""Compile the collective kernels for an H100 without one; run in a process of its own."""

from __future__ import annotations

from adkit.ops.triton import collective_kernels as kernels
from tests.ops.rope_and_sampling_for_gpus import types_of
from tests.ops.triton_for_gpus import compiled

_WORDS = dict.fromkeys(("x_ptr", "out_ptr", "residual_ptr", "normed_ptr", "counts_ptr"), "*i32")
_KNOWN = (
    _WORDS | dict.fromkeys(("inboxes_ptr", "flags_ptr"), "*i64") | dict.fromkeys(("eps", "offset"), "fp32")
)


def main() -> None:
    """Two and eight ranks; plain, gathering, with a norm of a residual like the message and of a wider one."""
    import triton.language as tl

    for world in (2, 8):
        shared = {"RANK": 1, "WORLD": world, "KIND": tl.bfloat16, "PAIRED": 1, "TRAPS": True, "PDL": True}
        for gather, norm, wide in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 1)):
            constants = {"GATHER": gather, "HAS_RESIDUAL": norm, "WIDE": wide, "NORM": norm, "HAS_WEIGHT": norm,
                         "IN_FLOAT": False, "BLOCK": 2048 if norm else 512}  # fmt: skip
            known = _KNOWN | (dict.fromkeys(("residual_ptr", "out_ptr"), "*i64") if wide else {})
            compiled(
                kernels.oneshot_kernel, types_of(kernels.oneshot_kernel, known), {**shared, **constants}, 90
            )
        compiled(
            kernels.twoshot_kernel, types_of(kernels.twoshot_kernel, _KNOWN), {**shared, "BLOCK": 4096}, 90
        )


if __name__ == "__main__":
    main()
