"""Graphs of tiny Hugging Face models and a few hand-made passes over them, for graph's and viz's tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule, Node

from adkit.graph.edit import clean, journal, site
from adkit.graph.identity import identities
from adkit.graph.snapshot import Snapshot, take
from adkit.graph.step import PassInfo, Step, Steps
from adkit.models.export import export_model

ops = torch.ops.adkit
aten = torch.ops.aten


def export(kind: str = "llama", layers: int = 4, **extra: Any) -> GraphModule:
    """A tiny model's graph with ids, exported."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, vocab_size=128, **{**sizes, **extra})
    gm = export_model(AutoModelForCausalLM.from_config(config))
    identities(gm).settle(gm.graph)
    return gm


def run(
    gm: GraphModule, name: str, stage: str, apply: Callable[[GraphModule], int], doc: str, before: Snapshot
) -> Step:
    """Run ``apply`` on ``gm`` as a pass and say what it did."""
    with journal(gm) as log:
        matches = apply(gm)
        clean(gm)
    identities(gm).settle(gm.graph, log.origins())
    for record in log.sites:
        from adkit.graph.identity import node_id

        record.created = tuple(node_id(n) for n in record.made)
    after = take(gm, before)
    info = PassInfo(num_matches=matches)
    return Step(
        name,
        stage,
        {"enabled": True},
        doc,
        "done",
        before,
        after,
        info,
        tuple(log.sites),
        seconds=0.01 * (1 + matches),
    )


def strip_asserts(gm: GraphModule) -> int:
    """Erase ``_assert_tensor_metadata``."""
    gone = 0
    for n in list(gm.graph.nodes):
        if n.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(n)
            gone += 1
    return gone


def match_rmsnorm(gm: GraphModule) -> int:
    """Llama's RMSNorm, as exported in float32, becomes ``torch_rmsnorm``."""
    found = 0
    for out in list(gm.graph.nodes):
        chain = _norm_at(out)
        if chain is None:
            continue
        x, weight, eps, nodes = chain
        with site(gm, nodes, label="rmsnorm") as s:
            s.replace(out, s.call(ops.torch_rmsnorm.default, (x, weight, eps), like=out))
        found += 1
    return found


def _norm_at(out: Node) -> tuple[Node, Node, float, list[Node]] | None:
    def is_call(n: Any, target: Any) -> bool:
        return isinstance(n, Node) and n.target is target

    if not is_call(out, aten.mul.Tensor) or out.args[0].op != "get_attr":
        return None
    weight, cast = out.args
    if not is_call(cast, aten.to.dtype):
        return None
    scaled = cast.args[0]
    if not is_call(scaled, aten.mul.Tensor) or not is_call(scaled.args[1], aten.rsqrt.default):
        return None
    up, rsqrt = scaled.args
    add = rsqrt.args[0]
    mean = add.args[0]
    power = mean.args[0]
    return up, weight, add.args[1], [power, mean, add, rsqrt, scaled, cast, out]


def match_swiglu(gm: GraphModule) -> int:
    """silu(gate) * up becomes ``torch_swiglu``."""
    found = 0
    for n in list(gm.graph.nodes):
        if (
            n.target is aten.mul.Tensor
            and isinstance(n.args[0], Node)
            and n.args[0].target is aten.silu.default
        ):
            act, up = n.args
            with site(gm, [act, n], label="swiglu", before=n) as s:
                s.replace(n, s.call(ops.torch_swiglu.default, (act.args[0], up), like=n))
            found += 1
    return found


def fuse_gate_up(gm: GraphModule) -> int:
    """gate_proj and up_proj of one input become one linear over concatenated weights."""
    found = 0
    for n in list(gm.graph.nodes):
        if n.target is not ops.torch_swiglu.default:
            continue
        gate, up = n.args[:2]
        if gate.target is not aten.linear.default:
            continue
        path = gate.args[1].target.rsplit(".", 2)[0]
        fused = torch.nn.Parameter(torch.cat([gm.get_parameter(x.args[1].target) for x in (gate, up)]))
        gm.get_submodule(path).register_parameter("gate_up_weight", fused)
        with site(gm, [gate, up, gate.args[1], up.args[1], n], label="gate_up", before=n) as s:
            with gate.meta["val"].fake_mode as mode:
                val = mode.from_tensor(fused, static_shapes=True)
            weight = s.get_attr(f"{path}.gate_up_weight", val=val)
            both = s.call(aten.linear.default, (gate.args[0], weight))
            s.replace(n, s.call(ops.torch_swiglu_packed.default, (both,), like=n))
        found += 1
    return found


def pipeline(gm: GraphModule) -> Steps:
    """A few steps over ``gm``: done, unchanged, skipped and pending ones."""
    first = take(gm)
    doc = (
        "Recognise the norm and name it.\n\n    before: pow, mean, add, rsqrt, ...\n    after:  torch_rmsnorm"
    )
    steps = [
        Step("build_model", "factory", {}, "Build the module on meta.", "done", info=PassInfo(num_matches=1))
    ]
    steps.append(
        Step(
            "export_to_gm",
            "export",
            {},
            "Export.",
            "done",
            Snapshot(),
            first,
            PassInfo(num_matches=1),
            seconds=1.2,
        )
    )
    steps.append(
        run(gm, "strip_asserts", "post_export", strip_asserts, "Erase metadata asserts.", steps[-1].after)
    )
    steps.append(run(gm, "match_rmsnorm_pattern", "pattern_matcher", match_rmsnorm, doc, steps[-1].after))
    steps.append(
        run(
            gm,
            "match_swiglu_pattern",
            "pattern_matcher",
            match_swiglu,
            "Name the gated activation.",
            steps[-1].after,
        )
    )
    now = steps[-1].after
    steps.append(Step("match_moe_pattern", "pattern_matcher", {}, "Name the experts.", "done", now, now))
    skipped = PassInfo(skipped=True, reason="no checkpoint: shapes only")
    steps.append(Step("load_weights", "weight_load", {}, "Stream weights.", "skipped", now, now, skipped))
    steps.append(
        run(
            gm, "fuse_gemms", "post_load_fusion", fuse_gate_up, "One GEMM where two read the same input.", now
        )
    )
    steps.append(
        Step("insert_cached_attention", "cache_init", {}, "Attention over a paged cache.", "pending")
    )
    steps.append(Step("compile_model", "compile", {"backend": "eager"}, "Compile.", "pending"))
    return Steps(steps)


@cache
def sample(kind: str = "llama", layers: int = 4) -> Steps:
    """The steps over a tiny model (made once)."""
    return pipeline(export(kind, layers))


def snapshot(kind: str = "llama", layers: int = 4) -> Snapshot:
    """A tiny model's graph as exported, without asserts and dead code."""
    return sample(kind, layers)["strip_asserts"].after
