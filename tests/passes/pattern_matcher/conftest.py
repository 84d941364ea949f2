"""Run passes on exported tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from adkit.contract import EngineConfig
from adkit.graph.edit import clean
from adkit.graph.identity import identities
from adkit.graph.snapshot import take
from adkit.graph.step import Step
from adkit.passes import Context, get_pass
from adkit.passes.pipeline import State, run_pass

ATTENTION_KEYS = (
    "match_repeat_kv",
    "match_eager_attention",
    "match_sdpa_to_torch_attention",
    "match_grouped_attention",
    "match_attention_layout",
    "match_positions",
)


@pytest.fixture
def run_attention_passes() -> Any:
    """``run(gm, keys, factory) -> (gm, {key: step})``: clean the graph, run the attention matchers on it."""

    def run(
        gm: GraphModule, keys: tuple[str, ...] = ATTENTION_KEYS, factory: Any = None
    ) -> tuple[GraphModule, dict[str, Step]]:
        clean(gm)
        identities(gm).settle(gm.graph)
        state = State(gm, take(gm))
        context = Context(factory, EngineConfig(), torch.device("cpu"))
        steps = {}
        for key in keys:
            state, steps[key] = run_pass(get_pass(key)(), state, context)
        assert isinstance(state.module, GraphModule)
        state.module.recompile()
        return state.module, steps

    return run
