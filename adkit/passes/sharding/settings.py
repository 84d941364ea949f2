"""Fields that the sharding transforms share (AutoDeploy's names), and the world that they name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from adkit.contract import AllGatherStrategy, AllReduceStrategy, DistConfig, ShardingError, nearest
from adkit.ops.hints import LAYER_TYPES
from adkit.passes.base import PassConfig

#: Keys of ``dist_mapping`` -> fields of DistConfig.
_MAPPING = {
    "world": "world_size", "tp": "tp_size", "pp": "pp_size", "moe_tp": "moe_tp_size", "moe_ep": "moe_ep_size",
    "moe_cluster": "moe_cluster_size", "rank": "rank",
}  # fmt: skip


class WorldConfig(PassConfig):
    """Which layers are cut, and the world that they are cut for."""

    shard_layers: list[str] | None = Field(
        None,
        description=f"Layer types to cut ({', '.join(LAYER_TYPES[:-1])}); null: all. If given, unknown ones stay whole",
    )
    dist_mapping: dict[str, int] = Field(
        default_factory=dict,
        description="Sizes as tp, moe_tp, moe_ep, ...; must agree with the world that runs",
    )
    dist_config: DistConfig | None = Field(
        None,
        description="The world as a whole; what it names must agree with the one that runs, but for the rank; its "
        "allreduce_strategy counts where the field of that name is AUTO",
    )

    @field_validator("shard_layers")
    @classmethod
    def _known(cls, given: list[str] | None) -> list[str] | None:
        for name in given or ():
            if name not in LAYER_TYPES:
                raise ValueError(f"no layer type {name!r}{nearest(name, LAYER_TYPES)}")
        return given

    def cuts(self, layer_type: str) -> bool:
        """Whether layers of this type are cut."""
        return self.shard_layers is None or (layer_type in self.shard_layers and layer_type != "unknown")


class ShardingConfig(WorldConfig):
    """How ranks talk, and what is cut without a region."""

    allreduce_strategy: AllReduceStrategy = Field(
        "AUTO",
        description="How sums over ranks are made; apply_sharding_hints' own goes before detect_sharding's",
    )
    allgather_strategy: AllGatherStrategy = Field(
        "AUTO",
        description="How pieces of ranks are joined; apply_sharding_hints' own goes before detect_sharding's",
    )
    dist_backend: Literal["auto", "torch", "trtllm"] = Field(
        "auto", description="Library of the collectives; auto and trtllm: torch, the one that is here"
    )
    simple_shard_filter: str | None = Field(
        None,
        description="Comma-separated parts of names: linears with one of them that are not cut otherwise get their "
        "output features cut and joined, whatever shard_layers says",
    )

    def simple(self, *names: str) -> bool:
        """Whether one of the names has a word of ``simple_shard_filter``."""
        words = [w.strip() for w in (self.simple_shard_filter or "").split(",") if w.strip()]
        return any(word in name for word in words for name in names)

    @property
    def reduce(self) -> AllReduceStrategy:
        """How sums are to be made, as far as this pass was told."""
        if self.allreduce_strategy != "AUTO" or self.dist_config is None:
            return self.allreduce_strategy
        return self.dist_config.allreduce_strategy


def agreed_world(config: WorldConfig, running: DistConfig) -> DistConfig:
    """The world that runs; ShardingError where ``dist_config`` or ``dist_mapping`` name another.

    Settings are the same on every rank, so the rank that they name says nothing.
    """
    named: dict[str, object] = {}
    for key, value in config.dist_mapping.items():
        name = _MAPPING.get(key.removesuffix("_size"))
        if name is None:
            raise ShardingError(f"dist_mapping has no {key!r}{nearest(key, _MAPPING)}; each also with _size")
        named[name] = value
    if config.dist_config is not None:
        for name in config.dist_config.model_fields_set - {"allreduce_strategy"}:  # no size: see ``reduce``
            value = getattr(config.dist_config, name)
            if named.setdefault(name, value) != value:
                raise ShardingError(
                    f"dist_mapping says {name}={named[name]}, dist_config {value}: say it once, or the same"
                )
    if named.get("pp_size", 1) != 1:
        raise ShardingError(
            f"pp_size={named['pp_size']}: pipeline parallelism is not there; use tp_size instead"
        )
    differ = {n: v for n, v in named.items() if n != "rank" and v != getattr(running, n)}
    if differ:
        told = ", ".join(f"{n}={v} (running: {getattr(running, n)})" for n, v in differ.items())
        raise ShardingError(
            f"dist_config or dist_mapping do not fit the world that runs: {told}. It comes from "
            "Workbench(dist=...), wb.shard(tp=...) or --tp; set the same sizes there, or leave these fields out"
        )
    return running
