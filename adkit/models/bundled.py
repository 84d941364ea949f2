"""Model configs shipped with adkit: full-size shapes of public models, no weights, for offline work."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

_CONFIGS = resources.files("adkit.models") / "configs"


@cache
def bundled_names() -> tuple[str, ...]:
    """Names of the bundled configs, sorted."""
    return tuple(sorted(f.name.removesuffix(".json") for f in _CONFIGS.iterdir() if f.name.endswith(".json")))


def bundled_config(name: str) -> dict[str, Any]:
    """The config of a bundled name (any case) as a ``config.json`` dictionary; KeyError otherwise."""
    if name.lower() not in bundled_names():
        raise KeyError(name)
    return dict(json.loads((_CONFIGS / f"{name.lower()}.json").read_text(encoding="utf-8")))


def demo_directory() -> Path:
    """Directory of the demo model's checkpoint, which ships with the package."""
    return Path(str(resources.files("adkit.models") / "demo"))
