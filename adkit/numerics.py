"""Which node loses accuracy: every node of a graph in its own dtype against the same graph in a wider one.

Both run side by side on the prompts that :mod:`adkit.checking` uses. The reference computes in float32 (float64
where the model itself is float32): weights and caches are widened, casts to a narrower dtype too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from adkit.checking import logits, runnable, stamps_around, weight_source
from adkit.contract import AdkitError
from adkit.graph.identity import node_id
from adkit.graph.step import Step
from adkit.viz.record.format import Overlay
from adkit.viz.record.overlays import overlay

if TYPE_CHECKING:
    from adkit.workbench import Workbench


def node_errors(
    wb: Workbench, step: str | int | Step | None = None, *, weights: str = "auto", seed: int = 0
) -> Overlay:
    """rmse(node - reference) / rms(reference) of every floating node, as an overlay named ``error``.

    The graph is the one after ``step`` (default: as it stands). Errors are of everything up to the node, so
    that they rise where accuracy is lost. ``weights`` as :meth:`Workbench.check` takes them. Raises AdkitError
    where there is no graph or it does not run.
    """
    at = None if step is None else step if isinstance(step, Step) else wb.steps[step]
    snapshot = wb.graph if at is None else at.after
    if not len(snapshot):
        raise AdkitError("there is no graph yet to measure; run through export_to_gm first")
    stamps = wb._state.tensors if at is None else stamps_around(wb, at)[1]
    gm = runnable(wb, snapshot, stamps, weight_source(wb, weights), seed)
    wide = torch.float64 if wb.factory.dtype == torch.float32 else torch.float32
    pair = _Pair(gm, wide)
    logits(pair, snapshot, wb, seed)  # type: ignore[arg-type]
    found = {i: math.sqrt(e / r) for i, (e, r) in pair.sums.items() if r > 0}
    step_index = -1 if at is None else wb.steps.keys().index(at.name)
    note = f"rmse over rms against {str(wide).removeprefix('torch.')}, on random prompts"
    return overlay("error", found, note=note, step=step_index, scale="log")


class _Pair:
    """A graph and its wide twin called as one: gives the graph's own result and sums both sides' squares."""

    def __init__(self, gm: GraphModule, wide: torch.dtype) -> None:
        self.gm, self.wide = gm, wide
        self.sums: dict[int, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, **feed: Any) -> Any:
        reference = _Wide(self.gm, self.wide)
        names = [n.target for n in self.gm.graph.nodes if n.op == "placeholder"]
        reference.run(*(self._input(str(n), feed[str(n)]) for n in names), enable_io_processing=False)
        own = _Own(self.gm, reference.values, self.sums)
        return own.run(*(feed[str(n)] for n in names), enable_io_processing=False)

    def _input(self, name: str, value: Any) -> Any:
        """A cache's twin stays from call to call, because the graph writes into it."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if name.endswith("_cache"):
            if id(value) not in self.caches:
                self.caches[id(value)] = (value, value.to(self.wide))
            return self.caches[id(value)][1]
        return value.to(self.wide)


class _Wide(Interpreter):
    def __init__(self, gm: GraphModule, wide: torch.dtype) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.wide = wide
        self.values: dict[int, Any] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "get_attr":
            result = tree_map(self._widen, result)
        if n.op == "call_function":
            self.values[node_id(n)] = result
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map(self._widen, (args, kwargs))
        return tree_map(self._widen, super().call_function(target, args, kwargs))

    def _widen(self, v: Any) -> Any:
        if isinstance(v, torch.dtype):
            return self.wide if v.is_floating_point else v
        return v.to(self.wide) if isinstance(v, Tensor) and v.is_floating_point() else v


class _Own(Interpreter):
    def __init__(
        self, gm: GraphModule, reference: dict[int, Any], sums: dict[int, tuple[float, float]]
    ) -> None:
        super().__init__(gm)
        self.reference, self.sums = reference, sums

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            i = node_id(n)
            for mine, true in zip(tree_leaves(result), tree_leaves(self.reference[i]), strict=True):
                if isinstance(mine, Tensor) and mine.is_floating_point() and mine.shape == true.shape:
                    e, r = self.sums[i]
                    d = (mine.double() - true.double()).nan_to_num(0.0, 0.0, 0.0)
                    true = true.double().nan_to_num(0.0, 0.0, 0.0)
                    self.sums[i] = (e + float(d.square().sum()), r + float(true.square().sum()))
        return result


__all__ = ["node_errors"]
