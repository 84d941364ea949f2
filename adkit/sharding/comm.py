"""What ranks say to each other: every collective of a graph with its bytes, and how long a link takes for them.

Counted on shapes alone, by running each op over ranks on fake tensors and looking at what it exchanges.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adkit.contract import ConfigError
from adkit.graph.cost import Sizes
from adkit.graph.display import mimebundle
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot
from adkit.models.memory import human
from adkit.ops.dist import Exchange, lockstep, over_ranks


@dataclass(frozen=True)
class Link:
    """How ranks are wired: ``bandwidth`` bytes/s that each can send while it receives as many, ``latency`` seconds that
    any collective takes however small."""

    name: str
    bandwidth: float
    latency: float
    source: str


NVLINK4 = Link(
    "NVLink 4",
    450e9,
    8e-6,
    "H100 and H200 datasheets: 900 GB/s a GPU, both directions together; latency: assumed, of the order that NCCL "
    "takes for a small all-reduce among 8 GPUs of one host",
)


@dataclass(frozen=True)
class Collective:
    """One exchange of a graph.

    ``shape``: of the tensor each rank brings, open sizes by name; ``token_bytes``: of it, for one token; ``rows``:
    tokens it is made for, ``all`` or (``last``) those whose logits are wanted. ``gain``: bytes a rank sends over bytes
    it brings, for a ring.
    """

    node: str
    id: int
    layer: int | None
    module: str
    op: str
    kind: str
    shape: tuple[Any, ...]
    dtype: str
    token_bytes: int
    rows: str
    gain: float
    strategy: str = "AUTO"

    def sent(self, tokens: int, sequences: int = 1) -> float:
        """Bytes that each rank sends in a step of so many tokens of so many sequences: its own, where it has such."""
        return self.token_bytes * (tokens if self.rows == "all" else sequences) * self.gain

    def seconds(self, tokens: int, sequences: int, link: Link) -> float:
        """Time on a link: its latency, and the bytes over its bandwidth."""
        return link.latency + self.sent(tokens, sequences) / link.bandwidth


@dataclass(frozen=True)
class Comm:
    """The collectives of a rank's graph in order; the same on every rank.

    ``link`` is what times are estimated for; :meth:`on` takes another.
    """

    collectives: tuple[Collective, ...]
    world: int
    link: Link = NVLINK4

    def __iter__(self) -> Iterator[Collective]:
        return iter(self.collectives)

    def __len__(self) -> int:
        return len(self.collectives)

    def __getitem__(self, index: int) -> Collective:
        return self.collectives[index]

    def on(self, bandwidth: float, latency: float, name: str = "given", source: str = "given") -> Comm:
        """The same over another link: bytes/s each rank can send, seconds of latency a collective.

        Raises ConfigError for a link that sends nothing or takes less than no time.
        """
        if not bandwidth > 0 or not latency >= 0:
            raise ConfigError(
                f"a link of {bandwidth!r} bytes/s and {latency!r} s of latency; "
                "expected more than 0 bytes/s, and 0 s or more"
            )
        return Comm(self.collectives, self.world, Link(name, bandwidth, latency, source))

    def sent(self, tokens: int = 1, sequences: int = 1) -> float:
        """Bytes that each rank sends in a step; by default one decode step of one sequence."""
        return sum(c.sent(tokens, sequences) for c in self.collectives)

    def seconds(self, tokens: int = 1, sequences: int = 1, layer: int | None = None) -> float:
        """Estimated seconds of a step's collectives, or of one layer's."""
        chosen = [c for c in self.collectives if layer is None or c.layer == layer]
        return sum(c.seconds(tokens, sequences, self.link) for c in chosen)

    def table(self, tokens: int = 1024) -> Any:
        """A row a collective, as a pandas DataFrame; ``prefill`` columns are for a prompt of ``tokens``.

        Bytes are those that each rank sends, microseconds are estimated for the link; totals are in ``.attrs``.
        """
        import pandas as pd

        rows = [
            {
                "layer": c.layer,
                "module": c.module,
                "kind": c.kind,
                "shape": f"[{', '.join(map(str, c.shape))}]",
                "dtype": c.dtype,
                "bytes a token": c.token_bytes,
                "decode bytes": c.sent(1),
                "prefill bytes a token": c.sent(tokens) / tokens,
                "decode us": 1e6 * c.seconds(1, 1, self.link),
                "prefill us": 1e6 * c.seconds(tokens, 1, self.link),
            }
            for c in self.collectives
        ]
        columns = list(rows[0]) if rows else ["layer", "module", "kind", "shape", "dtype"]
        table = pd.DataFrame(rows, columns=columns, index=[c.node for c in self.collectives])
        table["layer"] = table["layer"].astype("Int64")
        table.attrs["total"] = self.total(tokens)
        return table

    def total(self, tokens: int = 1024) -> dict[str, float]:
        """Bytes sent and seconds of one decode step, of a prompt of ``tokens``, and of the busiest layer's decode."""
        layers = {c.layer for c in self.collectives if c.layer is not None}
        return {
            "collectives": len(self),
            "decode bytes": self.sent(1),
            "prefill bytes": self.sent(tokens),
            "decode seconds": self.seconds(1),
            "prefill seconds": self.seconds(tokens),
            "layer decode seconds": max((self.seconds(1, layer=i) for i in layers), default=0.0),
        }

    def __repr__(self) -> str:
        kinds: dict[str, int] = {}
        for c in self.collectives:
            kinds[c.kind] = kinds.get(c.kind, 0) + 1
        told = ", ".join(f"{n} {k}" for k, n in kinds.items()) or "nothing is exchanged"
        t = self.total()
        return (
            f"{told} among {self.world} ranks; each sends {human(t['decode bytes'])} a decode step "
            f"({1e6 * t['decode seconds']:.0f} us on {self.link.name}, {1e6 * t['layer decode seconds']:.1f} us a "
            f"layer), {human(t['prefill bytes'] / 1024)} a prompt token"
        )

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return mimebundle(self)


