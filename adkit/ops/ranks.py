"""What one rank computes with its part where the plain op would need the whole: no word to the other ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from adkit.ops.registry import define


@define(
    "torch_vocab_embedding(Tensor weight, Tensor ids, int start) -> Tensor",
    category="embedding",
    token_local=True,
    fake=lambda weight, ids, start: weight.new_empty((*ids.shape, weight.shape[1])),
)
def torch_vocab_embedding(weight: Tensor, ids: Tensor, start: int) -> Tensor:
    """Rows of a share of the vocabulary: weight [V/world, D] is rows ``start`` and on, ids [...] -> [..., D].

    Zeros for an id of another share, so that the ranks' sum is the embedding.
    """
    local = ids - start
    foreign = (local < 0) | (local >= weight.shape[0])
    return F.embedding(local.masked_fill(foreign, 0), weight).masked_fill(foreign[..., None], 0)


@define(
    "torch_moe_local_ids(Tensor topk_ids, int start, int experts) -> Tensor",
    category="moe",
    token_local=True,
    fake=lambda topk_ids, start, experts: topk_ids.new_empty(topk_ids.shape),
)
def torch_moe_local_ids(topk_ids: Tensor, start: int, experts: int) -> Tensor:
    """Ids counted from this rank's first expert: topk_ids [T, k] -> [T, k].

    It has ``experts`` of them, ``start`` and on. Any other becomes an id of ``experts`` or more, which is no expert
    (``torch_moe``).
    """
    local = topk_ids.contiguous() - start
    return local.masked_fill(local < 0, experts)
