"""How long each node of a graph took, beside what a roofline predicts: :class:`NodeTimes`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from adkit.graph.code import op_text
from adkit.graph.cost import Device, NodeCost
from adkit.graph.snapshot import Snapshot


@dataclass(frozen=True, repr=False)
class NodeTimes:
    """Measured ``seconds`` of every call node by id, one run of a batch.

    ``name`` and ``batch`` say of what; ``where`` is the device measured on, ``device`` the one whose roofline gave
    ``costs``. ``total`` is the whole graph run in one go, seconds: more than the nodes' sum where the device
    waits between them, less where they overlap.
    """

    name: str
    batch: str
    where: str
    snapshot: Snapshot = field(repr=False)
    seconds: Mapping[int, float] = field(repr=False)
    costs: Mapping[int, NodeCost] = field(repr=False)
    device: Device
    total: float

    @property
    def sum(self) -> float:
        """Seconds of all nodes, one after the other."""
        return sum(self.seconds.values())

    @property
    def predicted(self) -> float:
        """Seconds that the roofline gives for all nodes."""
        return sum(c.seconds for c in self.costs.values())

    @property
    def dtype(self) -> str:
        """The dtype that most bytes of weights have, as ``bfloat16``."""
        sizes: dict[str, int] = {"float32": 0}
        for n in self.snapshot:
            if n.op == "get_attr" and isinstance(n.val, torch.Tensor):
                name = str(n.val.dtype).removeprefix("torch.")
                sizes[name] = sizes.get(name, 0) + n.val.numel() * n.val.dtype.itemsize
        return max(sizes, key=lambda name: sizes[name])

    def __getitem__(self, node: int) -> float:
        """Seconds of one node by id."""
        return self.seconds[node]

    def weight_bytes(self, node: int) -> int:
        """Bytes of the parameters and buffers that a node reads."""
        leaves = {i for i in self.snapshot[node].inputs() if self.snapshot[i].op == "get_attr"}
        values = [self.snapshot[i].val for i in leaves]
        return sum(v.numel() * v.dtype.itemsize for v in values if isinstance(v, torch.Tensor))

    def table(self) -> Any:
        """A pandas DataFrame, one row a call node in the graph's order; index: node id.

        Columns: name, target, layer, module, measured_us, predicted_us, share (of the nodes' sum),
        weight_bytes, flops, bytes, bound.
        """
        import pandas as pd

        whole = self.sum or 1.0
        rows = [
            {
                "id": i,
                "name": self.snapshot[i].name,
                "target": self.snapshot[i].target_name,
                "layer": self.snapshot[i].layer,
                "module": self.snapshot[i].module_path,
                "measured_us": s * 1e6,
                "predicted_us": self.costs[i].seconds * 1e6,
                "share": s / whole,
                "weight_bytes": self.weight_bytes(i),
                "flops": self.costs[i].flops,
                "bytes": self.costs[i].bytes,
                "bound": self.costs[i].bound,
            }
            for i, s in self.seconds.items()
        ]
        table = pd.DataFrame(rows).set_index("id")
        table["layer"] = table["layer"].astype("Int64")
        table.attrs["device"] = self.device
        return table

    def by_op(self) -> Any:
        """The table summed over nodes of one op, the slowest op first; index: op.

        Columns: nodes, measured_us, predicted_us, share, weight_bytes.
        """
        table = self.table()
        table["op"] = [op_text(self.snapshot[i]) for i in table.index]
        grouped = table.groupby("op").agg(
            nodes=("name", "size"), measured_us=("measured_us", "sum"), predicted_us=("predicted_us", "sum"),
            share=("share", "sum"), weight_bytes=("weight_bytes", "sum"),
        )  # fmt: skip
        return grouped.sort_values("measured_us", ascending=False)

    def facts(self) -> str:
        """Whole graph, sum, roofline, in one line."""
        return (
            f"whole graph {duration(self.total)}, nodes {duration(self.sum)}, roofline "
            f"{duration(self.predicted)} ({self.device.name})"
        )

    def __repr__(self) -> str:
        lines = [f"{self.name}: {self.batch}, on {self.where}", self.facts()]
        lines.append(f"{'op':<34}{'nodes':>6}{'measured':>11}{'share':>7}{'roofline':>11}")
        ops = self.by_op()
        for op, r in ops[ops["share"] >= 0.001].head(15).iterrows():
            lines.append(
                f"{op:<34}{r.nodes:>6.0f}{duration(r.measured_us / 1e6):>11}{r.share:>7.1%}"
                f"{duration(r.predicted_us / 1e6):>11}"
            )
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from adkit.graph.display import mimebundle

        return mimebundle(self)


def duration(seconds: float) -> str:
    """``6.61 ms``, ``45.6 µs``, ``1.20 s``, ``0.51 ns``."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns" if seconds > 0 else "0 µs"
