"""Compile the kernels for named GPUs without one; run by test_triton.py in a process of its own.

Checks what the interpreter cannot: types, ``tl.dot`` shapes, and shared memory (A100 163 KiB, H100 227 KiB a
block).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adkit.ops.triton import attention, flash_decoding, flash_prefill, linear, mlp, norm, rope
from adkit.ops.triton.attention_step import widths

LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, options: Any = None
) -> Any:
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def attend(head_dim: int, dtype: str, itemsize: int, arch: int, full: bool) -> None:
    """Both attention kernels with the settings that they start from."""
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": head_dim,
        "KV_HEADS": 2,
        "HEADS_PER_KV": 4,
        "PAGE_SIZE": 16,
        "WINDOW": 128 if full else 0,
        "CHUNK": 256 if full else 0,
        "HAS_SOFTCAP": full,
        "HAS_SINKS": full,
        "HAS_ALIBI": full,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "WIDE_DOT": False,
        **widths(head_dim, head_dim),
    }
    for kernel, settings, own in (
        (
            flash_decoding.decode,
            flash_decoding.candidates(itemsize, **widths(head_dim, head_dim))[0],
            {"ALONE": True, "BLOCK_M": 16, "GROUP": 4, "PARTS": 8, "RELEASE": full, "PDL": arch >= 90},
        ),
        (
            flash_prefill.prefill,
            flash_prefill.candidates(itemsize, **widths(head_dim, head_dim))[0],
            {"FROM": 2, "DESCRIPTORS": False, "BLOCK_R": 256},
        ),
    ):
        options = {n: settings[n] for n in ("num_warps", "num_stages")}
        blocks = {n: v for n, v in settings.items() if n.isupper()}
        names = [n for n in kernel.arg_names if not n.isupper()]
        types = {n: f"*{dtype}" if n.endswith(("_ptr", "_tiles")) else "i32" for n in names}
        types |= dict.fromkeys(("cu_ptr", "cached_ptr", "pages_ptr", "counter_ptr"), "*i32")
        types |= dict.fromkeys(("partial_ptr", "softmax_ptr"), "*fp32")
        types |= {"scale": "fp32", "softcap": "fp32"}
        types = {n: t for n, t in types.items() if n in names}
        made = compiled(kernel, types, {**constants, **blocks, **own}, arch, options)
        shared = made.metadata.shared
        assert shared <= LIMIT[arch], f"{head_dim} {dtype} sm_{arch}: {shared} bytes of shared memory"


def multiply(
    way: dict[str, Any],
    rows: int,
    dtype: str,
    itemsize: int,
    act: str,
    arch: int,
    wide: bool = False,
    outs: int | None = None,
) -> None:
    in_registers = linear.row_kernel if rows == 1 else linear.rows_kernel
    kernel = {"rows": in_registers, "stream": linear.stream_kernel, "tiles": linear.tiles_kernel}[way["path"]]
    pointers = [n for n in kernel.arg_names if n.endswith("_ptr")]
    types = dict.fromkeys(pointers, f"*{dtype}") | {"parts_ptr": "*fp32", "counts_ptr": "*i32"}
    if wide:  # a residual stream in float32, which tiles do not norm
        types |= dict.fromkeys(("residual_ptr", "out_ptr"), "*fp32")
        types |= {} if way["path"] == "tiles" else {"x_ptr": "*fp32"}
    types |= dict.fromkeys(("many", "splits", "width", "outs"), "i32") | {"eps": "fp32", "offset": "fp32"}
    if outs is not None:  # numbers of which a kernel is made for one value
        del types["outs"]
    flags = {} if outs is None else {"outs": outs}
    flags |= {"NORM": way.get("inline", True), "HAS_NORM_WEIGHT": True, "HAS_BIAS": True, "HAS_RESIDUAL": True,
             "ACT": act, "BLOCK_N": way["BLOCK_N"], "PDL": arch >= 90}  # fmt: skip
    if way["path"] == "rows":
        flags |= {"BLOCK_K": way["num_warps"] * 512 // itemsize} | ({} if rows == 1 else {"ROWS": rows})
    elif way["path"] == "stream":
        flags |= {"BLOCK_K": 4096}
    else:
        flags |= {"BLOCK_M": rows, "BLOCK_K": way["BLOCK_K"], "SPLIT": way["SPLIT"] > 1, "WIDE_DOT": False,
                  "AHEAD": 256, "PRECISION": "ieee" if itemsize == 4 else "tf32"}  # fmt: skip
    types = {n: t for n, t in types.items() if n in kernel.arg_names}
    options = {n: way[n] for n in ("num_warps", "num_stages") if n in way}
    made = compiled(kernel, types, flags, arch, options)
    assert made.metadata.shared <= LIMIT[arch], f"{way} {rows} {dtype} sm_{arch}"
    waits = "griddepcontrol.wait" in made.asm["ptx"]
    assert waits == (arch >= 90)


def main() -> None:
    attend(64, "bf16", 2, 80, full=True)
    attend(80, "bf16", 2, 80, full=False)
    attend(256, "bf16", 2, 80, full=False)
    attend(256, "fp32", 4, 80, full=False)
    attend(128, "fp16", 2, 90, full=True)
    write = dict.fromkeys(("key_ptr", "value_ptr", "k_cache_ptr", "v_cache_ptr"), "*bf16")
    counts = dict.fromkeys(("k_width", "v_width", "key_token", "value_token"), "i32")
    compiled(attention._write_kv, {**write, **counts, "slot_ptr": "*i64"}, {"BLOCK": 1024}, 90)
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr"), "*bf16")
    for residual, in_float in ((True, False), (False, True)):
        flags = {
            "HAS_RESIDUAL": residual,
            "HAS_WEIGHT": True,
            "IN_FLOAT": in_float,
            "BLOCK": 4096,
            "PDL": True,
        }
        compiled(norm._rmsnorm, {**pointers, "width": "i32", "eps": "fp32", "offset": "fp32"}, flags, 90)
    for act in ("silu", "gelu"):
        types = {"x_ptr": "*bf16", "out_ptr": "*bf16", "width": "i32"}
        compiled(mlp._swiglu_packed, types, {"ACT": act, "BLOCK": 1024, "PDL": True}, 90)
    for interleaved in (True, False):
        names = [n for n in rope._rotate.arg_names if not n.isupper()]
        types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in names}
        compiled(rope._rotate, types, {"INTERLEAVED": interleaved, "HEADS": 32, "PAIRS": 64, "REST": 16}, 90)
    row, first, *_ = (linear.candidates(n, 4096, 4096, True, torch.bfloat16)[0] for n in (1, 64))
    multiply(row, 1, "bf16", 2, "silu", 90)
    multiply(row, 4, "fp32", 4, "", 80)
    multiply(first, 64, "bf16", 2, "silu", 90)
    stream = next(w for w in linear.candidates(1, 4096, 4096, True, torch.bfloat16) if w["path"] == "stream")
    for way, rows in ((row, 1), (stream, 1), (row, 4), (first, 64)):
        multiply(way, rows, "bf16", 2, "", 90, wide=True)
    for way in (row, stream):
        multiply(way, 1, "bf16", 2, "silu", 90, outs=1)
    multiply(linear.candidates(16, 1024, 2048, False, torch.float32)[0], 16, "fp32", 4, "", 80)


if __name__ == "__main__":
    main()
