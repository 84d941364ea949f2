"""Which batched products are cut, and how far their pieces go: the heuristic for stacked matrices.

Results stay in pieces as far as rules go: through what works element by element and other products of the batch, up to
the sum over the batch, which becomes one sum over ranks, or a linear that can take them rowwise. Where a rule is
missing the pieces are joined right behind the product; what cannot be joined either stays whole. Products of one block
are tried together, after the regions of linears, whose cuts they may read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch.fx import Node

from adkit.graph.placement import Decision
from adkit.passes.sharding.op_kinds import EINSUM, LINEAR, einsum_letters
from adkit.passes.sharding.regions import (
    Choice,
    Layout,
    closest_linears,
    layer_type,
    module_of,
    short,
    walk_region,
)
from adkit.passes.sharding.rules import Unaccounted
from adkit.passes.sharding.stacks import stack_of

_WHY: dict[Decision, str] = {
    "batch": "each rank multiplies some of the stacked matrices",
    "gather": "each rank multiplies some of the stacked matrices, then they are joined",
}


def choose_batches(
    layout: Layout,
    taken: Mapping[Node, Choice],
    found: Mapping[Node, Choice],
    refused: Callable[[Node, Choice], str],
) -> dict[Node, Choice]:
    """Decisions for the batched products that ``taken`` leaves open, beside those ``found`` for linears.

    ``refused`` says why the settings or the world do not allow a choice; empty where they do.
    """
    blocks: dict[int, list[Node]] = {}
    chosen: dict[Node, Choice] = {}
    for node in layout.nodes:
        if node in taken or stack_of(node) is None:
            continue
        wish = _choice(layout, node, "batch", "")
        if why := refused(node, wish):
            chosen[node] = replace(wish, decision="whole", why=why)
        else:
            blocks.setdefault(layout.block[node], []).append(node)
    whole = ((n, c) for n, c in found.items() if n.target is LINEAR and c.decision == "whole")
    free = {n for n, c in whole if blocks and not refused(n, replace(c, decision="rowwise"))}
    for products in blocks.values():
        chosen.update(_try_block(layout, products, {**found, **taken}, free))
    return chosen


def _try_block(
    layout: Layout, products: list[Node], known: Mapping[Node, Choice], free: set[Node]
) -> dict[Node, Choice]:
    """Choices for the products of a block; each round gives up one step of what is in the way of a rule."""
    here = layout.block[products[0]]
    beside: dict[Node, Decision] = {n: c.decision for n, c in known.items() if layout.block[n] == here}
    tried: dict[Node, Decision] = dict.fromkeys(products, "batch")
    ends: dict[Node, Decision] = {}
    why: dict[Node, str] = {}
    start = min((s.first for n in products if (s := stack_of(n)) is not None), key=layout.at.__getitem__)
    while any(d != "whole" for d in tried.values()):
        try:
            walk_region(layout, {**beside, **tried, **ends}, start, products[-1])
            break
        except Unaccounted as problem:
            node = problem.node
            if problem.rowwise and node in free and node not in ends:
                ends[node] = "rowwise"
                continue
            ends = {}
            blamed = [n for n in _closest(node, tried) if n in problem.owners and tried[n] != "whole"]
            for product in blamed or products:
                tried[product] = "gather" if blamed and tried[product] == "batch" else "whole"
                why[product] = f"{short(node)} is in the way: {problem.why}"
    made = {n: _choice(layout, n, d, why[n] if d == "whole" else _WHY[d]) for n, d in tried.items()}
    makers = [n for n in products if tried[n] == "batch"]
    for end in ends:
        told = f"reads what {', '.join(map(short, makers))} cut"
        made[end] = replace(made[makers[0]], decision="rowwise", why=told)
    return made


def _closest(node: Node, products: Mapping[Node, object]) -> list[Node]:
    """The products that ``node`` is computed from, or is itself, without what these are computed from."""
    found, seen, pending = list[Node](), set[Node](), [node]
    while pending:
        at = pending.pop()
        if at in products:
            found.append(at)
        elif at not in seen:
            seen.add(at)
            pending += at.all_input_nodes
    return list(dict.fromkeys(found))


def _choice(layout: Layout, node: Node, decision: Decision, why: str) -> Choice:
    return Choice(decision, why, kind_of_product(layout, node), module_of(node))


def kind_of_product(layout: Layout, node: Node) -> str:
    """``mha`` or ``mla`` behind attention; else ``moe``: what is stacked elsewhere are experts.

    ``unknown`` for an einsum whose other side has no batch: its matrices may be the heads of an unmatched attention.
    """
    kind = layer_type(layout, node, closest_linears(layout, node))
    if kind in ("mha", "mla"):
        return kind
    inputs, output = einsum_letters(node) or ([], "") if node.target is EINSUM else ([], "")
    stack = stack_of(node)
    alone = stack is not None and any(output[stack.product_dim] not in letters for letters in inputs)
    return "unknown" if alone else "moe"
