"""Is a step right? Graphs before and after on the same inputs and the same weights.

Small models run whole: logits at every position of a ragged batch. A graph whose inputs changed (caches,
gathered logits) is fed through an adapter: prompts are prefilled and decoded over a scratch cache, so both
sides give logits for the same tokens. A model too large to run twice, or without weights, is checked one
site a rewrite class: the nodes before and after, cut out and run on random inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from adkit.contract import CACHE_INPUTS, AdkitError, CachePool, SequenceBatch
from adkit.graph.diff import Site
from adkit.graph.snapshot import NodeRecord, Ref, Snapshot, _map
from adkit.graph.step import Step
from adkit.models.loading import load_graph_tensors
from adkit.passes.pipeline import rebuild

if TYPE_CHECKING:
    from adkit.workbench import Workbench

#: rmse(after - before) / rms(before) a step may differ by; reordered float32 sums stay below 1e-5.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 5e-3}
#: Weights larger than this are not run whole by default (bytes).
WHOLE_LIMIT = 2 << 30


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check: ``rmse_ratio`` = rmse(after - before) / rms(before), ``max_abs`` = largest difference."""

    name: str
    ok: bool
    max_abs: float
    rmse_ratio: float
    tolerance: float
    how: str
    weights: str
    sites: tuple[tuple[str, float, float], ...] = field(default=())
    note: str = ""

    def __repr__(self) -> str:
        verdict = "ok" if self.ok else "DIFFERS"
        text = f"{self.name}: {verdict}, rmse ratio {self.rmse_ratio:.1e}, max abs {self.max_abs:.1e} ({self.how}, {self.weights} weights)"
        return f"{text}; {self.note}" if self.note else text

    def __bool__(self) -> bool:
        return self.ok


class Checks(list[CheckResult]):
    """Checks of several steps; true when all are ok."""

    @property
    def ok(self) -> bool:
        """True when every check is."""
        return all(c.ok for c in self)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no step changed the graph"


def check_step(
    wb: Workbench,
    step: Step,
    *,
    how: Literal["auto", "whole", "sites"] = "auto",
    weights: Literal["auto", "loaded", "checkpoint", "random"] = "auto",
    tolerance: float | None = None,
    seed: int = 0,
) -> CheckResult:
    """Compare ``step.before`` with ``step.after``.

    ``how``: ``whole`` runs both graphs on prompts, ``sites`` cuts out one site a rewrite class; ``auto`` takes
    whole where weights of at most 2 GiB can be had. ``weights``: those loaded, the checkpoint's, or random ones
    from ``seed``. ``tolerance`` bounds the rmse ratio (default by dtype: 1e-5 in float32).
    """
    if not len(step.before):
        raise AdkitError(f"step {step.name!r} has no graph before it to compare with")
    dtype = wb.factory.dtype
    limit = TOLERANCE.get(dtype, 2e-2) if tolerance is None else tolerance
    if not step.changed:
        return CheckResult(step.name, True, 0.0, 0.0, limit, "nothing changed", "no")
    source = _weight_source(wb, weights)
    size = sum(_bytes(n) for n in step.before if n.op == "get_attr")
    if how == "auto":
        how = "whole" if size <= WHOLE_LIMIT else "sites"
    if how == "whole":
        before = logits(_runnable(wb, step.before, source, seed), step.before, wb, seed)
        after = logits(_runnable(wb, step.after, source, seed), step.after, wb, seed)
        max_abs, ratio = compare(torch.cat(before), torch.cat(after))
        return CheckResult(step.name, ratio <= limit, max_abs, ratio, limit, "whole graph", source)
    found = []
    skipped = 0
    recipes = getattr(wb._state.module, "meta", {}).get("adkit_weights", {})
    for rewrite in step.rewrites:
        outcome = check_site(step, rewrite.sites[0], seed, recipes)
        if outcome is None:
            skipped += 1
        else:
            found.append((str(rewrite), *outcome))
    if not found:
        note = "no rewrite class could be cut out and run alone"
        return CheckResult(step.name, True, 0.0, 0.0, limit, "not run", "no", note=note)
    worst = max(found, key=lambda f: f[2] if not math.isnan(f[2]) else math.inf)
    note = f"{skipped} rewrite classes could not be run alone" if skipped else ""
    ok = not math.isnan(worst[2]) and worst[2] <= limit
    how = "1 site" if len(found) == 1 else f"{len(found)} sites"
    return CheckResult(step.name, ok, worst[1], worst[2], limit, how, "random", tuple(found), note)


