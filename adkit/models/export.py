"""A Hugging Face causal LM as one flat graph (minimal version; being extended)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

import adkit.ops  # noqa: F401


def _attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **kw):  # type: ignore[no-untyped-def]
    out = torch.ops.adkit.torch_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, s_aux, None,
        scale=scaling, softcap=softcap, window=sliding_window,
    )
    return out, None


def export_model(model: Any, attention: str = "interface") -> GraphModule:
    """Export with dynamic batch and sequence; inputs ``input_ids`` and ``position_ids`` int64 [B, S]."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("adkit", _attention)
    AttentionMaskInterface.register("adkit", lambda *a, **k: None)
    model.config._attn_implementation = "adkit" if attention == "interface" else attention
    model.config.use_cache = False
    device = next(model.parameters()).device
    ids = torch.zeros(2, 8, dtype=torch.long, device=device)
    pos = torch.arange(8, device=device).expand(2, 8)
    dyn = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        ep = torch.export.export(
            model.eval(), (), kwargs={"input_ids": ids, "position_ids": pos, "use_cache": False}, strict=False,
            dynamic_shapes={"input_ids": {0: dyn, 1: dyn}, "position_ids": {0: dyn, 1: dyn}, "use_cache": None},
        )
    return ep.module(check_guards=False)
