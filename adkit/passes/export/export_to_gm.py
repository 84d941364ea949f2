"""``export_to_gm``: the module as one flat graph."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator

from adkit.graph.step import PassInfo
from adkit.models.export import ExportFacts, export_model
from adkit.passes.base import BuildPass, Context, PassConfig, Stage
from adkit.passes.registry import register


class ExportConfig(PassConfig):
    """How attention and experts are captured."""

    attention: Literal["interface", "sdpa", "eager"] = Field(
        "interface",
        description="interface: canonical ops through HF's extension points; "
        "sdpa, eager: HF's code, matched later (eager where sdpa would be wrong)",
    )
    experts: Literal["interface", "batched_mm"] = Field(
        "interface",
        description="interface: torch_moe through HF's extension point; "
        "batched_mm: HF's batched products, matched later",
    )

    @field_validator("experts", mode="before")
    @classmethod
    def _no_loop(cls, value: object) -> object:
        if value in ("eager", "grouped_mm"):
            raise ValueError(
                f"{value!r} follows what the router chose, which a graph cannot; use interface or batched_mm"
            )
        return value


@register
class ExportToGM(BuildPass):
    """Capture the module with non-strict ``torch.export`` into a flat FX graph.

    Inputs are keywords with dynamic batch and sequence. Attention and experts come in as canonical ops
    through Hugging Face's own extension points, so what the mask means (causal, window, chunk) is known, not
    guessed. A model that does not use them, or whose class does not support the mode asked for, keeps its own
    attention code in the graph; ``details`` says so.

        before: LlamaForCausalLM (a tree of modules)
        after:  input_ids, position_ids -> embedding -> ... -> adkit.torch_attention -> ... -> logits
    """

    key = "export_to_gm"
    stage = Stage.EXPORT
    Config: ClassVar[type[PassConfig]] = ExportConfig

    def build(self, module: torch.nn.Module | None, ctx: Context) -> tuple[torch.nn.Module, PassInfo]:
        """The graph module; ``details`` says its inputs and the attention mode that held, with notes."""
        gm = export_model(module, self.config.attention, self.config.experts)
        facts: ExportFacts = gm.meta["adkit_export"]
        for note in facts.notes:
            ctx.report(note)
        return gm, PassInfo(num_matches=1, is_clean=False, details=asdict(facts))
