"""One site of a rewrite, cut out of the graph before and after and run on random inputs.

What comes from outside the site is random where it is floating point, and computed from the graph's own
inputs where it is whole numbers (positions, expert choices), so that both sides see the same values and
indices stay in range. A cached op is given a cache that holds the one sequence the site runs on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adkit.contract import CACHE_INPUTS
from adkit.graph.diff import Site
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot, _map
from adkit.graph.step import Step

#: Sizes given to the symbols of a site's shapes in order of appearance; the first two are batch and sequence.
_SIZES = (2, 11, 5, 8)


class CannotRun(Exception):
    """The site cannot be judged alone; the message says why."""


class SiteChecker:
    """Checks the sites of one step.

    ``constant`` gives the data of a tensor that the graph itself holds; ``recipes`` names, for each weight
    that a pass fused, the weights it is the concatenation of.
    """

    def __init__(
        self,
        step: Step,
        constant: Callable[[str], Tensor | None] = lambda name: None,
        recipes: dict[str, tuple[str, ...]] | None = None,
        seed: int = 0,
    ) -> None:
        self.step = step
        self.constant = constant
        self.recipes = recipes or {}
        self.seed = seed
        self.pairs = output_pairs(step)

    def check(self, site: Site) -> tuple[float, float] | None:
        """(max abs, rmse ratio) of one site's outputs before and after; None when nothing it computed is
        read.

        Raises CannotRun.
        """
        from adkit.checking import compare, worst_of

        before, after = self.step.before, self.step.after
        mine = {*site.erased, *site.created, *site.changed}
        outputs = [(a, b) for a, b in self.pairs if a in mine or b in mine]
        if not outputs:
            calls = [*(before[i] for i in site.erased), *(after[i] for i in site.created)]
            read = before.users(), after.users()
            if not any(n.op == "call_function" and any(r.get(n.id) for r in read) for n in calls):
                return None
            raise CannotRun("its outputs have no counterpart before and after")
        env = _Values(self)
        with torch.inference_mode():
            olds = [env.run(before, old, {*site.erased, *site.changed}) for old, _ in outputs]
            news = [env.run(after, new, {*site.created, *site.changed}) for _, new in outputs]
        pairs = [
            (o, n) for o, n in zip(olds, news, strict=True) if isinstance(o, Tensor) and isinstance(n, Tensor)
        ]
        if not pairs or all(not o.any() for o, _ in pairs):
            raise CannotRun("it gives nothing but zeros, or no tensor")
        return worst_of(compare(o.reshape(n.shape) if o.numel() == n.numel() else o, n) for o, n in pairs)


def output_pairs(step: Step) -> list[tuple[int, int]]:
    """Which node after stands where which node before did, over all sites.

    Told by who reads them: a reader that stayed reads the one where it read the other. What only other
    sites read is paired by order within its site, when as many are left on both sides.
    """
    before, after = step.before, step.after
    gone, changed = set(step.diff.erased), set(step.diff.changed)
    pairs = {(i, i): None for i in step.diff.changed}
    for n in after:
        old = before.by_id.get(n.id)
        if old is None or old is n or n.id in changed:
            continue
        was, now = old.inputs(), n.inputs()
        if len(was) == len(now):
            pairs.update({(a, b): None for a, b in zip(was, now, strict=True) if a in gone and a != b})
    done = {a for a, _ in pairs}, {b for _, b in pairs}
    users, heirs = before.users(), after.users()
    for site in step.diff.sites:
        old_side, new_side = {*site.erased, *site.changed}, {*site.created, *site.changed}
        outs = [i for i in site.erased if i not in done[0] and not old_side.issuperset(users[i])]
        ins = [i for i in site.created if i not in done[1] and not new_side.issuperset(heirs[i])]
        outs = [i for i in outs if before[i].op == "call_function"]
        ins = [i for i in ins if after[i].op == "call_function"]
        if len(outs) == len(ins):
            pairs.update(dict.fromkeys(zip(outs, ins, strict=True)))
    return list(pairs)


class _Values:
    """Values of nodes: computed inside the site, made up outside it, the same for both sides."""

    def __init__(self, checker: SiteChecker) -> None:
        step = checker.step
        self.weights = {n.target: n for n in step.before if n.op == "get_attr"}
        self.constant = checker.constant
        self.recipes = checker.recipes
        self.generator = torch.Generator().manual_seed(checker.seed)
        self.stands_for = {new: old for old, new in checker.pairs}
        #: What other sites made or dropped without a counterpart has to be computed.
        self.alone = {*step.diff.created, *step.diff.erased} - {i for pair in checker.pairs for i in pair}
        self.made: dict[Any, Any] = {}
        self.inputs = {n.target: n for n in (*step.before, *step.after) if n.op == "placeholder"}
        cached = any(name in self.inputs for name in CACHE_INPUTS)
        self.sizes: dict[str, int] = {}
        first = self.inputs.get("input_ids")
        if first is not None:
            for d, size in zip(first.val.shape, (1 if cached else _SIZES[0], _SIZES[1]), strict=True):
                if not isinstance(d, int):
                    self.sizes[str(d.node.expr)] = size

    def run(self, snapshot: Snapshot, output: int, inside: set[int]) -> Any:
        """The value of node ``output``, computing the nodes ``inside``."""
        done: dict[int, Any] = {}

        def value(i: int) -> Any:
            n = snapshot[i]
            if n.op in ("get_attr", "placeholder"):
                return self.outside(n)
            if i in inside or i in self.alone:
                if i not in done:
                    done[i] = call(n)
                return done[i]
            if _is_float(n.val):
                return self.outside(n)
            if i not in self.made:
                self.made[i] = self.size(n.val) if isinstance(n.val, torch.SymInt) else call(n)
            return self.made[i]

        def call(n: NodeRecord) -> Any:
            args = _map(n.args, lambda r: value(r.id), Ref)
            kwargs = _map(n.kwargs, lambda r: value(r.id), Ref)
            try:
                return n.target(*args, **kwargs)
            except Exception as error:
                raise CannotRun(
                    f"{n.target_name} fails on stand-in values ({type(error).__name__})"
                ) from error

        return value(output)

    def outside(self, n: NodeRecord) -> Any:
        """A value from outside the site, made once."""
        key = n.target if n.op == "get_attr" else self.stands_for.get(n.id, n.id)
        if key not in self.made:
            self.made[key] = self._input(n) if n.op == "placeholder" else self._float(n)
        return self.made[key]

    def size(self, d: Any) -> int:
        """A dimension's size."""
        if isinstance(d, int):
            return d
        expr = d.node.expr
        for s in sorted(map(str, expr.free_symbols)):
            self.sizes.setdefault(s, _SIZES[len(self.sizes) % len(_SIZES)])
        return int(expr.subs({s: self.sizes[str(s)] for s in expr.free_symbols}))

    def _float(self, n: NodeRecord) -> Tensor:
        if n.op == "get_attr":
            held = self.constant(n.target)
            if held is not None:
                return held.cpu()
            if n.target in self.recipes and n.target not in self.weights:
                parts = [self.weights.get(name) for name in self.recipes[n.target]]
                if all(p is not None for p in parts):
                    return torch.cat([self.outside(p) for p in parts if p is not None])
            elif n.target not in self.weights:
                raise CannotRun(f"nothing says what {n.target}, a new tensor, holds")
        if not isinstance(n.val, Tensor) or not _is_float(n.val):
            raise CannotRun(f"{n.name} has no value to stand in for")
        shape = tuple(self.size(d) for d in n.val.shape)
        dtype = torch.complex64 if n.val.is_complex() else torch.float32
        data = torch.randn(shape, generator=self.generator, dtype=dtype)
        if n.op == "get_attr" and len(shape) >= 2:
            data = data / math.sqrt(shape[-1])
        return data.to(n.val.dtype)

    def _input(self, n: NodeRecord) -> Tensor:
        """An input of the graph: whole prompts of one length, in pages one after another."""
        ids = self.inputs.get("input_ids")
        batch, length = [self.size(d) for d in ids.val.shape] if ids is not None else _SIZES[:2]
        caches = [c for name, c in self.inputs.items() if name.endswith("_cache")]
        page = int(caches[0].val.shape[1]) if caches else 1
        pages = 1 + math.ceil(length / page)
        match n.target:
            case "input_ids":
                return torch.randint(2, (batch, length), generator=self.generator)
            case "position_ids":
                return torch.arange(length).expand(batch, length).contiguous()
            case "rope_lengths":
                return torch.full((batch, length), length)
            case "logits_indices":
                return torch.arange(length)
            case "cu_seqlens":
                return torch.tensor([0, length], dtype=torch.int32)
            case "cache_lens":
                return torch.zeros(1, dtype=torch.int32)
            case "page_table":
                return torch.arange(1, pages, dtype=torch.int32)[None]
            case "slot_mapping":
                return page + torch.arange(length)
        if n in caches:
            return torch.zeros((pages, *(int(d) for d in n.val.shape[1:])), dtype=n.val.dtype)
        raise CannotRun(f"nothing is known of the input {n.target}")


def _is_float(val: Any) -> bool:
    return isinstance(val, Tensor) and (val.is_floating_point() or val.is_complex())
