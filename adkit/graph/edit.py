"""Changing a graph so that the change can be told later: sites, the journal, fake values.

A pass rewrites one *site* at a time::

    with site(gm, matched_nodes, label="rmsnorm") as s:
        new = s.call(torch.ops.adkit.torch_rmsnorm.default, (x, weight, eps), like=out)
        s.replace(out, new)

New nodes are put right before the site's last node, take that node's provenance, get a value
(``meta["val"]``), and the matched nodes that nobody reads any more are erased. A pass may also edit the
graph with plain ``torch.fx``; the journal then works out the sites from FX's own hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from adkit.graph.identity import tag_of

_COPIED = ("nn_module_stack", "stack_trace", "source_fn_stack")


@dataclass(slots=True)
class SiteRecord:
    """What one rewrite touched: ids matched before, FX nodes made (ids once settled)."""

    label: str
    matched: tuple[int, ...]
    made: list[Node] = field(default_factory=list)
    created: tuple[int, ...] = ()


@dataclass(slots=True)
class Journal:
    """What happened to one graph module while a pass ran.

    ``sites`` are the rewrites the pass declared; ``made`` every node created, in order; ``replaced`` pairs
    (id of the old node, new node) seen by FX's replace hook.
    """

    sites: list[SiteRecord] = field(default_factory=list)
    made: list[Node] = field(default_factory=list)
    replaced: list[tuple[int, Node]] = field(default_factory=list)

    def origins(self) -> dict[Node, tuple[int, ...]]:
        """Ids that each node made by the pass stands in for."""
        found: dict[Node, tuple[int, ...]] = {}
        for record in self.sites:
            for node in record.made:
                found[node] = record.matched
        for old, new in self.replaced:
            found.setdefault(new, (old,))
        return found


@contextmanager
def journal(gm: GraphModule) -> Iterator[Journal]:
    """Record every change made to ``gm.graph`` in the block (FX's node hooks are private: used only here)."""
    log = Journal()
    by_name: dict[str, Node] = {}  # FX's hook names the new node; the last one made of a name is meant

    def created(node: Node) -> None:
        log.made.append(node)
        by_name[node.name] = node

    def replaced(old: Node, new: str, user: Node) -> None:
        tag = tag_of(old)
        node = by_name.get(new)
        if tag is not None and node is not None:
            log.replaced.append((tag.id, node))

    outer = gm.meta.get("adkit_journal")
    gm.meta["adkit_journal"] = log
    gm._register_create_node_hook(created)
    gm._register_replace_node_hook(replaced)
    try:
        yield log
    finally:
        gm._unregister_create_node_hook(created)
        gm._unregister_replace_node_hook(replaced)
        gm.meta["adkit_journal"] = outer


class Site:
    """One place being rewritten; made by :func:`site`."""

    def __init__(self, gm: GraphModule, matched: list[Node], label: str, before: Node | None) -> None:
        self.gm = gm
        self.matched = matched
        self.anchor = before if before is not None else max(matched)  # FX nodes compare by their place
        tags = (tag_of(n) for n in matched)
        self.record = SiteRecord(label, tuple(t.id for t in tags if t is not None))

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        like: Node | None = None,
        before: Node | None = None,
    ) -> Node:
        """Insert a call; its value is ``like``'s where given, else computed on fake tensors."""
        graph = self.gm.graph
        with graph.inserting_before(before or self.anchor):
            node = graph.call_function(target, args, kwargs or {})
        for key in _COPIED:
            if key in self.anchor.meta:
                node.meta[key] = self.anchor.meta[key]
        node.meta["val"] = (
            like.meta.get("val") if like is not None else fake_value(target, args, kwargs or {}, self.gm)
        )
        self.record.made.append(node)
        return node

    def get_attr(self, path: str, *, val: Any = None) -> Node:
        """Insert a read of the parameter or buffer at dotted ``path`` (which must exist on the module)."""
        graph = self.gm.graph
        with graph.inserting_before(self.anchor):
            node = graph.get_attr(path)
        node.meta["val"] = val
        self.record.made.append(node)
        return node

    def constant(self, name: str, tensor: torch.Tensor) -> Node:
        """Give the module a tensor of the pass's own making, and read it.

        It becomes the buffer ``adkit_const_<name>``, which no checkpoint has: it stays with the graph as it
        is.
        """
        path = f"adkit_const_{name}"
        self.gm.register_buffer(path, tensor, persistent=False)
        mode = fake_mode_of(self.gm)
        val = tensor.to("meta") if mode is None else mode.from_tensor(tensor, static_shapes=True)
        node = self.get_attr(path, val=val)
        node.meta["adkit_constant"] = True
        return node

    def adopt(self, *nodes: Node) -> None:
        """Count nodes made outside :meth:`call` (graph inputs) as made by this rewrite."""
        self.record.made.extend(nodes)

    def replace(self, old: Node, new: Node) -> None:
        """Every reader of ``old`` reads ``new`` instead."""
        old.replace_all_uses_with(new)


@contextmanager
def site(
    gm: GraphModule, matched: Iterable[Node], *, label: str, before: Node | None = None
) -> Iterator[Site]:
    """Open a rewrite of ``matched``; new nodes go before its last node (or before ``before``).

    On leaving, matched nodes without readers are erased.
    """
    nodes = list(dict.fromkeys(matched))
    s = Site(gm, nodes, label, before)
    yield s
    log = gm.meta.get("adkit_journal")
    if log is not None:
        log.sites.append(s.record)
    pending = set(nodes)
    progress = True
    while progress:
        progress = False
        for node in list(pending):
            if not node.users and node.op not in ("placeholder", "output"):
                gm.graph.erase_node(node)
                pending.discard(node)
                progress = True


def fake_mode_of(gm: GraphModule) -> Any:
    """The fake-tensor mode that this graph's values belong to, or None if it has no values."""
    return detect_fake_mode([n.meta.get("val") for n in gm.graph.nodes])


def fake_value(target: Callable[..., Any], args: Any, kwargs: Any, gm: GraphModule | None = None) -> Any:
    """The value ``target`` gives on the fake values of its node arguments; None when one has no value.

    ``gm`` is where the fake mode is looked up when no argument is a tensor.
    """
    vals: list[Any] = []

    def value(n: Node) -> Any:
        vals.append(n.meta.get("val"))
        return vals[-1]

    fake_args = map_arg(args, value)
    fake_kwargs = map_arg(kwargs, value)
    if any(v is None for v in vals):
        return None
    mode = detect_fake_mode(vals)
    if mode is None and gm is not None:
        # Outside its fake mode a size would be taken for the number it was traced with, and stay fixed from
        # then on.
        mode = fake_mode_of(gm)
    if mode is None:
        return target(*fake_args, **fake_kwargs)
    # Composite operators that read sizes as numbers (linear in torch 2.11) would fix the symbols of the whole
    # graph to their hints; the Python dispatcher takes their decompositions that keep sizes symbolic.
    with mode, enable_python_dispatcher(), torch.no_grad():
        return target(*fake_args, **fake_kwargs)


def clean(gm: GraphModule) -> int:
    """Erase dead code (nodes nobody reads, placeholders kept); returns how many went."""
    gone = 0
    for node in reversed(gm.graph.nodes):
        if (
            not node.users
            and node.op in ("call_function", "get_attr", "call_method")
            and not node.is_impure()
        ):
            gm.graph.erase_node(node)
            gone += 1
    return gone
