"""Decode steps from static buffers, and what happens where CUDA graphs cannot be had (the graphs: test_gpu)."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adkit.contract import CachePool, HostBatch, MemoryLimitError, SamplingParams
from adkit.passes.compile import compile_model
from adkit.passes.compile.cuda_graphs import StepGraphs, decode_layouts, ladder, prompt_ladder, prompt_layouts

PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6]]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
ATTENTION_BY_TRITON = {"transforms": {"insert_cached_attention": {"backend": "triton"}}}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """``compile_model`` takes the way to CUDA graphs, without a device that could capture one."""
    monkeypatch.setattr(compile_model.CompileModel, "_backend", lambda self, gm, ctx: ("torch-cudagraph", ""))
    for name in ("warm_up", "capture"):
        monkeypatch.setattr(StepGraphs, name, lambda self, progress: None)
    return monkeypatch


@pytest.mark.parametrize("most", [1, 3, 8, 32, 100, 512, 1024, 2000])
def test_the_ladder_pads_no_batch_much_and_ends_at_the_largest(most):
    sizes = ladder(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(most, 1024)
    for rows in range(1, sizes[-1] + 1):
        padded = next(n for n in sizes if n >= rows)
        assert padded - rows < max(8, rows / 2)


@pytest.mark.parametrize("most", [1, 5, 128, 200, 2048])
def test_steps_with_prompts_have_room_for_few_and_for_many_sequences(most):
    counts = prompt_ladder(most)
    assert counts[-1] == min(most, 1024)
    assert min(counts) == min(most, 128)
    for sequences in (1, 4, 300):
        layouts = prompt_layouts(counts, 7, sequences)
        assert all(1 <= x.sequences == x.logits < x.tokens for x in layouts)
        assert {x.tokens for x in layouts} == {t for t in counts if t > 1}
        assert {x.sequences for x in layouts if x.tokens == 1024} <= {min(8, sequences), sequences}


def test_steps_from_static_buffers_give_the_same_tokens(exported):
    llm = exported(max_batch_size=6, overlap=True).llm()
    expected = llm.generate(PROMPTS, PARAMS, progress=False)
    model = llm.engine.model
    ran = []

    def forward(**feed):
        ran.append((feed["input_ids"].shape[1], feed["cu_seqlens"].shape[0] - 1))
        return plain(**feed)

    plain = model.forward
    pages = math.ceil(64 / model.caches.page_size)
    layouts = decode_layouts([2, 4], pages) + prompt_layouts([8, 16, 32], pages, 6)
    model.replay = StepGraphs(forward, model.inputs, model.caches, layouts, 6, model.device)
    llm.engine.reset()
    assert llm.generate(PROMPTS, PARAMS, progress=False) == expected
    assert ran == [(16, 6)] + [(4, 4)] * 11, "prompts of twelve tokens, then three sequences"
    assert model.replay.layout(5, 5) is None
    assert model.replay.layout(33, 2) is None


def test_out_of_memory_at_capture_says_what_to_lower(exported, as_on_a_gpu):
    def full(self, progress):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    as_on_a_gpu.setattr(StepGraphs, "warm_up", full)
    wb = exported(max_batch_size=12)
    with pytest.raises(
        MemoryLimitError, match=r"batch sizes up to 12: lower free_gpu_memory_fraction.*3 GiB"
    ):
        wb.llm()
    assert wb.steps[wb.position].name == "compile_model"
    as_on_a_gpu.undo()
    assert wb.llm().generate([5], PARAMS, progress=False).token_ids


def test_a_kernel_that_fell_back_to_reading_on_the_host_is_not_captured(exported, as_on_a_gpu):
    as_on_a_gpu.setattr(compile_model, "fallen_back", lambda: {"triton_attention_with_paged_cache"})
    wb = exported(config=ATTENTION_BY_TRITON)
    wb.llm()
    step = wb.steps["compile_model"]
    assert step.info.details["backend"] == "eager"
    assert "triton_attention_with_paged_cache (its kernel did not compile)" in "\n".join(step.log)
    assert wb.llm().engine.model.replay is None


def test_a_kernel_that_fell_back_to_device_code_is_captured(exported, as_on_a_gpu):
    as_on_a_gpu.setattr(compile_model, "fallen_back", lambda: {"triton_rmsnorm"})
    wb = exported(config=ATTENTION_BY_TRITON)
    assert wb.llm().engine.model.replay is not None
    details = wb.steps["compile_model"].info.details
    assert details["backend"] == "torch-cudagraph"
    assert {"batch sizes", "capture seconds", "capture bytes"} <= set(details)


@pytest.mark.gpu
def test_captured_sizes_share_the_memory_of_their_logits():
    table = torch.randn(64, 1 << 20, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    sizes = [4, 8, 16, 24, 32, 40, 48, 56, 64]

    def forward(input_ids, logits_indices):  # gathers by itself, as compiled graphs do: no second copy
        return table[input_ids[0, logits_indices] % 64][None]  # idle steps feed back what they find

    inputs = ("input_ids", "logits_indices")
    graphs = StepGraphs(forward, inputs, CachePool((), 4), decode_layouts(sizes, 1), 64, table.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graphs.warm_up()
    graphs.capture()
    row = table[0].nbytes
    assert torch.cuda.memory_reserved() - before < 1.5 * sizes[-1] * row < sum(sizes) * row
    for rows in (64, 3, 40, 8, 64):
        layout = graphs.layout(rows, rows)
        host = HostBatch(layout, torch.zeros(layout.nbytes, dtype=torch.uint8), rows)
        fields = layout.arrays(host.buffer)
        ids = torch.randperm(64)[:rows]
        fields["input_ids"][0, :rows] = ids.numpy()
        fields["sources"][:] = graphs.num_previous + torch.arange(layout.tokens).numpy()
        fields["logits_indices"][:] = torch.arange(layout.logits).numpy()
        logits, best = graphs(host, None)
        assert torch.equal(logits, table[ids.cuda()])
        assert torch.equal(best, table[ids.cuda()].argmax(-1))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_bear_the_padding_of_steps_with_prompts():
    root = Path(__file__).parents[3]
    path = os.pathsep.join((str(root), *filter(None, [os.environ.get("PYTHONPATH")])))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("replay_with_kernels.py"))],
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