def first_bad_step(wb: Workbench, *, tolerance: float | None = None, seed: int = 0, weights: Any = "auto") -> Step | None:
    """Binary search for the first run step whose logits differ from the exported graph's by more than allowed."""
    steps = [s for s in wb._done() if len(s.before) and s.changed]
    if not steps:
        return None
    source = _weight_source(wb, weights)
    limit = TOLERANCE.get(wb.factory.dtype, 2e-2) if tolerance is None else tolerance
    reference = torch.cat(logits(_runnable(wb, steps[0].before, source, seed), steps[0].before, wb, seed))

    def good(s: Step) -> bool:
        got = torch.cat(logits(_runnable(wb, s.after, source, seed), s.after, wb, seed))
        return compare(reference, got)[1] <= limit

    low, high = 0, len(steps)  # steps[:low] are good, steps[high:] start bad
    if good(steps[-1]):
        return None
    while low < high:
        middle = (low + high) // 2
        if good(steps[middle]):
            low = middle + 1
        else:
            high = middle
    return steps[low]


def compare(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """(largest absolute difference, rmse ratio) in float64; NaN where either holds a NaN."""
    a, b = expected.detach().double().cpu(), actual.detach().double().cpu()
    if a.shape != b.shape:
        raise AdkitError(f"results have different shapes before and after: {tuple(a.shape)} and {tuple(b.shape)}")
    both = torch.isinf(a) & (a == b)
    d = torch.where(both, 0.0, b - a)
    a = torch.where(both, 0.0, a)
    scale = float(a.square().mean().sqrt())
    error = float(d.square().mean().sqrt())
    ratio = error / scale if scale > 0 else (0.0 if error == 0 else math.inf)
    return (float(d.abs().max()) if d.numel() else 0.0), ratio


# --- whole graphs


def _weight_source(wb: Workbench, weights: str) -> str:
    if weights != "auto":
        return weights
    if wb.loaded:
        return "loaded"
    return "checkpoint" if wb.factory.weights == "checkpoint" else "random"


def _bytes(n: NodeRecord) -> int:
    return math.prod(int(d) for d in n.val.shape) * n.val.dtype.itemsize if isinstance(n.val, Tensor) else 0


def _runnable(wb: Workbench, snapshot: Snapshot, source: str, seed: int) -> GraphModule:
    """``snapshot`` as a module with real weights on the Workbench's device; the Workbench's own stay as they are."""
    holder = torch.nn.Module()
    module = wb._state.module
    holder.meta = {  # type: ignore[assignment]
        k: v for k, v in getattr(module, "meta", {}).items() if k not in ("adkit_ids", "adkit_journal")
    }
    current = {} if module is None else {**dict(module.named_parameters(remove_duplicate=False)),
                                         **dict(module.named_buffers(remove_duplicate=False))}
    from adkit.passes.pipeline import put_tensor

    for n in snapshot:
        if n.op == "get_attr":
            have = current.get(n.target)
            use = have is not None and not have.is_meta and (source == "loaded" or _is_constant(n.target))
            if use:
                put_tensor(holder, n.target, have)
    gm = rebuild(snapshot, holder)
    tensors = {**dict(gm.named_parameters(remove_duplicate=False)), **dict(gm.named_buffers(remove_duplicate=False))}
    missing = [name for name, t in tensors.items() if t.is_meta]
    if missing:
        factory = wb.factory if source in ("checkpoint", "loaded") else wb.factory.with_random_weights(seed)
        load_graph_tensors(gm, factory, missing, wb.device)
    from adkit.models.export import retarget_device

    retarget_device(gm, wb.device)
    gm.recompile()
    return gm


def _is_constant(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last.startswith(("lifted_tensor", "_tensor_constant", "adkit_const"))


def logits(gm: GraphModule, snapshot: Snapshot, wb: Workbench, seed: int = 0) -> list[Tensor]:
    """Logits [len, V] of each of a few ragged random prompts at every position, whatever inputs the graph has."""
    generator = torch.Generator().manual_seed(seed)
    config = wb.factory.config.get_text_config(decoder=True)
    prompts = [torch.randint(config.vocab_size, (n,), generator=generator) for n in (11, 5, 23)]
    inputs = [n.target for n in snapshot if n.op == "placeholder"]
    prefill = [max(1, len(p) // 2) for p in prompts]
    with torch.inference_mode():
        if not set(inputs) & set(CACHE_INPUTS):
            return [_whole(gm, inputs, p, n, wb.device) for p, n in zip(prompts, prefill, strict=True)]
        return packed_logits(lambda **feed: gm(**feed)[0], inputs, _scratch_pool(wb), prompts, prefill, wb.device)


def rope_lengths(length: int, prompt: int) -> Tensor:
    """What length-dependent RoPE sees for each token [length]: the prompt's length, then position + 1."""
    return (torch.arange(length) + 1).clamp(min=prompt)


def _whole(gm: GraphModule, inputs: list[str], tokens: Tensor, prompt: int, device: torch.device) -> Tensor:
    at = torch.arange(len(tokens))
    feed = {
        "input_ids": tokens[None],
        "position_ids": at[None],
        "rope_lengths": rope_lengths(len(tokens), prompt)[None],
        "logits_indices": at,
    }
    out: Tensor = gm(**{k: feed[k].to(device) for k in inputs})[0][0]
    return out


def _scratch_pool(wb: Workbench) -> CachePool:
    for state in (wb._state, *reversed(wb._history)):
        if state.caches is not None:
            return replace(state.caches, tensors={}, num_pages=0)
    raise AdkitError("the graph reads caches but no step declared them")


def packed_logits(
    forward: Callable[..., Tensor],
    inputs: Sequence[str],
    pool: CachePool,
    sequences: Sequence[Tensor],
    prefill: Sequence[int],
    device: torch.device,
) -> list[Tensor]:
    """Logits [len, V] of known token sequences through a packed, cached graph, all sequences in one batch.

    ``forward`` gives logits [1, T, V]. The first ``prefill[i]`` tokens of each go in at once, the rest one a step, as in generation. ``pool`` is
    given memory of its own for the purpose.
    """
    size = pool.page_size
    pages = [math.ceil(len(s) / size) for s in sequences]
    pool.allocate(1 + sum(pages), device)
    table = torch.zeros(len(sequences), max(pages), dtype=torch.int32)
    for i, count in enumerate(pages):
        table[i, :count] = 1 + sum(pages[:i]) + torch.arange(count)
    lengths = [rope_lengths(len(s), n) for s, n in zip(sequences, prefill, strict=True)]
    done, step = [0] * len(sequences), list(prefill)
    found: list[list[Tensor]] = [[] for _ in sequences]
    while live := [i for i, s in enumerate(sequences) if done[i] < len(s)]:
        spans = [(i, done[i], done[i] + step[i]) for i in live]
        position = torch.cat([torch.arange(a, b) for _, a, b in spans])
        owner = torch.cat([torch.full((b - a,), i) for i, a, b in spans])
        counts = torch.tensor([b - a for _, a, b in spans])
        batch = SequenceBatch(
            input_ids=torch.cat([sequences[i][a:b] for i, a, b in spans])[None],
            position_ids=position[None],
            rope_lengths=torch.cat([lengths[i][a:b] for i, a, b in spans])[None],
            cu_seqlens=torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0))).int(),
            cache_lens=torch.tensor([a for _, a, _ in spans], dtype=torch.int32),
            page_table=table[live],
            slot_mapping=table[owner, position // size].long() * size + position % size,
            logits_indices=torch.arange(len(position)),
        ).to(device)
        out = forward(**{n: pool.tensors[n] if n in pool.tensors else getattr(batch, n) for n in inputs})[0]
        for (i, _, b), part in zip(spans, out.split(counts.tolist()), strict=True):
            found[i].append(part)
            done[i], step[i] = b, 1
    return [torch.cat(parts) for parts in found]


# --- one site, cut out


def check_site(
    step: Step, site: Site, seed: int = 0, recipes: dict[str, tuple[str, ...]] | None = None
) -> tuple[float, float] | None:
    """(max abs, rmse ratio) of one site's outputs before and after on random inputs; None if it cannot be run alone.

    ``recipes`` names, for each weight that a pass fused, the weights it is the concatenation of.
    """
    before, after = step.before, step.after
    outputs = _output_pairs(before, after, site)
    if not outputs:
        return None
    env = _Inputs(seed, before, recipes or {})
    try:
        with torch.inference_mode():
            olds = [_run_site(before, old, set(site.erased) | set(site.changed), env) for old, _ in outputs]
            news = [_run_site(after, new, set(site.created) | set(site.changed), env) for _, new in outputs]
    except _CannotRun:
        return None
    pairs = [(o, n) for o, n in zip(olds, news, strict=True) if isinstance(o, Tensor) and isinstance(n, Tensor)]
    if not pairs:
        return None
    results = [compare(o.reshape(n.shape) if o.numel() == n.numel() else o, n) for o, n in pairs]
    return max(r[0] for r in results), max(r[1] for r in results)


def _output_pairs(before: Snapshot, after: Snapshot, site: Site) -> list[tuple[int, int]]:
    gone, made = set(site.erased), set(site.created)
    pairs = []
    for n in after:
        old = before.by_id.get(n.id)
        if old is None or old is n or n.id in site.changed:
            continue
        for a, b in zip(old.inputs(), n.inputs(), strict=False):
            if a in gone and b in made:
                pairs.append((a, b))
    return list(dict.fromkeys(pairs))


class _CannotRun(Exception):
    """The site reads something that random data cannot stand in for."""


class _Inputs:
    """Random stand-ins for values from outside a site, the same for both sides."""

    def __init__(self, seed: int, before: Snapshot, recipes: dict[str, tuple[str, ...]]) -> None:
        self.weights = {n.target: n for n in before if n.op == "get_attr"}
        self.recipes = recipes
        self.generator = torch.Generator().manual_seed(seed)
        self.values: dict[Any, Any] = {}
        self.sizes: dict[str, int] = {}

    def size(self, d: Any) -> int:
        if isinstance(d, int):
            return d
        expr = d.node.expr
        symbols = {s: self.sizes.setdefault(str(s), 2 + 3 * (len(self.sizes) % 4)) for s in sorted(expr.free_symbols, key=str)}
        return int(expr.subs(symbols))

    def value(self, n: NodeRecord) -> Any:
        key = n.target if n.op == "get_attr" else n.id
        if key not in self.values:
            self.values[key] = self._make(n)
        return self.values[key]

    def _make(self, n: NodeRecord) -> Any:
        if n.op == "get_attr" and n.target not in self.weights and n.target in self.recipes:
            return torch.cat([self.value(self.weights[name]) for name in self.recipes[n.target]])
        val = n.val
        if isinstance(val, torch.SymInt):
            return self.size(val)
        if not isinstance(val, Tensor):
            raise _CannotRun(n.name)
        shape = tuple(self.size(d) for d in val.shape)
        if val.dtype == torch.bool or not (val.is_floating_point() or val.is_complex()):
            if n.op == "placeholder" and n.target in CACHE_INPUTS:
                raise _CannotRun(n.name)
            return torch.zeros(shape, dtype=val.dtype)
        data = torch.randn(shape, generator=self.generator, dtype=torch.complex64 if val.is_complex() else torch.float32)
        if n.op == "get_attr" and len(shape) >= 2:
            data = data / math.sqrt(shape[-1])
        return data.to(val.dtype)


def _run_site(snapshot: Snapshot, output: int, inside: set[int], env: _Inputs) -> Any:
    made: dict[int, Any] = {}

    def value(i: int) -> Any:
        n = snapshot[i]
        if i not in inside or n.op in ("get_attr", "placeholder"):
            return env.value(n)
        if i not in made:
            args = _map(n.args, lambda r: value(r.id), Ref)
            kwargs = _map(n.kwargs, lambda r: value(r.id), Ref)
            made[i] = n.target(*args, **kwargs)
        return made[i]

    return value(output)
