"""Compile the fused RoPE and the sampling kernels for an H100 without one; run in a process of its own."""

from __future__ import annotations

from typing import Any

from adkit.ops.triton import rope_cache, sampling
from tests.ops.triton_for_gpus import compiled


def types_of(kernel: Any, known: dict[str, str]) -> dict[str, str]:
    """A signature: what is known, pointers to bfloat16, other lower-case arguments int32."""
    lower = [n for n in kernel.arg_names if not n.isupper() and not n.split("_")[0].isupper()]
    return {n: known.get(n, "*bf16" if n.endswith("_ptr") else "i32") for n in lower}


def rope() -> None:
    floats = dict.fromkeys(("q_eps", "k_eps", "offset"), "fp32")
    types = types_of(rope_cache._rope_kv_cache, {"slot_ptr": "*i64", "cos_ptr": "*fp32", **floats})
    for norm in (False, True):
        for interleaved in (False, True):
            constants = {
                "HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 128, "VALUE_DIM": 128, "Q_NORM": norm, "K_NORM": norm,
                "Q_WEIGHT": norm, "K_WEIGHT": norm, "IN_FLOAT": False, "INTERLEAVED": interleaved,
                "HALF": 48, "PAIRS": 64, "REST": 32, "VALUES": 128, "GROUP": 4, "PDL": True,
            }  # fmt: skip
            compiled(rope_cache._rope_kv_cache, types, constants, 90)


def sample() -> None:
    doubles = ("setting_ptr", "state_ptr", "sums_ptr", "mass_ptr")
    known = dict.fromkeys(doubles, "*fp64") | dict.fromkeys(("peak_ptr", "top_ptr"), "*fp32")
    known |= {"at_ptr": "*i32", "token_ptr": "*i64"}
    sizes = {"SLICE": sampling._SLICE, "SLICES": 64, "DROP": 16}
    lanes = {"LANES": sampling._LANES}
    after = [("nothing", False), ("counts", False), ("last counts", True), ("first masses", True)]
    for kernel, constants in (
        (sampling._slice_peak, {"SLICE": sampling._SLICE}),
        (sampling._row_peak, {"SLICES": 64}),
        *((sampling._sum_digits, {**sizes, **lanes, "MASS": m, "AFTER": a}) for a, m in after),
        (sampling._slice_mass, {**sizes, "AFTER": "last masses"}),
        (sampling._draw, sizes),
    ):
        compiled(kernel, types_of(kernel, known), {**constants, "PDL": True}, 90)


if __name__ == "__main__":
    rope()
    sample()
