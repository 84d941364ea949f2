"""Llama as it is written for sharding: every op says how it is cut, and computes the whole model as it stands.

The rules of the style, all in this file:

- What opens a region is ``colwise``, what closes it ``rowwise``, and one ``all_reduce`` follows; always, whatever the
  number of ranks: hints are facts about the model.
- Keys and values may have fewer heads than there are ranks: ``tp_min_local_shape`` is a head.
- A view whose literal counts heads names the dimension (``tp_scaled_dim``); sizes that follow are -1.
- ``layer_type`` lets a user cut some kinds of layers only (``shard_layers``).

Modules have Hugging Face's names and initialisation; only the forwards differ. B batch, S sequence, D model, N query
heads, K kv heads, H head dim, F ffn dim, V vocab.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaPreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.contract import ModelError
from adkit.ops.activation import ACTIVATIONS

ops: Any = torch.ops.adkit
#: Hugging Face's names of activations, where they are not ours.
_ACTS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def _norm(norm: Any, x: Tensor) -> Tensor:
    return ops.torch_rmsnorm(x, norm.weight, norm.variance_epsilon)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: [B, S, D] -> [B, S, D]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        wide, narrow, bias = self.heads * self.head_dim, self.kv_heads * self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """cos and sin [B, S, H]."""
        batch, length, _ = x.shape

        def heads(proj: nn.Linear, count: int) -> Tensor:
            y = ops.torch_linear_simple(
                x, proj.weight, proj.bias,
                tp_mode="colwise", tp_min_local_shape=self.head_dim, layer_type="mha",
            )  # fmt: skip
            shape = [batch, length, count, self.head_dim]
            return ops.view(y, shape, tp_scaled_dim=2, layer_type="mha")

        q, k = heads(self.q_proj, self.heads), heads(self.k_proj, self.kv_heads)
        v = heads(self.v_proj, self.kv_heads)
        q, k = ops.torch_rope_with_explicit_cos_sin(q, k, cos, sin, 2)
        o = ops.torch_attention(q, k, v, scale=self.head_dim**-0.5)
        flat = [batch, length, self.heads * self.head_dim]
        o = ops.view(o, flat, tp_scaled_dim=2, layer_type="mha")
        y = ops.torch_linear_simple(
            o, self.o_proj.weight, self.o_proj.bias, tp_mode="rowwise", layer_type="mha"
        )
        return ops.all_reduce(y, layer_type="mha")


class MLP(nn.Module):
    """A gated MLP: [B, S, D] -> [B, S, D]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        inner, bias = config.intermediate_size, config.mlp_bias
        self.act = _ACTS.get(config.hidden_act, config.hidden_act)
        if self.act not in ACTIVATIONS:
            raise ModelError(
                f"the lean llama has no activation {config.hidden_act!r}, only {', '.join(ACTIVATIONS)}; leave lean out"
            )
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Gate and up are cut alike, so their product needs no word between ranks."""
        gate, up = (
            ops.torch_linear_simple(x, p.weight, p.bias, tp_mode="colwise", layer_type="mlp")
            for p in (self.gate_proj, self.up_proj)
        )
        h, down = ops.torch_swiglu(gate, up, self.act), self.down_proj
        y = ops.torch_linear_simple(h, down.weight, down.bias, tp_mode="rowwise", layer_type="mlp")
        return ops.all_reduce(y, layer_type="mlp")


class Layer(nn.Module):
    """Attention and MLP, each on a norm of the residual stream, which every rank has whole."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, D]."""
        x = x + self.self_attn(_norm(self.input_layernorm, x), cos, sin)
        return x + self.mlp(_norm(self.post_attention_layernorm, x))


class Decoder(nn.Module):
    """Token ids [B, S] -> the normed residual stream [B, S, D]; rows of the table are shared out by token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Both int64 [B, S]."""
        rows = ops.embedding(self.embed_tokens.weight, input_ids, tp_mode="vocab", layer_type="vocab")
        x = ops.all_reduce(rows, layer_type="vocab")
        cos, sin = self.rotary_emb(x, position_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return _norm(self.norm, x)


class LeanLlamaForCausalLM(LlamaPreTrainedModel):
    """Token ids and positions [B, S] -> logits [B, S, V], of which each rank makes its share of V."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (Hugging Face's form)

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> CausalLMOutput:
        """Prefill only: caches come in by ``insert_cached_attention``."""
        x = self.model(input_ids, position_ids)
        logits = ops.torch_linear_simple(x, self.lm_head.weight, tp_mode="gather", layer_type="vocab")
        return CausalLMOutput(logits=logits)
