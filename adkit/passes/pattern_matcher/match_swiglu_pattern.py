"""``match_swiglu_pattern``: gated activations as one op."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

import adkit.ops  # noqa: F401  (defines torch.ops.adkit)
from adkit.graph.matching import (
    dtype_of,
    find,
    gelu,
    gelu_tanh,
    named,
    pattern,
    relu,
    same_shape,
    silu,
    square,
)
from adkit.graph.step import PassInfo
from adkit.passes.base import Context, Pass, Stage
from adkit.passes.registry import register

# name of the activation as torch_swiglu takes it -> the pattern
GATES = {
    "silu": pattern(lambda gate, up: named("act", silu(gate)) * up),
    "gelu": pattern(lambda gate, up: named("act", gelu(gate)) * up),
    "gelu_tanh": pattern(lambda gate, up: named("act", gelu_tanh(gate)) * up),
    "relu2": pattern(lambda gate, up: named("act", square(relu(gate))) * up),
}


@register
class MatchSwiGLU(Pass):
    """Replace act(gate) * up by one ``torch_swiglu`` (act: silu, gelu, gelu_tanh, relu squared).

    The activation's result is then never written to memory, and a kernel reads gate and up once. Gate and up
    may be two projections or two halves of one. A product with broadcasting or a cast between is left alone.

        before: silu(gate_proj(x)) * up_proj(x)
        after:  torch_swiglu(gate_proj(x), up_proj(x), "silu")
    """

    key = "match_swiglu_pattern"
    stage = Stage.PATTERN_MATCHER

    def apply(self, gm: GraphModule, ctx: Context) -> PassInfo:
        """Rewrite every match."""
        count = 0
        acts = {id(p): act for act, p in GATES.items()}
        for match in find(gm, *GATES.values()):
            gate, up, root = match["gate"], match["up"], match.root
            if (
                match["act"] not in root.args
                or dtype_of(gate) != dtype_of(root)
                or dtype_of(up) != dtype_of(root)
            ):
                continue
            if not (same_shape(gate, root) and same_shape(up, root)):
                continue
            # the product and its activation only: casts of gate and up stay, they round
            nodes = [n for n in match.nodes if n not in (gate, up)]
            act = acts[id(match.pattern)]
            with self.site(gm, nodes, label="swiglu", before=root) as s:
                args = (gate, up) if act == "silu" else (gate, up, act)
                s.replace(root, s.call(torch.ops.adkit.torch_swiglu.default, args, like=root))
            count += 1
        return PassInfo(num_matches=count)
