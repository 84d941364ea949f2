"""Experts and routing: kernels (run apart, see triton_moe.py), code for GPUs, and the routing op itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from adkit.ops import pick
from tests.ops.test_triton import needs_triton, run
from tests.zoo import tiny_config


@pytest.mark.slow
@needs_triton
def test_kernels_equal_float64_in_the_interpreter() -> None:
    file = Path(__file__).with_name("triton_moe.py")
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_gpus_within_their_shared_memory() -> None:
    done = run([str(Path(__file__).with_name("moe_for_gpus.py"))], TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.gpu
@needs_triton
def test_kernels_equal_float64_on_a_gpu() -> None:
    file = Path(__file__).with_name("triton_moe.py")
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


ROUTERS: list[tuple[Any, str, dict[str, Any]]] = [
    (MixtralTopKRouter, "mixtral", {"normalize": True}),
    (Qwen3MoeTopKRouter, "qwen3_moe", {}),
    (GptOssTopKRouter, "gpt_oss", {"score": "topk_softmax"}),
    (
        DeepseekV3TopkRouter,
        "deepseek_v3",
        {"score": "sigmoid", "groups": 2, "normalize": True, "eps": 1e-20, "scale": 2.5},
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("router", "kind", "options"), ROUTERS)
def test_routing_is_bit_equal_to_hf(
    router: Any, kind: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = router(tiny_config(kind)).to(dtype)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.randn(tensor.shape).to(tensor.dtype)
    with torch.no_grad():
        logits, weights, ids = module(torch.randn(50, 48).to(dtype))
    bias = getattr(module, "e_score_correction_bias", None)
    got = pick("moe_topk", "torch")(logits, module.top_k, bias, dtype=weights.dtype, **options)
    dense = [torch.zeros_like(logits, dtype=weights.dtype).scatter(1, i, w) for w, i in ((weights, ids), got)]
    assert torch.equal(*dense)
    assert (got[0].dtype, got[1].dtype) == (weights.dtype, ids.dtype)
