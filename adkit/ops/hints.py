"""Hints: ops that say how a graph is to be cut, and compute what the uncut model computes.

A graph with hints runs on one device as it is. ``apply_sharding_hints`` reads each hint by itself, with nothing but
the :class:`~adkit.contract.DistConfig`, and puts one rank's part in its place; at world size 1 it leaves the plain op.
``layer_type`` is one of :data:`LAYER_TYPES` and lets ``shard_layers`` choose. ``torch_linear_simple`` and ``torch_moe``
take their hints as keywords. Quantised and recurrent ops will add their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adkit.ops.registry import define, info_of

LAYER_TYPES = ("mha", "mla", "mlp", "moe", "ssm", "delta", "vocab", "unknown")
TP_MODES = ("colwise", "rowwise", "gather", "none")
_KEYWORDS = frozenset({"tp_mode", "output_sizes", "tp_min_local_shape", "shardable", "layer_type"})


def is_hint(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """True for a call of a hint op, or of an op that carries hints as keywords."""
    info = info_of(target)
    return info is not None and (info.category == "hint" or not _KEYWORDS.isdisjoint(kwargs))


@define(
    "view(Tensor x, SymInt[] shape, *, int? tp_scaled_dim=None, int tp_min_local_shape=1, "
    'str layer_type="unknown") -> Tensor',
    category="hint",
    token_local=False,
    backend="hint",
    fake=lambda x, shape, **_: torch.empty_like(x.reshape(shape)),
)
def view(
    x: Tensor,
    shape: Sequence[int],
    *,
    tp_scaled_dim: int | None = None,
    tp_min_local_shape: int = 1,
    layer_type: str = "unknown",
) -> Tensor:
    """``x.view(shape)``, where ``shape[tp_scaled_dim]`` counts something that is cut (heads).

    No rank has fewer of it than ``tp_min_local_shape``; -1 and symbolic sizes are left to follow.
    """
    return x.reshape(shape).clone()


@define(
    "split_with_sizes(Tensor x, SymInt[] sizes, int dim=-1, *, bool shardable=True, "
    'int tp_min_local_shape=1, str layer_type="unknown") -> Tensor[]',
    category="hint",
    token_local=False,
    backend="hint",
    fake=lambda x, sizes, dim=-1, **_: [torch.empty_like(t) for t in x.split(sizes, dim)],
)
def split_with_sizes(
    x: Tensor,
    sizes: Sequence[int],
    dim: int = -1,
    *,
    shardable: bool = True,
    tp_min_local_shape: int = 1,
    layer_type: str = "unknown",
) -> list[Tensor]:
    """``x.split(sizes, dim)``, where each size shrinks with the ranks if ``shardable``, to no less than
    ``tp_min_local_shape`` (fused Q|K|V with fewer kv heads than ranks)."""
    return [t.clone() for t in x.split(list(sizes), dim)]


@define(
    'all_reduce(Tensor x, *, str layer_type="unknown") -> Tensor',
    category="hint",
    token_local=True,
    backend="hint",
    fake=lambda x, **_: torch.empty_like(x),
)
def all_reduce(x: Tensor, *, layer_type: str = "unknown") -> Tensor:
    """``x``, which on ranks is a part of a sum over them: here they add up."""
    return x.clone()


@define(
    'all_gather(Tensor x, int dim, *, str layer_type="unknown") -> Tensor',
    category="hint",
    token_local=True,
    backend="hint",
    fake=lambda x, dim, **_: torch.empty_like(x),
)
def all_gather(x: Tensor, dim: int, *, layer_type: str = "unknown") -> Tensor:
    """``x``, which on ranks is a piece along ``dim``: here they are joined."""
    return x.clone()


@define(
    'reduce_scatter(Tensor x, int dim, *, str layer_type="unknown") -> Tensor',
    category="hint",
    token_local=True,
    backend="hint",
    fake=lambda x, dim, **_: torch.empty_like(x),
)
def reduce_scatter(x: Tensor, dim: int, *, layer_type: str = "unknown") -> Tensor:
    """``x``, which on ranks is a part of a sum over them, of which each keeps its piece along ``dim``."""
    return x.clone()


@define(
    "shard(Tensor x, int dim, *, int[]? output_sizes=None, int tp_min_local_shape=1, "
    'str layer_type="unknown") -> Tensor',
    category="hint",
    token_local=True,
    backend="hint",
    fake=lambda x, dim, **_: torch.empty_like(x),
)
def shard(
    x: Tensor,
    dim: int,
    *,
    output_sizes: Sequence[int] | None = None,
    tp_min_local_shape: int = 1,
    layer_type: str = "unknown",
) -> Tensor:
    """``x``, of which each rank keeps its share along ``dim``: of each of the blocks ``output_sizes`` where given, and
    never less than ``tp_min_local_shape`` elements (copies where there are more ranks than that).

    For what linears do not carry themselves: attention sinks, head-wise norm weights, tables of slopes.
    """
    return x.clone()


@define(
    'embedding(Tensor weight, Tensor ids, *, str tp_mode="vocab", str layer_type="vocab") -> Tensor',
    category="hint",
    token_local=True,
    backend="hint",
    fake=lambda weight, ids, **_: weight.new_empty((*ids.shape, weight.shape[1])),
)
def embedding(weight: Tensor, ids: Tensor, *, tp_mode: str = "vocab", layer_type: str = "vocab") -> Tensor:
    """weight [V, D], ids [...] -> [..., D]. ``vocab``: a rank holds rows of its share and gives zeros for other ids, so
    that the ranks' sum is the embedding (an ``all_reduce`` follows)."""
    return F.embedding(ids, weight)


@define(
    "rmsnorm(Tensor input, Tensor? weight, float eps, float weight_offset=0.0, bool weight_in_float=False, *, "
    'str layer_type="unknown") -> Tensor',
    category="hint",
    token_local=True,
    backend="hint",
    fake=lambda input, weight, *_, **__: torch.empty_like(input),
)
def rmsnorm(
    input: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    weight_in_float: bool = False,
    *,
    layer_type: str = "unknown",
) -> Tensor:
    """``torch_rmsnorm`` over a dimension that is cut: on ranks ``torch_dist_sharded_rmsnorm``."""
    plain: Any = torch.ops.adkit.torch_rmsnorm
    return plain(input, weight, eps, weight_offset, weight_in_float)
