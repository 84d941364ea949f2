"""Which class of transformers a config builds. Neighbours: ``resolve`` asks whether, ``factory`` builds."""

from __future__ import annotations

from typing import Any


def has_causal_lm(config: Any) -> bool:
    """Whether transformers has a causal LM for the config."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or text_model_class(config) is not None


def text_model_class(config: Any) -> Any:
    """The causal LM for the text part of a multi-modal model, where only the whole model's config is mapped.

    transformers maps such a class (``Emu3ForCausalLM``) from the whole config (``Emu3Config``), builds it from
    the text config, and saves it with that: a checkpoint that its own auto class does not open. None for any
    other config.
    """
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = model_type_to_module_name(config.model_type)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
    found = (
        getattr(transformers, name, None) if isinstance(name, str) and family != config.model_type else None
    )
    return found if getattr(found, "config_class", None) is type(config) else None
