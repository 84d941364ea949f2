"""What a module's ``meta`` says beside its graph: how weights were fused and cut, and the plan behind that; as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from pydantic import TypeAdapter

from adkit.contract import LocalWeight
from adkit.graph.placement import PLAN, ShardingPlan
from adkit.models.loading import FUSED, LOCAL

#: Keys of ``meta`` that belong to a place in the pipeline: going back brings back what they said there.
RECORDS = (FUSED, LOCAL, PLAN)


def records_of(module: torch.nn.Module) -> dict[str, Any]:
    """What a module's ``meta`` says of its weights and its plan; passes may go on changing the original."""
    meta = getattr(module, "meta", {})
    return {k: dict(meta[k]) if isinstance(meta[k], dict) else meta[k] for k in RECORDS if k in meta}


def as_data(records: Mapping[str, Any]) -> dict[str, Any]:
    """Records as JSON has them."""
    plan = records.get(PLAN)
    return {
        "recipes": {k: list(v) for k, v in records.get(FUSED, {}).items()},
        "local": {k: asdict(v) for k, v in records.get(LOCAL, {}).items()},
        "plan": None if plan is None else asdict(plan),
    }


def from_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Records that :func:`as_data` wrote, those that say something; raises pydantic's ValidationError for others."""
    found: dict[str, Any] = {
        FUSED: {k: tuple(v) for k, v in data["recipes"].items()},
        LOCAL: TypeAdapter(dict[str, LocalWeight]).validate_python(data["local"]),
        PLAN: None if data["plan"] is None else TypeAdapter(ShardingPlan).validate_python(data["plan"]),
    }
    return {k: v for k, v in found.items() if v}
