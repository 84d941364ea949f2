"""``LLM``: generate without looking inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adkit.runtime.live import LiveModel


def LLM(model: Any, *, tp: int = 1, ranks: Mapping[str, Any] | None = None, **options: Any) -> LiveModel:
    """Compile ``model`` and return the engine: ``adkit.LLM("demo").generate("Once upon a time")``.

    Takes what :class:`adkit.Workbench` takes, and runs its whole pipeline. ``tp``: on so many ranks, with options
    ``ranks``, as :meth:`adkit.Workbench.llm` has them; ``with adkit.LLM("demo", tp=2) as llm:`` ends them.
    """
    from adkit.workbench import Workbench

    return Workbench(model, **options).llm(tp, **(ranks or {}))
