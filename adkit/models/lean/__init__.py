"""Models written by hand for sharding: their forwards are canonical ops with hints, their names Hugging Face's.

A lean model takes the Hugging Face config and checkpoint of its kind and computes what Hugging Face does;
``detect_sharding`` has nothing to find in it, ``apply_sharding_hints`` reads what its author wrote. A new one: a module
here, with a line in :data:`LEAN`.
"""

from __future__ import annotations

from typing import Any

from adkit.contract import ModelError
from adkit.models.lean.llama import LeanLlamaForCausalLM

#: Lean models by the Hugging Face config that they read.
LEAN: dict[str, type[Any]] = {cls.config_class.model_type: cls for cls in (LeanLlamaForCausalLM,)}


def lean_class(config: Any) -> type[Any]:
    """The lean model of a config's kind; ModelError naming those that there are."""
    if config.model_type not in LEAN:
        raise ModelError(
            f"there is no lean model for {config.model_type!r}, only for {', '.join(LEAN)}; leave lean out: "
            "Hugging Face's own is then captured, and detect_sharding writes the hints"
        )
    return LEAN[config.model_type]
