"""Checkpoints and Workbenches of tiny models, made once a session: exporting is most of the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import adkit
from adkit.sharding import VirtualRanks
from tests.sharding.models import bench, saved


class Models:
    """``models("llama")`` is its Workbench before sharding; ``models.shard("llama", tp=2)`` fresh virtual ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.benches: dict[Any, adkit.Workbench] = {}

    def path(self, kind: str, **more: Any) -> Path:
        name = "-".join(f"{k}{v}" for k, v in sorted(more.items()))
        (self.folder / name).mkdir(exist_ok=True)
        return saved(self.folder / name, kind, **more)

    def __call__(self, kind: str, **more: Any) -> adkit.Workbench:
        key = (kind, *sorted(more.items()))
        if key not in self.benches:
            self.benches[key] = bench(self.path(kind, **more))
        return self.benches[key]

    def shard(self, kind: str, tp: int, **options: Any) -> VirtualRanks:
        return self(kind).shard(tp, **options)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("sharding"))
