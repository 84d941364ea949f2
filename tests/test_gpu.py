"""The demo model on a GPU: right on both backends, in float32 and in bfloat16."""

from __future__ import annotations

import gc

import pytest
import torch

import adkit
from adkit.contract import MemoryLimitError
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


@pytest.mark.parametrize(
    ("overlap", "backend"), [(True, "torch-cudagraph"), (True, "eager"), (False, "torch-cudagraph")]
)
def test_overlap_and_graphs_change_nothing(reference, overlap, backend):
    wb = adkit.Workbench(
        "demo",
        device="cuda",
        dtype="float32",
        overlap=overlap,
        max_num_tokens=16,  # prompts in chunks, mixed with decodes
        progress=False,
        overrides=[f"transforms.compile_model.backend={backend}"],
    )
    got = wb.llm().generate(PROMPTS, adkit.SamplingParams(max_tokens=256, ignore_eos=True))
    assert [c.token_ids for c in got] == [c.token_ids for c in reference]


def test_steps_wait_for_nothing_but_their_tokens():
    llm = adkit.Workbench("demo", device="cuda", max_num_tokens=24, progress=False).llm()
    engine = llm.engine
    kinds = [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}, {"repetition_penalty": 1.2}, {"logprobs": 2}]

    def run():
        ids = [llm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        handles = [engine.add(i, adkit.SamplingParams(max_tokens=40, **kind)) for i in ids for kind in kinds]
        while engine.has_work:
            engine.step()
        for handle in handles:
            if handle.error is not None:
                raise handle.error

    run()
    engine.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.stats.requests == 2 * len(PROMPTS) * len(kinds)


def test_the_first_sampled_request_compiles_nothing(monkeypatch):
    from triton import knobs

    llm = adkit.Workbench("demo", device="cuda", progress=False).llm()
    compiled = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda *args, **kwargs: compiled.append(kwargs["fn"].module)
    )
    filters = [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 5, "top_p": 0.9}]
    for each in filters:
        params = adkit.SamplingParams(max_tokens=8, temperature=1.0, seed=1, ignore_eos=True, **each)
        assert len(llm.generate(PROMPTS[0], params, progress=False).token_ids) == 8
    assert not [module for module in compiled if module.endswith("sampling")]


def test_not_finite_logits_end_one_request_and_no_other():
    llm = adkit.Workbench("demo", device="cuda", dtype="float32", progress=False).llm()
    params = adkit.SamplingParams(max_tokens=60, ignore_eos=True)
    alone = llm.generate(PROMPTS[1], params)
    engine = llm.engine
    engine.reset()
    bad, good = (engine.add(llm.tokenizer(p)["input_ids"], params) for p in PROMPTS[:2])
    while bad.num_output < 20:
        engine.step()
    for cache in engine.model.caches.tensors.values():
        cache[bad.pages[0]] = float("nan")
    while engine.has_work:
        engine.step()
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert tuple(good.output) == alone.token_ids
    assert all(cache[1:].isfinite().all() for cache in engine.model.caches.tensors.values())
    assert engine.pages.held == 0


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("load_weights", "to load the weights: use a smaller dtype"),
        ("resize_kv_cache", "for a step of max_num_tokens=65536: lower max_num_tokens"),
        ("compile_model", "to capture CUDA graphs for batch sizes up to 32: lower free_gpu_memory_fraction"),
    ],
)
def test_out_of_memory_says_what_to_lower_and_can_be_tried_again(step, message):
    wb = adkit.Workbench("demo", device="cuda", max_num_tokens=65536, max_seq_len=256, progress=False)
    names = [s.name for s in wb.steps]
    wb.run(until=names[names.index(step) - 1])
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(MemoryLimitError, match=f"no memory left on cuda.* {message}"):
            wb.run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert wb.steps[wb.position].name == step
    assert "72" in wb.llm().generate(PROMPTS[0], adkit.SamplingParams(max_tokens=20)).text


def test_bfloat16_solves_the_tasks_and_every_step_checks():
    wb = adkit.Workbench("demo", device="cuda", progress=False)
    llm = wb.llm()
    assert wb.factory.dtype == torch.bfloat16
    tasks = addition_tasks(100) + recall_tasks(100)
    done = llm.generate([t.prompt for t in tasks], adkit.SamplingParams(max_tokens=MAX_NEW_TOKENS))
    assert sum(is_correct(t, c.text) for t, c in zip(tasks, done, strict=True)) >= 198
    assert wb.check().ok
