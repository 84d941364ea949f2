"""A causal LM written by hand: its experts are stacked weights in batched products that no matcher makes an op of."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class StackedConfig(LlamaConfig):
    """A llama with ``num_stacked`` experts in each layer; all of them work on every token."""

    model_type = "adkit_stacked"
    num_stacked = 4


class StackedExperts(nn.Module):
    """Layer 0 weighs its experts by a soft router and adds them up; layer 1 keeps the largest of each feature."""

    def __init__(self, config: StackedConfig, layer: int) -> None:
        super().__init__()
        e, d, f = config.num_stacked, config.hidden_size, config.intermediate_size
        self.router = nn.Linear(d, e, bias=False)
        self.up = nn.Parameter(torch.empty(e, d, f))
        self.bias = nn.Parameter(torch.empty(e, 1, f))
        self.down = nn.Parameter(torch.empty(e, d, f))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = flat.unsqueeze(0).expand(self.up.shape[0], -1, -1)
        h = torch.baddbmm(self.bias, h, self.up)
        y = torch.matmul(nn.functional.silu(h), self.down.transpose(1, 2))
        if self.layer:
            return y.amax(0).view(x.shape)
        gates = self.router(flat).softmax(-1)
        return (y * gates.t().unsqueeze(-1)).sum(0).view(x.shape)


class StackedForCausalLM(LlamaForCausalLM):
    """A llama with StackedExperts in place of its MLPs."""

    config_class = StackedConfig

    def __init__(self, config: StackedConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.mlp = StackedExperts(config, i)


AutoConfig.register(StackedConfig.model_type, StackedConfig, exist_ok=True)
AutoModelForCausalLM.register(StackedConfig, StackedForCausalLM, exist_ok=True)


def saved_stacked(folder: Path) -> Path:
    """A checkpoint of it in ``folder``: four experts, four heads, two layers."""
    torch.manual_seed(0)
    config = StackedConfig(
        vocab_size=144, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = StackedForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1.0))
    model.save_pretrained(folder)
    return folder
