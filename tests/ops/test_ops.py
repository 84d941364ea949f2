"""Every canonical op: schema and fake agree with what runs, shapes on meta, dtypes and bits as in HF."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_attention
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from adkit.ops import MIXERS, OPS, info_of, pick

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def samples(dtype: torch.dtype) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for each op (keyword arguments last, as a dict), contiguous inputs and others."""
    r = lambda *s: rand(*s, dtype=dtype)  # noqa: E731
    heads = [r(2, 5, 4, 8), r(2, 5, 2, 8), r(2, 5, 2, 6)]
    bnsd = [t.transpose(1, 2) for t in heads]
    turned = r(2, 5, 8).cos(), r(2, 5, 8).sin()
    complex_ = torch.polar(torch.ones(2, 5, 4), torch.randn(2, 5, 4))
    ids = torch.tensor([[0, 2], [1, 0], [2, 3]])
    experts = [r(3, 8), ids, r(3, 2)]
    return {
        "attention": [
            (*heads,),
            (*bnsd, {"layout": "bnsd", "window": 3, "softcap": 4.0, "scale": 0.3}),
            (*heads, r(1, 4, 5, 5), r(4), r(4).abs(), {"is_causal": False, "chunk": 2}),
            (*heads, rand(2, 1, 5, 5) > 0, {"is_causal": False}),
        ],
        "attention_repeat_kv": [(heads[1], 2, 2)],
        "linear_simple": [
            (r(2, 5, 8), r(6, 8), r(6)),
            (r(5, 2, 8).transpose(0, 1), r(6, 8)),
            (r(2, 5, 8), r(6, 8), r(6), {"out_dtype": torch.float32}),
        ],
        "fused_linear": [
            (r(2, 5, 8), r(6, 8), r(6), r(8), r(2, 5, 6), 1e-6, 1.0, True),
            (r(5, 2, 8).transpose(0, 1), r(12, 8), {"eps": 1e-6, "act": "silu", "residual": r(2, 5, 6)}),
            (rand(2, 5, 8), r(6, 8), r(6), r(8), rand(2, 5, 6), 1e-6),
            (r(2, 5, 8), r(12, 8), {"act": "silu", "out_dtype": torch.float32}),
        ],
        "swiglu": [(r(2, 5, 8), r(2, 5, 8)), (r(8, 5).t(), r(8, 5).t(), "gelu_tanh")],
        "swiglu_packed": [(r(2, 5, 8), "gelu"), (r(8, 5).t(), "silu")],
        "moe": [
            (*experts, r(4, 12, 8), r(4, 8, 6)),
            (
                *experts,
                r(4, 8, 12),
                r(4, 6, 8),
                r(4, 12),
                r(4, 8),
                {"transposed": True, "interleaved": True, "alpha": 1.7},
            ),
            (*experts, r(4, 6, 8), r(4, 8, 6), {"gated": False, "act": "relu2"}),
        ],
        "moe_local_ids": [(torch.arange(20).view(2, 5, 2) % 4, 1, 2), (ids.t(), 0, 2)],
        "vocab_embedding": [(r(4, 8), torch.tensor([[5, 1, 7, 0, 6], [8, 9, 6, 5, 2]])[..., None], 5)],
        "moe_topk": [
            (r(2, 5, 8), 3, {"normalize": True, "dtype": dtype}),
            (r(5, 2, 8).transpose(0, 1), 2, rand(8), {"score": "sigmoid", "groups": 4, "top_groups": 2}),
            (r(5, 8), 8, {"score": "topk_softmax", "scale": 2.0}),
        ],
        "rmsnorm": [
            (r(2, 5, 8), r(8), 1e-6),
            (r(2, 5, 8), None, 1e-6),
            (r(2, 8, 5).transpose(1, 2), r(8), 1e-6, 1.0, True),
            (r(2, 5, 8), rand(8), 1e-6),
            (rand(2, 5, 8), r(8), 1e-6, {"out_dtype": dtype}),
        ],
        "fused_add_rmsnorm": [
            (r(2, 5, 8), r(2, 5, 8), r(8), 1e-6),
            (r(2, 8, 5).transpose(1, 2), rand(2, 8, 5).transpose(1, 2), None, 1e-6),
            (r(2, 5, 8), rand(2, 5, 8), r(8), 1e-6, {"out_dtype": dtype}),
        ],
        "l2norm": [(r(2, 5, 8), 1e-6), (r(2, 8, 5).transpose(1, 2), 1e-6)],
        "rope_with_explicit_cos_sin": [
            (heads[0], heads[1], *turned, 2),
            (bnsd[0], bnsd[1], *(t[..., :4] for t in turned)),
        ],
        "rope_with_qk_interleaving": [
            (heads[0], heads[1], *turned, 2),
            (bnsd[0], bnsd[1], *(t[..., :4] for t in turned)),
        ],
        "rope_with_complex_freqs": [(heads[0], heads[1], complex_, 2), (bnsd[0], bnsd[1], complex_)],
    }


