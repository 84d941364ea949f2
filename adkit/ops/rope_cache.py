"""RoPE that also writes the cache: what a layer does to queries, keys and values between projection and attention.

One op instead of up to four (norm of q, norm of k, RoPE, cache write), because at decode each of them moves a
few kilobytes and costs a launch. The pass ``fuse_rope_kv_cache`` puts it into graphs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adkit.ops import costs
from adkit.ops.cached_attention import write_slots
from adkit.ops.norm import torch_rmsnorm
from adkit.ops.registry import define
from adkit.ops.rope import torch_rope_with_explicit_cos_sin, torch_rope_with_qk_interleaving


def _fake(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@define(
    "torch_rope_kv_cache(Tensor query, Tensor key, Tensor value, Tensor? q_weight, Tensor? k_weight, "
    "Tensor cos, Tensor sin, Tensor slot_mapping, Tensor(a!) k_cache, Tensor(b!) v_cache, *, "
    "bool interleaved=False, float? q_eps=None, float? k_eps=None, float weight_offset=0.0, "
    "bool weight_in_float=False) -> (Tensor, Tensor)",
    category="rope",
    token_local=True,
    fake=_fake,
    cost=costs.rope_kv_cache,
)
def torch_rope_kv_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    interleaved: bool = False,
    q_eps: float | None = None,
    k_eps: float | None = None,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise heads, rotate them, put keys and values into their slots; the rotated query and key.

    query [1, T, N, H], key [1, T, K, H], value [1, T, K, Hv], strided as they come; cos and sin [1, T, R],
    R <= H; slot_mapping [T]; k_cache [P, page_size, K, H] and v_cache [P, page_size, K, Hv] change in place
    -> [1, T, N, H], [1, T, K, H]. ``q_eps`` and ``k_eps`` say that the query's and the key's heads are
    normalised first, by ``torch_rmsnorm`` with weights [H] (None: scale-free) and the two flags; None: not.
    ``interleaved`` is the pairing of ``torch_rope_with_qk_interleaving``, else that of
    ``torch_rope_with_explicit_cos_sin``.
    """
    if q_eps is not None:
        query = torch_rmsnorm(query, q_weight, q_eps, weight_offset, weight_in_float)
    if k_eps is not None:
        key = torch_rmsnorm(key, k_weight, k_eps, weight_offset, weight_in_float)
    rope = torch_rope_with_qk_interleaving if interleaved else torch_rope_with_explicit_cos_sin
    query, key = rope(query, key, cos, sin, 2)
    write_slots(k_cache, slot_mapping, key[0])
    write_slots(v_cache, slot_mapping, value[0])
    return query, key
