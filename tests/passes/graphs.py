"""Tiny Hugging Face models as clean graphs, for the tests of passes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule
from transformers import AutoConfig, AutoModelForCausalLM

from adkit.contract import EngineConfig
from adkit.graph.edit import clean
from adkit.graph.matching import arg, aten, dtype_of, shape_of
from adkit.graph.step import PassInfo
from adkit.models.export import export_model
from adkit.passes import Context, get_pass

LAYERS = 3
_TINY: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    sliding_window=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> torch.nn.Module:
    """A random model whose logits depend on everything: matrices other than embeddings scaled by 10."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_TINY, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2 and "embed" not in name:
                p.mul_(10)
            elif p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def strip(gm: GraphModule) -> GraphModule:
    """Remove export's asserts, identity casts, whole slices and dead code."""
    for n in list(gm.graph.nodes):
        if n.op != "call_function":
            continue
        if n.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(n)
            continue
        same = n.target in (aten.to.dtype, aten.type_as.default) and dtype_of(n) == dtype_of(n.args[0])
        whole = n.target is aten.slice.Tensor and arg(n, 2, "start") in (None, 0) and str(shape_of(n)) == str(shape_of(n.args[0]))
        if same or whole:
            n.replace_all_uses_with(n.args[0])
            gm.graph.erase_node(n)
    clean(gm)
    return gm


def tiny_graph(kind: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> GraphModule:
    """The stripped export of :func:`tiny_model`."""
    with torch.no_grad():
        return strip(export_model(tiny_model(kind, dtype, **overrides)))


def context() -> Context:
    """A context for passes that need no model."""
    return Context(factory=None, engine=EngineConfig(), device=torch.device("cpu"))


def run_pass(gm: GraphModule, key: str, **config: Any) -> PassInfo:
    """Run one pass, then check that the graph holds together and that every value is of the right shape."""
    info = get_pass(key)(config).apply(gm, context())
    gm.graph.lint()
    gm.recompile()
    return info


def logits(gm: GraphModule, batch: int = 2, length: int = 9, **extra: torch.Tensor) -> torch.Tensor:
    """The graph's output on fixed inputs; the second sequence starts at position 3."""
    ids = torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(length).expand(batch, length) + 3 * torch.arange(batch)[:, None]
    with torch.no_grad():
        return gm(input_ids=ids, position_ids=positions, use_cache=False, **extra)[0]


def rmse_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """rmse(actual - expected) / rmse(expected)."""
    a, e = actual.double(), expected.double()
    return float((a - e).square().mean().sqrt() / e.square().mean().sqrt())


def count(gm: GraphModule, op: str) -> int:
    """Calls of ``torch.ops.adkit.<op>``."""
    return sum(n.target is getattr(torch.ops.adkit, op).default for n in gm.graph.nodes)


def check_values(gm: GraphModule, batch: int = 2, length: int = 9) -> None:
    """Run the graph node by node and compare shape rank, known sizes and dtype with each node's recorded value."""

    class Checker(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            out = super().run_node(n)
            if n.op != "call_function":
                return out
            val = n.meta.get("val")
            for got, want in zip(*((out, val) if isinstance(out, (tuple, list)) else ((out,), (val,))), strict=True):
                if isinstance(got, torch.Tensor):
                    assert isinstance(want, torch.Tensor), f"{n} has no value"
                    assert got.dtype == want.dtype, f"{n}: {got.dtype} is not {want.dtype}"
                    assert got.ndim == want.ndim, f"{n}: rank {got.ndim} is not {want.ndim}"
                    sizes = zip(got.shape, want.shape, strict=True)
                    assert all(g == w for g, w in sizes if isinstance(w, int)), f"{n}: {got.shape} is not {want.shape}"
            return out

    ids = torch.zeros(batch, length, dtype=torch.long)
    with torch.no_grad():
        Checker(gm).run(*(
            {"input_ids": ids, "position_ids": torch.arange(length).expand(batch, length)}.get(str(n.target))
            for n in gm.graph.nodes
            if n.op == "placeholder"
        ))
