"""The demo model on a GPU: right on both backends, in float32 and in bfloat16."""

from __future__ import annotations

import pytest
import torch

import adkit
from adkit.models.demo.tasks import MAX_NEW_TOKENS, addition_tasks, is_correct, recall_tasks

pytestmark = pytest.mark.gpu
PROMPTS = ["What is 27 + 45?", "Once upon a time", "Tom has a red kite. What does Tom have?"]


@pytest.fixture(scope="module")
def reference():
    """Greedy tokens of the float32 demo model on CPU."""
    llm = adkit.Workbench("demo", device="cpu", dtype="float32", progress=False).llm()
    return llm.generate(PROMPTS, adkit.SamplingParams(max_tokens=256, ignore_eos=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float32_greedy_equals_the_cpu(reference, backend):
    names = ("insert_cached_attention", "fuse_rmsnorm", "fuse_add_rms_norm", "fuse_swiglu", "fuse_rope")
    wb = adkit.Workbench(
        "demo",
        device="cuda",
        dtype="float32",
        progress=False,
        overrides=[f"transforms.{n}.backend={backend}" for n in names],
    )
    got = wb.llm().generate(PROMPTS, adkit.SamplingParams(max_tokens=256, ignore_eos=True))
    for a, b in zip(got, reference, strict=True):
        assert a.token_ids == b.token_ids


def test_bfloat16_solves_the_tasks_and_every_step_checks():
    wb = adkit.Workbench("demo", device="cuda", progress=False)
    llm = wb.llm()
    assert wb.factory.dtype == torch.bfloat16
    tasks = addition_tasks(100) + recall_tasks(100)
    done = llm.generate([t.prompt for t in tasks], adkit.SamplingParams(max_tokens=MAX_NEW_TOKENS))
    assert sum(is_correct(t, c.text) for t, c in zip(tasks, done, strict=True)) >= 198
    assert wb.check().ok
