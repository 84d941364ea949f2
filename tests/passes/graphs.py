"""Tiny Hugging Face models as clean graphs, for the tests of passes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule
from transformers import AutoModelForCausalLM

from adkit.contract import EngineConfig
from adkit.graph.edit import clean
from adkit.graph.step import PassInfo
from adkit.models.export import export_model
from adkit.passes import Context, get_pass
from tests.zoo import rmse_ratio, sensitise, tiny_config  # noqa: F401

VOCAB = 131


_CLEAN_UPS = (
    "cleanup_input_constraints",
    "cleanup_noop_slice",
    "cleanup_noop_add",
    "cleanup_noop_call",
    "cleanup_identity_dtype_cast",
)


def tiny_graph(kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> GraphModule:
    """A tiny random model of a type, exported in ``dtype`` and cleaned up; it shares the model's
    parameters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **overrides), dtype=dtype).eval()
    sensitise(model)
    gm = export_model(model)
    for key in _CLEAN_UPS:
        run_pass(gm, key)
    return gm


def context() -> Context:
    """A context for passes that need no model."""
    return Context(factory=None, engine=EngineConfig(), device=torch.device("cpu"))


def run_pass(gm: GraphModule, key: str, **config: Any) -> PassInfo:
    """Run one pass and erase dead code, as the pipeline does; the graph must hold together."""
    info = get_pass(key)(config).apply(gm, context())
    clean(gm)
    gm.graph.lint()
    gm.recompile()
    return info


def logits(gm: GraphModule, batch: int = 2, length: int = 9, **extra: torch.Tensor) -> torch.Tensor:
    """The graph's output on fixed random tokens; the second sequence starts at position 3."""
    feed = inputs_for(gm, batch, length, VOCAB, **extra)
    with torch.no_grad():
        return gm(**feed)[0]


def count(gm: GraphModule, op: str) -> int:
    """Calls of ``torch.ops.adkit.<op>``."""
    return sum(n.target is getattr(torch.ops.adkit, op).default for n in gm.graph.nodes)


def check_values(gm: GraphModule, batch: int = 2, length: int = 9, **extra: torch.Tensor) -> None:
    """Run the graph node by node and compare shape rank, known sizes and dtype with each node's recorded
    value."""

    class Checker(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            out = super().run_node(n)
            if n.op != "call_function":
                return out
            val = n.meta.get("val")
            for got, want in zip(
                *((out, val) if isinstance(out, (tuple, list)) else ((out,), (val,))), strict=True
            ):
                if isinstance(got, torch.Tensor):
                    assert isinstance(want, torch.Tensor), f"{n} has no value"
                    assert got.dtype == want.dtype, f"{n}: {got.dtype} is not {want.dtype}"
                    assert got.ndim == want.ndim, f"{n}: rank {got.ndim} is not {want.ndim}"
                    sizes = zip(got.shape, want.shape, strict=True)
                    assert all(g == w for g, w in sizes if isinstance(w, int)), (
                        f"{n}: {got.shape} is not {want.shape}"
                    )
            return out

    with torch.no_grad():
        Checker(gm).run(*inputs_for(gm, batch, length, VOCAB, **extra).values())


def inputs_for(
    gm: GraphModule, batch: int, length: int, vocab: int, **extra: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Inputs by the names of the graph's placeholders, in order."""
    values = {
        "input_ids": torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(1)),
        "position_ids": torch.arange(length).expand(batch, length) + 3 * torch.arange(batch)[:, None],
        "rope_lengths": torch.full((batch, length), length + 3),
        "logits_indices": torch.arange(length),
        **extra,
    }
    return {n.target: values[n.target] for n in gm.graph.nodes if n.op == "placeholder"}
