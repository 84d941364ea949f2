"""adkit: a workbench that turns Hugging Face models into inference engines, one inspectable step at a time.

``Workbench(model)`` holds a model and its pipeline; ``LLM(model)`` is the engine without looking inside;
``Pass``, ``register`` and friends write a transform of your own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adkit.contract import AdkitError, Completion, SamplingParams
    from adkit.graph.step import PassInfo, Step
    from adkit.llm import LLM
    from adkit.passes import Context, Pass, PassConfig, Stage, register
    from adkit.playground import Playground
    from adkit.workbench import Workbench

_HOMES = {
    "AdkitError": "adkit.contract",
    "Completion": "adkit.contract",
    "Context": "adkit.passes",
    "LLM": "adkit.llm",
    "Pass": "adkit.passes",
    "PassConfig": "adkit.passes",
    "PassInfo": "adkit.graph.step",
    "Playground": "adkit.playground",
    "SamplingParams": "adkit.contract",
    "Stage": "adkit.passes",
    "Step": "adkit.graph.step",
    "Workbench": "adkit.workbench",
    "register": "adkit.passes",
}
__all__ = [
    "LLM",
    "AdkitError",
    "Completion",
    "Context",
    "Pass",
    "PassConfig",
    "PassInfo",
    "Playground",
    "SamplingParams",
    "Stage",
    "Step",
    "Workbench",
    "register",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: `import adkit` stays quick, and objects draw themselves once one exists.
    if name in _HOMES:
        import_module("adkit.viz")
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'adkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
