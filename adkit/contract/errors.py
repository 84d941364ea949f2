"""The errors adkit raises on purpose. Each message says what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdkitError(Exception):
    """Base of every error adkit raises on purpose."""


class ConfigError(AdkitError, ValueError):
    """A configuration names something unknown or a value that cannot work."""


class ModelError(AdkitError):
    """A model cannot be found, read or built."""


class CheckpointError(ModelError):
    """A checkpoint is missing, corrupt, or does not fit the model."""


class ExportError(AdkitError):
    """A model could not be turned into a graph, or what its graph means could not be established."""


class PassError(AdkitError):
    """A pass failed or left a broken graph; the Workbench stands at the step before it."""


class ShardingError(AdkitError):
    """A model cannot be cut as asked, or ranks cannot be had."""


class MemoryLimitError(AdkitError):
    """Something does not fit the device's memory."""


class EngineError(AdkitError):
    """The model failed while it served requests."""


class RankError(EngineError):
    """A rank failed, and with it the world: every rank has been ended. ``rank`` is the one at fault."""

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class RequestError(AdkitError, ValueError):
    """A generation request cannot be served as given."""


def nearest(given: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest known name, else the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, 1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