def comm_of(graph: Snapshot, world: int, link: Link = NVLINK4) -> Comm:
    """Every collective of a rank's graph before the batch is packed (inputs [B, S])."""
    sizes = Sizes(graph, {"batch": 1, "seq": 1})
    names = _open_sizes(graph)
    seen: dict[Any, list[Exchange]] = {}
    found = []
    last = _after_the_last_mix(graph)
    for n in graph:
        if n.op != "call_function" or not over_ranks(n.target):
            continue
        values = [graph[i].val for i in n.inputs()]
        key = (n.target, repr((n.args[1:], n.kwargs)), tuple((str(v.shape), v.dtype) for v in values))
        if key not in seen:
            seen[key] = exchanges_of(n, graph, world)
        for e in seen[key]:
            size = sizes.tensor(e.tensor)
            rows = "last" if n.id in last else "all"
            shape = tuple(d if isinstance(d, int) else _named(str(d), names) for d in e.tensor.shape)
            of = graph[
                n.inputs()[0]
            ]  # who speaks is the module whose value it is, not the one that needs the sum
            found.append(
                Collective(
                    n.name, n.id, of.layer, of.module_path, n.target_name, e.kind, shape,
                    str(e.tensor.dtype).removeprefix("torch."), size.numel * size.dtype.itemsize, rows,
                    _gain(e.kind, world), e.strategy,
                )
            )  # fmt: skip
    return Comm(tuple(found), world, link)


def exchanges_of(n: NodeRecord, graph: Snapshot, world: int) -> list[Exchange]:
    """What a node over ranks exchanges, from its fake inputs."""
    asked: list[Exchange] = []

    def on_ranks(*args: Any, **kwargs: Any) -> Any:
        return lockstep(n.target, [(args, kwargs)] * world, lambda sides: asked.append(sides[0]))[0]

    vals = {i: graph[i].val for i in n.inputs()}
    args, kwargs = _with_values((n.args, n.kwargs), vals)
    mode = torch._guards.detect_fake_mode(list(vals.values()))
    if mode is None:
        on_ranks(*args, **kwargs)
    else:
        with mode, torch.no_grad():
            on_ranks(*args, **kwargs)
    return asked


def _with_values(value: Any, vals: Mapping[int, Any]) -> Any:
    if isinstance(value, Ref):
        return vals[value.id]
    if isinstance(value, (tuple, list)):
        return type(value)(_with_values(v, vals) for v in value)
    if isinstance(value, dict):
        return {k: _with_values(v, vals) for k, v in value.items()}
    return value


def _gain(kind: str, world: int) -> float:
    """Bytes sent over bytes brought, for a ring (Thakur et al. 2005, doi 10.1177/1094342005051521)."""
    return {"all_reduce": 2 * (world - 1) / world, "reduce_scatter": (world - 1) / world}.get(
        kind, float(world - 1)
    )


def _open_sizes(graph: Snapshot) -> dict[str, str]:
    ids = next((n.val for n in graph if n.op == "placeholder" and n.target == "input_ids"), None)
    return {} if not isinstance(ids, Tensor) else {str(ids.shape[0]): "B", str(ids.shape[1]): "S"}


def _named(size: str, names: Mapping[str, str]) -> str:
    """An open size in the batch's own words: ``4*B``."""
    return re.sub(r"\w+", lambda word: names.get(word.group(), word.group()), size)


def _after_the_last_mix(graph: Snapshot) -> set[int]:
    """Ids of the nodes from the last linear on: what the engine asks of the tokens whose logits it wants. Where ranks
    have tokens of their own, these are gathered right before it."""
    linears = [i for i, n in enumerate(graph) if "linear" in n.target_name]
    if not linears:
        return set()
    last = {n.id for n in graph.nodes[linears[-1] :]}
    return last | {i for i in graph.nodes[linears[-1]].inputs() if "dist_all_gather" in graph[i].target_name}


__all__ = ["NVLINK4", "Collective", "Comm", "Link", "comm_of", "exchanges_of"]
