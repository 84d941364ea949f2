"""``LLM``: generate without looking inside."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adkit.runtime.live import LiveModel


def LLM(model: Any, *, tp: int = 1, **options: Any) -> LiveModel:
    """Compile ``model`` and return the engine: ``adkit.LLM("demo").generate("Once upon a time")``.

    Takes what :class:`adkit.Workbench` takes and runs its whole pipeline, on ``tp`` ranks with the options that
    :meth:`adkit.Workbench.llm` takes (``attention_dp``, ``timeout``...); ``with adkit.LLM("demo", tp=2) as llm:`` ends
    them. Raises ConfigError for an option that is neither's.
    """
    from adkit.contract import ConfigError, EngineConfig, nearest
    from adkit.ranks import OPTIONS
    from adkit.workbench import Workbench

    known = {*OPTIONS, *signature(Workbench).parameters, *EngineConfig.model_fields} - {"engine"}
    for name in options:
        if name not in known:
            raise ConfigError(f"LLM() has no option {name!r}{nearest(name, known)}")
    ranks = {name: options.pop(name) for name in OPTIONS if name in options}
    return Workbench(model, **options).llm(tp, **ranks)
