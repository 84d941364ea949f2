"""Why a graph cannot be given a cache, in words for whoever wanted to run the model.

``insert_cached_attention`` raises what is said here. Nodes are told by the line of modelling code that they
come from, because a line stands in every layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from adkit.graph.provenance import source_of
from adkit.graph.shape_only import EvaluationError, ShapeOnly
from adkit.graph.snapshot import target_name
from adkit.passes.pattern_matcher.masks import NotUnderstood
from adkit.passes.pattern_matcher.scores import SOFTMAXES, ScoreReader

aten = torch.ops.aten
_SHOWN = 8  # lines of modelling code
_CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv1d.padding, aten.convolution.default})
_CONVOLVED = "in a convolution along the sequence (a state space, linear attention or short convolution)"
_ADVICE = (
    "What to do: run this model with transformers itself (model.generate), or choose one whose tokens meet in "
    "attention alone (docs/coverage.md lists types). To teach adkit, match these lines to canonical ops with a "
    "pass of your own, or give the token mixer a cached op and a descriptor (CONTRIBUTING.md: Write a pass, "
    "Write an op)"
)


def nothing_to_cache(gm: GraphModule, mixing: list[tuple[Node, str]]) -> str:
    """The message where no attention was recognised; ``mixing`` are nodes that mix tokens, with reasons."""
    hidden = list(_unread(gm))
    if hidden:
        found = "its attention is written in a way that adkit does not recognise"
    elif any(n.target in _CONVOLUTIONS for n, _ in mixing):
        found = f"its tokens meet {_CONVOLVED}"
    else:
        found = "its tokens meet in a way that adkit does not recognise as attention"
    return f"no attention to cache was found in this graph: {found}{_lines(hidden or mixing)}\n{_ADVICE}"


def in_the_way(nodes: list[tuple[Node, str]]) -> str:
    """The message where ``nodes`` mix tokens beside the attention, each with its reason."""
    convolved = any(n.target in _CONVOLUTIONS for n, _ in nodes)
    also = f"; in some layers tokens meet {_CONVOLVED}" if convolved else ""
    return (
        f"this graph cannot run packed batches with a cache: {len(nodes)} operations beside its attention "
        f"compute across tokens, or adkit cannot tell that they do not{also}{_lines(nodes)}\n{_ADVICE}"
    )


def _unread(gm: GraphModule) -> Iterable[tuple[Node, str]]:
    """Softmaxes over scores of queries and keys, with what hinders reading them as attention."""
    reader = ScoreReader(gm, ShapeOnly(gm))
    for node in gm.graph.nodes:
        if node.target not in SOFTMAXES:
            continue
        try:
            if reader.read(node) is not None:
                yield node, "read as attention, but not proved equal to it"
        except (NotUnderstood, EvaluationError) as error:
            yield node, str(error)


def _lines(nodes: list[tuple[Node, str]]) -> str:
    """The nodes a line of modelling code, the first of them."""
    counted = Counter(
        (str(source_of(n.meta.get("stack_trace")) or n.name), target_name(n.target), why) for n, why in nodes
    )
    shown = [
        f"\n  {where} {op}: {why}" + (f" ({times} times)" if times > 1 else "")
        for (where, op, why), times in list(counted.items())[:_SHOWN]
    ]
    more = len(counted) - len(shown)
    return (":" if shown else "") + "".join(shown) + (f"\n  and {more} more lines" if more else "")
