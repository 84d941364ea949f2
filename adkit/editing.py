"""Changing a pipeline's list of passes: what ``insert``, ``replace``, ``configure`` and ``move`` share."""

from __future__ import annotations

import copy
from typing import Any

from adkit.config import transform_config
from adkit.contract import ConfigError
from adkit.passes import Pass


def a_pass(new: Any) -> Pass:
    """A pass or a class of them as a pass; ConfigError for anything else."""
    p = new() if isinstance(new, type) and issubclass(new, Pass) else new
    if not isinstance(p, Pass):
        raise ConfigError(
            f"a step is a Pass or a class of them, not {new!r}; see CONTRIBUTING.md for how to write one"
        )
    return p


def beside(passes: list[Pass], p: Pass, anchor: Pass, after: bool) -> list[Pass]:
    """``passes`` with ``p`` next to ``anchor``; it takes the anchor's stage where its own would be out of
    order."""
    index = next(i for i, q in enumerate(passes) if q is anchor) + after
    place = p.config.stage.position
    if any(q.config.stage.position > place for q in passes[:index]) or any(
        q.config.stage.position < place for q in passes[index:]
    ):
        p = with_config(p, {"stage": anchor.config.stage})
    return [*passes[:index], p, *passes[index:]]


def with_config(p: Pass, fields: dict[str, Any]) -> Pass:
    """A copy of ``p`` with some config fields changed."""
    new = copy.copy(p)
    new.config = transform_config(p.key, type(p.config), {**p.config.model_dump(), **fields})
    return new
