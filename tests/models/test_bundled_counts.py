"""Every bundled config at full size has exactly the canonical ops that its architecture calls for.

The numbers are worked out from the configs' layers by hand. All on shapes alone: nothing is downloaded.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import adkit
from adkit.models import bundled_names

ROPE = ("rope_with_explicit_cos_sin", "rope_with_qk_interleaving", "rope_with_complex_freqs")

# name -> what pattern matching must leave. ``norms``: RMS norms. ``ropes``: rotated query and key pairs.
# ``windows``: how many attentions have which window.
EXPECTED: dict[str, dict[str, Any]] = {
    # Llama, a layer: 2 norms, attention, one rotated pair, SwiGLU, 7 projections; then a norm and lm_head.
    "llama-3.2-1b": {
        "norms": 2 * 16 + 1,
        "attention": 16,
        "ropes": 16,
        "swiglu": 16,
        "moe": 0,
        "linear": 7 * 16 + 1,
        "windows": {None: 16},
    },
    "llama-3.1-8b": {
        "norms": 65,
        "attention": 32,
        "ropes": 32,
        "swiglu": 32,
        "moe": 0,
        "linear": 7 * 32 + 1,
        "windows": {None: 32},
    },
    "llama-3.1-405b": {
        "norms": 2 * 126 + 1,
        "attention": 126,
        "ropes": 126,
        "swiglu": 126,
        "moe": 0,
        "linear": 7 * 126 + 1,
        "windows": {None: 126},
    },
    # Qwen3 norms queries and keys of every head as well.
    "qwen3-0.6b": {
        "norms": 4 * 28 + 1,
        "attention": 28,
        "ropes": 28,
        "swiglu": 28,
        "moe": 0,
        "linear": 7 * 28 + 1,
        "windows": {None: 28},
    },
    "qwen3-8b": {
        "norms": 4 * 36 + 1,
        "attention": 36,
        "ropes": 36,
        "swiglu": 36,
        "moe": 0,
        "linear": 7 * 36 + 1,
        "windows": {None: 36},
    },
    # ... and its mixture: four projections of attention and the router are left of the linear layers.
    "qwen3-30b-a3b": {
        "norms": 4 * 48 + 1,
        "attention": 48,
        "ropes": 48,
        "swiglu": 0,
        "moe": 48,
        "linear": 5 * 48 + 1,
        "windows": {None: 48},
    },
    # Gemma 2 norms before and after both blocks; every other layer, from the first on, has a window.
    "gemma-2-9b": {
        "norms": 4 * 42 + 1,
        "attention": 42,
        "ropes": 42,
        "swiglu": 42,
        "moe": 0,
        "linear": 7 * 42 + 1,
        "windows": {4096: 21, None: 21},
    },
    "gpt-oss-20b": {
        "norms": 2 * 24 + 1,
        "attention": 24,
        "ropes": 24,
        "swiglu": 0,
        "moe": 24,
        "linear": 5 * 24 + 1,
        "windows": {128: 12, None: 12},
    },
    "mixtral-8x7b": {
        "norms": 65,
        "attention": 32,
        "ropes": 32,
        "swiglu": 0,
        "moe": 32,
        "linear": 5 * 32 + 1,
        "windows": {None: 32},
    },
    # DeepSeek V3, expanded latent attention: norms of the compressed queries and keys too, five projections.
    # 3 dense layers of 3 projections; 58 sparse ones with a router and a shared expert like a dense MLP.
    "deepseek-v3": {
        "norms": 4 * 61 + 1,
        "attention": 61,
        "ropes": 61,
        "swiglu": 3 + 58,
        "moe": 58,
        "linear": 5 * 61 + 3 * 3 + 58 * (1 + 3) + 1,
        "windows": {None: 61},
    },
}
ALTERNATING = ("gemma-2-9b", "gpt-oss-20b")


def attentions(wb: adkit.Workbench) -> list[Any]:
    return [n for n in wb.module.graph.nodes if "torch_attention" in str(n.target)]  # type: ignore[union-attr]


def test_every_bundled_config_has_its_counts() -> None:
    assert set(EXPECTED) == set(bundled_names()) - {"demo"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_counts_at_full_size(name: str) -> None:
    wb = adkit.Workbench(name, progress=False).run("pattern_matcher")
    counts = wb.graph.counts()
    nodes = attentions(wb)
    found = {
        "norms": counts.get("adkit.torch_rmsnorm", 0),
        "attention": counts.get("adkit.torch_attention", 0),
        "ropes": sum(counts.get(f"adkit.torch_{op}", 0) for op in ROPE),
        "swiglu": counts.get("adkit.torch_swiglu", 0),
        "moe": counts.get("adkit.torch_moe", 0),
        "linear": counts.get("adkit.torch_linear_simple", 0),
        "windows": dict(Counter(n.kwargs.get("window") for n in nodes)),
    }
    assert found == EXPECTED[name]
    assert counts.get("adkit.torch_moe_topk", 0) == found["moe"]  # every router is understood
    assert all(n.kwargs.get("is_causal", True) and n.kwargs.get("chunk") is None for n in nodes)
    assert all(n.kwargs.get("softcap") == (50.0 if name == "gemma-2-9b" else None) for n in nodes)
    sinks = [n.args[4] for n in nodes if len(n.args) > 4]
    assert len({s.target for s in sinks}) == (24 if name == "gpt-oss-20b" else 0)
    if name in ALTERNATING:
        windows = [n.kwargs.get("window") for n in nodes]
        assert windows[1::2] == [None] * (len(nodes) // 2)
        assert None not in windows[::2]
    # nothing of what the ops replaced is left
    left = ("rsqrt", "aten.silu", "aten.gelu", "aten.bmm", "scaled_dot_product", "aten.linear")
    assert not [op for op in counts if op.startswith(left) or any(x in op for x in left)]
