"""Routing to experts: score, choice, and weights of a token's k experts in one launch, a program a token."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adkit.ops.triton import pdl


@triton.jit
def _topk(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, eps, floor, scale,
    SCORE: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SIZE: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token; experts as [groups, experts of a group]. Of equal scores the first expert wins."""
    pdl.release(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_S)
    expert = group[:, None] * SIZE + member[None, :]
    live = (group < GROUPS)[:, None] & (member < SIZE)[None, :]
    lowest = float("-inf")
    pdl.wait(PDL)
    scores = tl.load(logits_ptr + token * (GROUPS * SIZE) + expert, live, lowest).to(tl.float32)
    if SCORE == "softmax":
        scores = tl.exp(scores - tl.max(tl.max(scores, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    elif SCORE == "sigmoid":
        scores = tl.sigmoid(scores)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, live, 0.0).to(tl.float32)
    choice = tl.where(live, choice, lowest)
    if TOP_GROUPS < GROUPS:
        strength = tl.max(choice, 1)
        if SIZE > 1:
            without = tl.where(member[None, :] == tl.argmax(choice, 1)[:, None], lowest, choice)
            strength += tl.max(without, 1)
        kept = tl.zeros([BLOCK_G], tl.int32)
        for _ in tl.static_range(TOP_GROUPS):
            strongest = group == tl.argmax(strength, 0)
            kept = tl.where(strongest, 1, kept)
            strength = tl.where(strongest, lowest, strength)
        choice = tl.where((kept != 0)[:, None], choice, lowest)
    flat = tl.arange(0, BLOCK_G * BLOCK_S)
    choice = tl.reshape(choice, [BLOCK_G * BLOCK_S])
    scores = tl.reshape(scores, [BLOCK_G * BLOCK_S])
    slot = tl.arange(0, BLOCK_K)
    weights = tl.zeros([BLOCK_K], tl.float32)
    ids = tl.zeros([BLOCK_K], tl.int64)
    for j in tl.static_range(K):
        at = tl.argmax(choice, 0)
        weights = tl.where(slot == j, tl.sum(tl.where(flat == at, scores, 0.0), 0), weights)
        ids = tl.where(slot == j, at // BLOCK_S * SIZE + at % BLOCK_S, ids)
        choice = tl.where(flat == at, lowest, choice)
    if SCORE == "topk_softmax":
        weights = tl.where(slot < K, weights, lowest)
        weights = tl.exp(weights - tl.max(weights, 0))
        weights = weights / tl.sum(weights, 0)
    if NORMALIZE:
        weights = weights / tl.maximum(tl.sum(weights, 0) + eps, floor)
    weights *= scale
    tl.store(weights_ptr + token * K + slot, weights.to(weights_ptr.dtype.element_ty), slot < K)
    tl.store(ids_ptr + token * K + slot, ids, slot < K)


def moe_topk(
    logits: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    score: str = "softmax",
    groups: int = 1,
    top_groups: int = 1,
    normalize: bool = False,
    eps: float = 0.0,
    floor: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch_moe_topk``: [..., E] -> weights and ids [..., k]."""
    rows, experts = logits.contiguous(), logits.shape[-1]
    shape = (*rows.shape[:-1], k)
    weights = rows.new_empty(shape, dtype=dtype or torch.promote_types(rows.dtype, torch.float32))
    ids = rows.new_empty(shape, dtype=torch.int64)
    size = experts // groups
    block_g, block_s = triton.next_power_of_2(groups), triton.next_power_of_2(size)
    if ids.numel():
        _topk[(ids.numel() // k,)](
            rows, None if bias is None else bias.contiguous(), weights, ids, eps, floor, scale,
            SCORE=score, K=k, GROUPS=groups, TOP_GROUPS=top_groups, SIZE=size, NORMALIZE=normalize,
            HAS_BIAS=bias is not None, BLOCK_G=block_g, BLOCK_S=block_s, BLOCK_K=triton.next_power_of_2(k),
            num_warps=1 if block_g * block_s <= 512 else 4, **pdl.launch(),
        )  # fmt: skip
    return weights, ids
