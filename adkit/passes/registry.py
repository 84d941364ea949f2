"""The flat list of transforms by key: every module below a stage folder is one transform."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from adkit.contract import ConfigError, nearest
from adkit.passes.base import Pass

_PASSES: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Class decorator: make the pass available by its key. A later class replaces an earlier one of its
    key."""
    for name in ("key", "stage"):
        if not hasattr(cls, name):
            raise TypeError(f"{cls.__name__} needs a class attribute {name!r}")
    if not cls.__doc__:
        raise TypeError(f"{cls.__name__} needs a docstring: it is what the user is shown")
    _PASSES[cls.key] = cls
    return cls


@cache
def _load_all() -> None:
    import adkit.passes as package

    mine = dict(_PASSES)
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(info.name)
    _PASSES.update(
        mine
    )  # what was registered before, such as a user's variant of a pass of ours, still counts


def all_passes() -> dict[str, type[Pass]]:
    """Every registered pass by key."""
    _load_all()
    return dict(_PASSES)


def get_pass(key: str) -> type[Pass]:
    """The pass class of a key; ConfigError with the nearest name for an unknown key."""
    passes = all_passes()
    if key not in passes:
        raise ConfigError(f"no transform {key!r}{nearest(key, passes)}")
    return passes[key]