CANONICAL = sorted(
    n.removeprefix("torch_")
    for n, info in OPS.items()
    if info.backend == "torch" and info.category != "dist" and not n.endswith(("_cache", "_"))
)


@pytest.mark.parametrize("wide", [False, True])
def test_a_sum_in_place_does_what_its_schema_says(wide: bool) -> None:
    residual = rand(2, 5, 6, dtype=torch.float32 if wide else torch.bfloat16)
    x, *weights = (rand(*s, dtype=torch.bfloat16) for s in ((2, 5, 8), (6, 8), (6,), (8,)))
    args = (residual, x.to(residual.dtype), *weights, 1e-6)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(pick("fused_linear_", "torch"), args, test_utils=tests)


def calls(name: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    for args in samples(dtype)[name]:
        kwargs = args[-1] if isinstance(args[-1], dict) else {}
        yield args[: -1 if kwargs else None], kwargs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CANONICAL)
@pytest.mark.filterwarnings("ignore:triton_")
def test_schema_fake_and_meta_agree_with_what_runs(name: str, dtype: torch.dtype) -> None:
    for args, kwargs in calls(name, dtype):
        for backend in ("torch", "triton"):
            if f"{backend}_{name}" in OPS:
                op = pick(name, backend)
                torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))
        out = pick(name, "torch")(*args, **kwargs)
        on_meta = pick(name, "torch")(*(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs)
        for real, meta in zip(*((o if isinstance(o, tuple) else (o,)) for o in (out, on_meta)), strict=True):
            assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())
            assert meta.device.type == "meta"
            assert real.isfinite().all()


