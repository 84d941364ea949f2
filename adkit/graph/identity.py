"""Node identity: every FX node carries a stable id and the ids it replaces (its origins).

The tag lives in ``node.meta["custom"]``, the one meta entry that most of torch's own transforms keep.
Copies share that dict, so a tag is replaced, never mutated; a node that *inherited* a tag (through
``node_copy`` or ``copy_meta``) is told from its owner by the node object and gets a fresh id whose
origin is the inherited one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

_KEY = "adkit"


@dataclass(frozen=True, slots=True)
class Tag:
    """Identity of one node: its id and the ids of the nodes it stands in for."""

    id: int
    origins: tuple[int, ...] = ()


def tag_of(node: Node) -> Tag | None:
    """The tag a node carries, owned or inherited; None for an untagged node."""
    custom = node.meta.get("custom")
    return custom.get(_KEY) if isinstance(custom, dict) else None


def set_tag(node: Node, tag: Tag) -> None:
    """Give ``node`` a tag of its own (the shared ``custom`` dict is replaced, not mutated)."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _KEY: tag}


def node_id(node: Node) -> int:
    """The id of a tagged node; raises KeyError with the node's name for an untagged one."""
    tag = tag_of(node)
    if tag is None:
        raise KeyError(f"node {node.name!r} has no adkit id; ids are given at export and after each pass")
    return tag.id


class IdentityMap:
    """Hands out ids for one graph's lifetime and knows which node object owns which id."""

    def __init__(self, next_id: int = 0) -> None:
        self.next_id = next_id
        self._owner: dict[int, Node] = {}

    def fresh(self) -> int:
        """A new id, never used before in this graph's history."""
        self.next_id += 1
        return self.next_id - 1

    def adopt(self, graph: Graph) -> None:
        """Take over a rebuilt graph whose nodes already carry their own tags."""
        self._owner = {}
        for node in graph.nodes:
            tag = tag_of(node)
            if tag is not None:
                self._owner[tag.id] = node
                self.next_id = max(self.next_id, tag.id + 1)

    def settle(self, graph: Graph, origins: dict[Node, tuple[int, ...]] | None = None) -> list[Node]:
        """Give every node of ``graph`` an id of its own; returns the nodes that got a new one.

        ``origins`` names, for nodes made by a pass, the ids they replace.
        """
        fresh: list[Node] = []
        owner: dict[int, Node] = {}
        for node in graph.nodes:
            tag = tag_of(node)
            if tag is not None and self._owner.get(tag.id) is node and tag.id not in owner:
                owner[tag.id] = node
                continue
            inherited = () if tag is None else (tag.id,)
            new = Tag(self.fresh(), (origins or {}).get(node, inherited))
            set_tag(node, new)
            owner[new.id] = node
            fresh.append(node)
        self._owner = owner
        return fresh


def identities(gm: Any) -> IdentityMap:
    """The identity map of a graph module, made on first use and kept in ``gm.meta``."""
    if "adkit_ids" not in gm.meta:
        gm.meta["adkit_ids"] = IdentityMap()
    result: IdentityMap = gm.meta["adkit_ids"]
    return result
