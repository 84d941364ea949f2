"""Per-token frequencies equal the module's own at every length; what cannot be computed so is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adkit.contract import ExportError
from adkit.models.hf.rope import PerTokenRope, layer_types
from tests.zoo import tiny_config

DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "max_position_embeddings": 16,
}


def rotary(kind: str, **more: object) -> nn.Module:
    import transformers

    config = tiny_config(kind, **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_scalings_that_do_not_depend_on_length_are_left_alone(kind: str) -> None:
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    assert layer_types(rotary("llama", rope_parameters=parameters)) == []


@pytest.mark.parametrize(
    ("kind", "more"),
    [("phi3", {}), ("phimoe", {}), ("llama", DYNAMIC), ("gpt_oss", DYNAMIC), ("cohere2", DYNAMIC)],
)
@pytest.mark.parametrize("length", [3, 15, 16, 17, 18, 61])
def test_per_token_equals_the_module_alone(kind: str, more: dict[str, object], length: int) -> None:
    module = rotary(kind, **more)
    x = torch.zeros(1, 1)
    positions = torch.arange(length)[None]
    per_token = PerTokenRope(module, "rotary", lambda: torch.full_like(positions, length))
    want = rotary(kind, **more)(x, positions)
    for a, b in zip(per_token(x, positions), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_tokens_of_one_row_may_have_different_lengths() -> None:
    module = rotary("llama", **DYNAMIC)
    lengths = torch.tensor([[9, 40, 100, 40]])
    positions = torch.tensor([[5, 30, 30, 5]])
    cos, _ = PerTokenRope(module, "rotary", lambda: lengths)(torch.zeros(1, 1), positions)
    for i, length in enumerate(lengths[0].tolist()):
        alone = rotary("llama", **DYNAMIC)(
            torch.zeros(1, 1), torch.tensor([[int(positions[0, i]), length - 1]])
        )[0]
        torch.testing.assert_close(cos[:, i], alone[:, 0], rtol=1e-6, atol=1e-6)


def test_an_unknown_dependence_on_length_is_refused() -> None:
    class Strange(LlamaRotaryEmbedding):
        def forward(self, x, position_ids):  # type: ignore[no-untyped-def]
            cos, sin = super().forward(x, position_ids)
            return cos.roll(1, -1), sin

    Strange.forward.__wrapped__ = LlamaRotaryEmbedding.forward  # type: ignore[attr-defined]
    with pytest.raises(ExportError, match="rotary_emb"):
        PerTokenRope(Strange(tiny_config("llama", **DYNAMIC)), "rotary_emb", lambda: torch.ones(1, 1))
