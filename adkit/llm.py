"""``LLM``: generate without looking inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adkit.runtime.live import LiveModel


def LLM(model: Any, **options: Any) -> LiveModel:
    """Compile ``model`` and return the engine: ``adkit.LLM("demo").generate("Once upon a time")``.

    Takes what :class:`adkit.Workbench` takes, and runs its whole pipeline.
    """
    from adkit.workbench import Workbench

    return Workbench(model, **options).llm()