@pytest.mark.parametrize("name", [n for n in CANONICAL if n != "moe"])
def test_batch_and_sequence_stay_open_under_export(name: str) -> None:
    args, kwargs = next(iter(calls(name, torch.float32)))

    class Module(torch.nn.Module):
        def forward(self, tensors: list[Tensor]) -> Any:
            given = iter(tensors)
            return pick(name, "torch")(*(next(given) if isinstance(a, Tensor) else a for a in args), **kwargs)

    tensors = [a for a in args if isinstance(a, Tensor)]
    batched = [
        {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} if t.dim() > 2 else {} for t in tensors
    ]
    program = torch.export.export(
        Module(), (), kwargs={"tensors": tensors}, dynamic_shapes={"tensors": batched}
    )
    torch.manual_seed(1)
    other = [torch.randn(3, 7, *t.shape[2:]).to(t.dtype) if t.dim() > 2 else t for t in tensors]
    torch.testing.assert_close(program.module()(tensors=other), Module()(other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hf", "offset", "in_float"),
    [(LlamaRMSNorm, 0.0, False), (Gemma2RMSNorm, 1.0, True), (Olmo2RMSNorm, 0.0, True)],
)
def test_rmsnorm_is_bit_equal_to_hf(dtype: torch.dtype, hf: Any, offset: float, in_float: bool) -> None:
    torch.manual_seed(0)
    module = hf(32, eps=1e-5).to(dtype)
    module.weight.data = rand(32, dtype=dtype)
    x = rand(3, 7, 32, dtype=dtype) * 5
    with torch.no_grad():
        assert torch.equal(pick("rmsnorm", "torch")(x, module.weight, 1e-5, offset, in_float), module(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 2])
def test_rope_is_bit_equal_to_hf(dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    q, k, cos, sin = (
        rand(2, 3, 4, 8, dtype=dtype),
        rand(2, 3, 4, 8, dtype=dtype),
        *(rand(2, 7, 8, dtype=dtype),) * 2,
    )
    cos, sin = (t[:, : q.shape[3 - dim]] for t in (cos, sin))
    got = pick("rope_with_explicit_cos_sin", "torch")(q, k, cos, sin, dim)
    for a, b in zip(got, apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=dim), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_as_close_to_float64_as_hf_is(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (
        rand(2, 40, 4, 16, dtype=dtype) * 3,
        rand(2, 40, 2, 16, dtype=dtype) * 3,
        rand(2, 40, 2, 16, dtype=dtype),
    )
    mask = torch.full((40, 40), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    module.eval()
    bnsd = [t.transpose(1, 2) for t in (q, k, v)]
    hf, _ = llama_attention(module, *bnsd, mask, scaling=0.25)
    exact = pick("attention", "torch")(q.double(), k.double(), v.double())
    error = (pick("attention", "torch")(q, k, v).double() - exact).pow(2).mean().sqrt()
    assert error <= 1.05 * (hf.double() - exact).pow(2).mean().sqrt()
    sdpa = torch.nn.functional.scaled_dot_product_attention(
        *(t.double() for t in bnsd), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(exact, sdpa, rtol=1e-12, atol=1e-12)


def test_a_query_that_may_attend_to_nothing_gives_zeros() -> None:
    q = rand(1, 3, 2, 4)
    keep = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])
    out = pick("attention", "torch")(q, q, q, keep, is_causal=False)
    assert (out[0, 1] == 0).all()
    assert out[0, 0].abs().sum() > 0


def test_token_local_ops_are() -> None:
    """Each output token of an op that says so depends on that input token alone."""
    torch.manual_seed(0)
    checked = 0
    for name in CANONICAL:
        if not info_of(pick(name, "torch")).token_local or name == "moe":  # type: ignore[union-attr]
            continue
        args, kwargs = next(iter(calls(name, torch.float32)))
        changed = [a.clone() if isinstance(a, Tensor) and a.dim() > 2 else a for a in args]
        for a in changed:
            if isinstance(a, Tensor) and a.dim() > 2:
                a[:, 2] = a[:, 2].roll(1, -1) + 1
        before, after = pick(name, "torch")(*args, **kwargs), pick(name, "torch")(*changed, **kwargs)
        for a, b in zip(*((o if isinstance(o, tuple) else (o,)) for o in (before, after)), strict=True):
            other = [0, 1, 3, 4]
            assert torch.equal(a[:, other], b[:, other])
            assert not torch.equal(a[:, 2], b[:, 2])
        checked += 1
    assert checked >= 8


def values(**change: Any) -> dict[str, Any]:
    q, kv, v = (torch.empty(1, 9, n, h, device="meta") for n, h in ((8, 64), (2, 64), (2, 32)))
    return {"query": q, "key": kv, "value": v, "attn_bias": None, "scale": 0.5, "window": 8, **change}


def test_the_attention_descriptor_names_caches_and_constants() -> None:
    mixer = MIXERS[pick("attention", "torch")]
    k, v = mixer.cache_specs(values(), 16, torch.bfloat16, "layers_0")
    assert (k.name, k.page_shape, k.dtype) == ("layers_0_k_cache", (16, 2, 64), torch.bfloat16)
    assert (v.name, v.page_shape, v.dtype) == ("layers_0_v_cache", (16, 2, 32), torch.bfloat16)
    constants = mixer.constants(values())
    assert constants == {"scale": 0.5, "is_causal": True, "softcap": None, "window": 8, "chunk": None}
    for cached in mixer.cached_ops.values():
        names = [a.name for a in cached._schema.arguments]
        assert tuple(names) == (*mixer.tensor_args, *mixer.metadata, "k_cache", "v_cache", *constants)
    assert set(mixer.cached_ops) == {"torch", "triton"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"layout": "bnsd"}, "layout is 'bnsd'.*match_attention_layout"),
        ({"is_causal": False}, "not causal"),
        ({"attn_bias": torch.zeros(1)}, "attn_bias.*packed batch"),
    ],
)
def test_the_attention_descriptor_says_why_it_refuses(change: dict[str, Any], why: str | None) -> None:
    reason = MIXERS[pick("attention", "torch")].refuse(values(**change))
    assert reason is None if why is None else re.search(why, str(reason))


def test_pick_by_backend_and_device() -> None:
    assert pick("rmsnorm", "triton") is torch.ops.adkit.triton_rmsnorm.default
    assert pick("rmsnorm", "auto", "cpu") is torch.ops.adkit.torch_rmsnorm.default
    assert pick("rmsnorm", "auto", "cuda:0") is torch.ops.adkit.triton_rmsnorm.default
    assert pick("moe", "auto", "cuda") is torch.ops.adkit.triton_moe.default
    with pytest.raises(ValueError, match="no op is called 'rmsnrm'; did you mean 'rmsnorm'"):
        pick("rmsnrm")
    with pytest.raises(ValueError, match="op 'l2norm' has no backend 'triton'"):
        pick("l2norm", "triton")


def test_a_product_in_float32_of_half_precision_is_rounded_nowhere() -> None:
    x, weight, bias = rand(3, 5, 1024).bfloat16(), rand(3000, 1024).bfloat16(), rand(3000).bfloat16()
    got = pick("linear_simple", "torch")(x, weight, bias, out_dtype=torch.float32)
    want = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
