"""Hugging Face's attention interface, answered with ``torch.ops.adkit.torch_attention``."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from adkit.contract import ExportError
from adkit.models.hf.masks import MaskDescriptor

# Arguments that attention_interface understands, and those that cannot change its result without a cache,
# padding or training.
_UNDERSTOOD = frozenset(
    {"scaling", "softcap", "s_aux", "position_bias", "is_causal", "sliding_window", "dropout"}
)
_HARMLESS = frozenset(
    (
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "position_ids",
        "cache_position",
        "position_embeddings",
        "use_cache",
        "past_key_values",
        "past_key_value",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "num_items_in_batch",
        "training",
        "kwargs",
        "args",
        "head_mask",
        "layer_idx",
        "cache",
        "logits_to_keep",
    )
)


class AttentionInterface:
    """Calls ``torch_attention`` for every attention module; ``names`` are the modules' paths, for messages.

    ``notes`` collects what a reader should know, such as a window that only flash kernels would apply.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.notes: list[str] = []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query [B, N, S, H], key [B, K, S, H], value [B, K, S, Hv] -> ([B, S, N, Hv], None).

        Raises ExportError naming the module when the mask or an argument is not understood.
        """
        name = f"{self.names.get(id(module), '?')} ({type(module).__name__})"
        mask = self._mask(module, name, attention_mask, kwargs)
        self._refuse_unknown(module, name, kwargs)
        window = kwargs.get("sliding_window")
        if isinstance(window, int) and window != mask.window and not (mask.window is None and mask.chunk):
            self._note(
                f"{name} names a window of {window}; its mask has {mask.window}, and that is what "
                "Hugging Face's eager code obeys"
            )
        out = torch.ops.adkit.torch_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            kwargs.get("position_bias"),
            kwargs.get("s_aux"),
            None,
            scale=kwargs.get("scaling"),
            is_causal=mask.causal,
            softcap=kwargs.get("softcap"),
            window=mask.window,
            chunk=mask.chunk,
        )
        return out, None

    def _mask(self, module: nn.Module, name: str, mask: Any, kwargs: dict[str, Any]) -> MaskDescriptor:
        if isinstance(mask, MaskDescriptor):
            if mask.problem is not None:
                raise ExportError(
                    f"attention of {name} cannot be expressed: {mask.problem}; "
                    "export with export_to_gm.attention = 'eager' to keep Hugging Face's own code"
                )
            return mask
        if mask is not None:
            raise ExportError(
                f"attention of {name} got a mask tensor {tuple(mask.shape)} whose meaning is not known; "
                "export with export_to_gm.attention = 'eager' to keep Hugging Face's own code"
            )
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if causal is not False:
            raise ExportError(
                f"attention of {name} got no mask although it is causal: Hugging Face's eager and SDPA code "
                "disagree on what that means; export with export_to_gm.attention = 'eager' or 'sdpa'"
            )
        return MaskDescriptor(causal=False)

    def _refuse_unknown(self, module: nn.Module, name: str, kwargs: dict[str, Any]) -> None:
        """What the module's own eager attention reads, and any tensor, must be understood."""
        eager = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
        named = set(inspect.signature(eager).parameters) if eager is not None else set()
        for key, given in kwargs.items():
            if given is None or key in _UNDERSTOOD or key in _HARMLESS:
                continue
            if key in named or isinstance(given, Tensor):
                what = f"a tensor {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
                raise ExportError(
                    f"attention of {name} got {key}={what}, which torch_attention has no place for; "
                    "export with export_to_gm.attention = 'eager' to keep Hugging Face's own code"
                )
        if kwargs.get("dropout"):
            raise ExportError(f"attention of {name} has dropout {kwargs['dropout']}; export it in eval mode")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
