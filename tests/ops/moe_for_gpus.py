"""Compile the kernels of experts and routing for named GPUs without one; run by test_moe.py."""

from __future__ import annotations

from typing import Any

from adkit.ops.triton import moe, moe_grouped, moe_topk
from tests.ops.triton_for_gpus import LIMIT, compiled

TYPES = {
    "ids_ptr": "*i64", "order_ptr": "*i32", "blocks_ptr": "*i32", "counts_ptr": "*i32",
    **dict.fromkeys(("alpha", "limit", "up_offset", "eps", "floor", "scale"), "fp32"), "weights_ptr": "*fp32",
}  # fmt: skip
WIDTHS = {"D": 2048, "F": 768}


def check(kernel: Any, constants: dict[str, Any], arch: int) -> None:
    """It compiles, within the shared memory that a block has."""
    names = [n for n in kernel.arg_names if not n.isupper()]
    types = {n: TYPES.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in names}
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    shared = compiled(kernel, types, constants, arch, options).metadata.shared
    assert shared <= LIMIT[arch], f"{kernel} sm_{arch}: {shared} bytes of shared memory"


def main() -> None:
    plain = moe.Gating("silu", True, False, None, None, 0.0)
    odd = moe.Gating("silu", True, True, 1.702, 7.0, 1.0)
    for gating, arch in ((plain, 90), (odd, 80)):
        gate = {n: v for n, v in gating.arguments.items() if n.isupper()}
        pdl = {"PDL": arch >= 90}
        biased = {"HAS_BIAS": gating is odd}
        check(moe._up_pairs, {**WIDTHS, "K": 8, **biased, **gate, **moe._UP[0], **pdl}, arch)
        check(moe._down_tokens, {**WIDTHS, "K": 8, **biased, **moe._DOWN[0], **pdl}, arch)
        for block_m in (16, 128):
            for settings in moe_grouped._candidates(block_m, 2)[:2]:
                common = {
                    **WIDTHS, **biased, **settings,
                    "BLOCK_M": block_m, "SWAP": block_m < 64, "PRECISION": "tf32", "WIDE_DOT": False, "GROUP": 8,
                }  # fmt: skip
                if arch >= 90 or block_m < 64:  # where the largest tile does not fit, tuning leaves it out
                    check(moe_grouped._up_blocks, {**common, "K": 8, **gate}, arch)
                    check(moe_grouped._down_blocks, dict(common), arch)
        sort = {"EXPERTS": 128, "CHUNK": 256}
        check(moe_grouped._count, dict(sort), arch)
        check(moe_grouped._arrange, {**sort, "BLOCK_M": 64, "ROWS": 32, "PART": 32}, arch)
        check(moe_grouped._combine, {"D": 2048, "K": 8, "BLOCK": 1024}, arch)
        routing = {"SCORE": "sigmoid", "K": 8, "GROUPS": 8, "TOP_GROUPS": 4, "SIZE": 32, "NORMALIZE": True}
        blocks = {"BLOCK_G": 8, "BLOCK_S": 32, "BLOCK_K": 8}
        check(moe_topk._topk, {**routing, **blocks, **biased, **pdl}, arch)


if __name__ == "__main__":
    main()
