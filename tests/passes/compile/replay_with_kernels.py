"""Steps laid out for CUDA graphs, run by Triton's interpreter; in a process of its own, by test_compile_model.py.

Padding is what the kernels must bear: tokens that belong to no sequence, and sequences without tokens.
"""

from __future__ import annotations

import os
import sys
import tempfile

import adkit
from adkit.contract import SamplingParams
from adkit.passes.compile.cuda_graphs import StepGraphs, decode_layouts, prompt_layouts
from adkit.runtime.live import LiveModel
from tests.zoo import tiny

PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 8, 8]]
BY_KERNELS = ("insert_cached_attention", "fuse_rope_kv_cache", "fuse_gemm_epilogues")


def engine(model: str, kernels: bool) -> LiveModel:
    """Prompts in chunks of at most 16 tokens, mixed with decodes."""
    wb = adkit.Workbench(
        model, device="cpu", dtype="float32", max_seq_len=64, page_size=4, max_batch_size=6, max_num_tokens=16,
        progress=False,
    )  # fmt: skip
    for name in BY_KERNELS if kernels else ():
        wb.configure(name, backend="triton").enable(name)
    llm = wb.llm()
    assert kernels == ("adkit.triton_attention_with_paged_cache" in wb.graph.counts())
    return llm


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        tiny("llama")[1].save_pretrained(folder)
        want = engine(folder, False).generate(PROMPTS, params, progress=False)
        llm = engine(folder, True)
    model, ran = llm.engine.model, []

    def forward(**feed):  # type: ignore[no-untyped-def]
        ran.append((feed["input_ids"].shape[1], feed["cu_seqlens"].shape[0] - 1))
        return plain(**feed)

    plain = model.forward
    layouts = decode_layouts([1, 2, 4, 6], 16) + prompt_layouts([8, 16], 16, 6)
    model.replay = StepGraphs(forward, model.inputs, model.caches, layouts, 6, model.device)
    llm.engine.reset()
    got = llm.generate(PROMPTS, params, progress=False)
    assert [c.token_ids for c in got] == [c.token_ids for c in want]
    sizes = {(x.tokens, x.sequences) for x in layouts}
    assert set(ran) <= sizes, "a step ran as it was"
    assert (16, 6) in ran, "no step with prompts was padded"


if __name__ == "__main__":
    sys.exit(main())
