"""The memory behind caches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adkit.contract import CachePool, CacheSpec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_pages_are_zero_of_their_shape_and_their_own(dtype: torch.dtype) -> None:
    pool = CachePool((CacheSpec("k", (4, 2, 8), dtype), CacheSpec("v", (4, 2, 8), dtype)), 4)
    pool.allocate(3, "cpu")
    k, v = pool.tensors["k"], pool.tensors["v"]
    assert (k.shape, k.dtype) == ((3, 4, 2, 8), dtype)
    assert not k.any()
    k[1] = 1
    assert not v.any()
    pool.wipe([1])
    assert not k.any()
    pool.allocate(2, "meta")
    assert pool.tensors["k"].is_meta


def test_a_cpu_gives_memory_to_pages_that_are_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("the resident memory of a process is told by Linux alone")
    pool = CachePool((CacheSpec("k", (1 << 20,), torch.float32),), 1)
    before = resident()
    pool.allocate(256, "cpu")  # 1 GiB
    assert resident() - before < 1 << 28
    pool.tensors["k"][:128] = 1
    assert resident() - before >= 1 << 28
