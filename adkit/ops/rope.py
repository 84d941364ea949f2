"""Canonical rotary position embeddings. q [B, S, N, H] / [B, N, S, H], cos and sin [B, S, R], R <= H.

Only the first R of H dimensions rotate (partial rotary); ``unsqueeze_dim`` is where the head dimension goes
in cos and sin: 1 for bnsd, 2 for bsnd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adkit.ops import costs
from adkit.ops.registry import define


def _fake(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, dim: int, interleaved: bool) -> Tensor:
    r = cos.shape[-1]
    cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)
    rot, rest = x[..., :r], x[..., r:]
    if interleaved:
        half = torch.stack((-rot[..., 1::2], rot[..., 0::2]), -1).flatten(-2)
    else:
        half = torch.cat((-rot[..., r // 2 :], rot[..., : r // 2]), -1)
    out = rot * cos + half * sin
    return torch.cat((out, rest), -1).to(x.dtype).contiguous()


_ARGS = "Tensor q, Tensor k, Tensor cos, Tensor sin, int unsqueeze_dim=1) -> (Tensor, Tensor)"


@define(
    f"torch_rope_with_explicit_cos_sin({_ARGS}",
    category="rope",
    token_local=True,
    fake=_fake,
    cost=costs.rope,
)
def torch_rope_with_explicit_cos_sin(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Half-rotated RoPE (arXiv 2104.09864; NeoX, Llama): pairs (i, i + R/2), cos and sin hold both halves."""
    return _rotate(q, cos, sin, unsqueeze_dim, False), _rotate(k, cos, sin, unsqueeze_dim, False)


@define(
    f"torch_rope_with_qk_interleaving({_ARGS}", category="rope", token_local=True, fake=_fake, cost=costs.rope
)
def torch_rope_with_qk_interleaving(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Interleaved RoPE (GPT-J, Cohere, GLM): pairs (2i, 2i + 1), cos and sin hold each value twice."""
    return _rotate(q, cos, sin, unsqueeze_dim, True), _rotate(k, cos, sin, unsqueeze_dim, True)


@define(
    "torch_rope_with_complex_freqs(Tensor q, Tensor k, Tensor freqs_cis, int unsqueeze_dim=1) "
    "-> (Tensor, Tensor)",
    category="rope",
    token_local=True,
    fake=_fake,
    cost=costs.rope,
)
def torch_rope_with_complex_freqs(
    q: Tensor, k: Tensor, freqs_cis: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """RoPE as complex product (Llama 4, DeepSeek): pairs (2i, 2i + 1), freqs_cis complex [B, S, H/2]."""

    def turn(x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * freqs_cis.unsqueeze(unsqueeze_dim)).flatten(-2).to(x.dtype).contiguous()

    return turn(q), turn(k)
