"""Is a step right? Graphs before and after on the same inputs and the same weights.

Small models run whole: logits at every position of a ragged batch. A graph whose inputs changed (caches,
gathered logits) is fed through an adapter: prompts are prefilled and decoded over a scratch cache, so both
sides give logits for the same tokens. A model too large to run twice, or without weights, is checked one
site a rewrite class: the nodes before and after, cut out and run on random inputs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from adkit.contract import (
    CACHE_INPUTS,
    AdkitError,
    CachePool,
    CompiledModel,
    ConfigError,
    MemoryLimitError,
    SequenceBatch,
    nearest,
)
from adkit.graph.snapshot import Snapshot
from adkit.graph.step import Step
from adkit.models.export import retarget_device
from adkit.models.loading import FUSED, graph_tensor_names, load_graph_tensors
from adkit.models.memory import free_bytes, human
from adkit.passes.pipeline import rebuild
from adkit.passes.tensors import Stamp, Stamps, put_tensor, tensor_at
from adkit.site_checking import CannotRun, SiteChecker

if TYPE_CHECKING:
    from adkit.workbench import Workbench

#: rmse(after - before) / rms(before) a step may differ by; reordered float32 sums stay below 1e-5.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 5e-3}
#: The same for one site, where rounding has not added up over layers.
SITE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 6e-3, torch.float16: 1e-3}
#: Tokens of the prompts that whole graphs run on.
LENGTHS = (11, 5, 23)
#: Weights larger than this are not run whole by default (bytes).
WHOLE_LIMIT = 2 << 30


class GraphFails(AdkitError):
    """A graph raised when it was run."""


class NotComparable(AdkitError):
    """The weights that a graph read are not to be had: a step changed their data, and it is gone."""


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check: ``rmse_ratio`` = rmse(after - before) / rms(before), ``max_abs`` = largest
    difference."""

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
        verdict = "ok" if self.ok else "NOT COMPARED" if self.how == "not run" else "DIFFERS"
        numbers = f"rmse ratio {self.rmse_ratio:.1e}, max abs {self.max_abs:.1e}"
        text = f"{self.name}: {verdict}, {numbers} ({self.how}, {self.weights} weights)"
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

    ``how``: ``whole`` runs both graphs on prompts, ``sites`` cuts out one site a rewrite class; ``auto``
    takes whole where the weights are at most 2 GiB (and in half precision looks at the sites too).
    ``weights``: those loaded, the checkpoint's, or random ones from ``seed``; auto takes the first of these
    that there are. ``tolerance`` bounds the rmse ratio (default by dtype: 1e-5 in float32). What could not
    be compared is not ok. Raises ConfigError for options that are none of these, AdkitError for a step that
    has not run or failed, and for weights that cannot be had.
    """
    if step.status == "failed":
        raise AdkitError(f"step {step.name!r} failed, so there is nothing to compare: {step.info.reason}")
    if step.status == "pending":
        raise AdkitError(f"step {step.name!r} has not run yet: wb.run(until={step.name!r}) runs it")
    if not len(step.before):
        raise AdkitError(f"step {step.name!r} has no graph before it to compare with")
    _one_of("how", how, ("auto", "whole", "sites"))
    source = weight_source(wb, weights)
    compiled = _compiled_by(wb, step)
    if not step.changed and not step.altered and compiled is None:
        limit = _limit(wb, tolerance, TOLERANCE)
        return CheckResult(step.name, True, 0.0, 0.0, limit, "nothing changed", "no")
    auto = how == "auto"
    if auto:
        how = "whole" if _runs_whole(step.before) else "sites"
    if how == "sites":
        return _check_sites(wb, step, _limit(wb, tolerance, SITE_TOLERANCE), seed)
    limit = _limit(wb, tolerance, TOLERANCE)
    if step.altered and all(s is not step for s in wb._done()):
        raise NotComparable(
            f"step {step.name!r} changed the data of {step.altered[0]!r}, and the pipeline has gone back since: run it "
            f"again and check wb.steps[{step.name!r}]"
        )
    stamps = stamps_around(wb, step)
    before = logits(runnable(wb, step.before, stamps[0], source, seed), step.before, wb, seed)
    try:
        if compiled is not None:
            after = _compiled_logits(compiled, wb, seed)
            source = "loaded"
        else:
            after = logits(runnable(wb, step.after, stamps[1], source, seed), step.after, wb, seed)
        max_abs, ratio = compare(torch.cat(before), torch.cat(after))
    except GraphFails as error:
        return CheckResult(
            step.name, False, math.nan, math.nan, limit, "whole graph", source, note=str(error)
        )
    note = _unseen_window(step.before)
    if auto and wb.factory.dtype.itemsize < 4 and step.changed and tolerance is None:
        # Rounding adds up over layers and hides small mistakes; at one site it does not.
        sharp = _check_sites(wb, step, _limit(wb, None, SITE_TOLERANCE), seed)
        if sharp.sites and not sharp.rmse_ratio <= sharp.tolerance:
            return sharp
    return CheckResult(step.name, ratio <= limit, max_abs, ratio, limit, "whole graph", source, note=note)


def check_all(wb: Workbench, *, weights: Any = "auto", **options: Any) -> Checks:
    """:func:`check_step` of each step that changed something; one whose weights are gone is not ok and says why.

    Raises AdkitError where there is no graph yet, and as :func:`check_step` for options.
    """
    results, steps = Checks(), _to_judge(wb, "check")
    with wb.bars:
        for s in steps:
            wb.bars.show(len(results), len(steps), "checking steps")
            try:
                result = check_step(wb, s, weights=weights, **options)
            except NotComparable as error:
                limit, source = _limit(wb, options.get("tolerance"), TOLERANCE), weight_source(wb, weights)
                result = CheckResult(
                    s.name, False, math.nan, math.nan, limit, "not run", source, note=str(error)
                )
            results.append(result)
    return results


def _to_judge(wb: Workbench, what: str) -> list[Step]:
    """The steps that changed a graph or its weights' data."""
    if not len(wb.graph):
        raise AdkitError(f"there is no graph yet to {what}; run through export_to_gm first")
    return [s for s in wb._done() if len(s.before) and (s.changed or s.altered)]


def _check_sites(wb: Workbench, step: Step, limit: float, seed: int) -> CheckResult:
    """One site a rewrite class on random inputs; not ok when there was something that could not be run."""
    if step.altered:
        note = f"the step changed the data of {len(step.altered)} tensors, which only how='whole' can judge"
        return CheckResult(step.name, False, math.nan, math.nan, limit, "not run", "no", note=note)
    module = wb._state.module
    recipes = getattr(module, "meta", {}).get(FUSED, {})
    known = set(wb.factory.tensors) | set(recipes)

    def constant(name: str) -> Tensor | None:
        tensor = None if name in known or module is None else tensor_at(module, name)
        return None if tensor is None or tensor.is_meta else tensor

    checker = SiteChecker(step, constant, recipes, seed)
    found: list[tuple[str, float, float]] = []
    missed: list[str] = []
    for rewrite in step.rewrites:
        try:
            outcome = checker.check(rewrite.sites[0])
        except CannotRun as error:
            missed.append(f"{rewrite}: {error}")
        else:
            found += [(str(rewrite), *outcome)] if outcome is not None else []
    share = f"{len(missed)} of {len(missed) + len(found)}"
    note = f"{share} rewrite classes could not be run alone: {'; '.join(missed[:3])}"
    if not found:
        how = "not run" if missed else "nothing computed changed"
        worst = math.nan if missed else 0.0
        return CheckResult(step.name, not missed, worst, worst, limit, how, "no", note=note if missed else "")
    worst_abs, worst_ratio = worst_of(f[1:] for f in found)
    ok = worst_ratio <= limit and not missed
    how = f"{len(found)} {'site' if len(found) == 1 else 'sites'}"
    return CheckResult(
        step.name, ok, worst_abs, worst_ratio, limit, how, "random", tuple(found), note if missed else ""
    )


def first_bad_step(
    wb: Workbench, *, tolerance: float | None = None, seed: int = 0, weights: Any = "auto"
) -> Step | None:
    """Binary search for the first run step whose logits differ from the exported graph's by more than
    allowed.

    Steps after which the graph cannot run, because the data that one gave a weight is gone, are passed over; where
    the fault may lie in several for that, the first is returned with a warning that names them. A model too large to
    run whole is searched step by step, by sites; what cannot be run alone is passed over. Raises NotComparable where
    no fault was found and a step that changed weights' data could not be judged, AdkitError where there is no graph.
    """
    steps = _to_judge(wb, "bisect")
    if not steps:
        return None
    if not _runs_whole(steps[0].before):
        return _first_bad_by_sites(wb, steps, tolerance, seed)
    source = weight_source(wb, weights)
    limit = _limit(wb, tolerance, TOLERANCE)

    def run(snapshot: Snapshot, stamps: Stamps) -> Tensor:
        return torch.cat(logits(runnable(wb, snapshot, stamps, source, seed), snapshot, wb, seed))

    reference = run(steps[0].before, stamps_around(wb, steps[0])[0])
    if not torch.isfinite(reference).all():
        raise AdkitError(
            f"the logits of {wb.name!r} are not finite as exported, with {source} weights, so no step can "
            "be judged by them; "
            "take other weights (weights=...) or look at the model"
        )

    def good(i: int) -> bool:
        s = steps[i]
        try:
            return compare(reference, run(s.after, stamps_around(wb, s)[1]))[1] <= limit
        except GraphFails:
            return False

    unseen: dict[int, NotComparable] = {}
    for i, s in enumerate(steps):
        try:
            _held(wb, s.after, stamps_around(wb, s)[1], source)
        except NotComparable as error:
            unseen[i] = error
    seen = [i for i in range(len(steps)) if i not in unseen]
    low, high = 0, len(seen)  # seen[:low] are good, seen[high:] start bad
    if not seen or good(seen[-1]):
        if len(steps) - 1 in unseen:
            raise unseen[seen[-1] + 1 if seen else 0]
        return None
    while low < high:
        middle = (low + high) // 2
        if good(seen[middle]):
            low = middle + 1
        else:
            high = middle
    first = seen[low - 1] + 1 if low else 0
    if first != seen[low]:
        names = ", ".join(repr(s.name) for s in steps[first : seen[low] + 1])
        warnings.warn(
            f"the fault is in one of {names}, and the first is returned: {unseen[first]}", stacklevel=3
        )
    return steps[first]


def _first_bad_by_sites(wb: Workbench, steps: list[Step], tolerance: float | None, seed: int) -> Step | None:
    for s in steps:
        r = check_step(wb, s, how="sites", tolerance=tolerance, seed=seed)
        if not r.ok and r.sites and not r.rmse_ratio <= r.tolerance:
            return s
    for s in steps:
        if s.altered:
            raise NotComparable(
                f"step {s.name!r} changed the data of {s.altered[0]!r}, which sites cannot judge, and {wb.name!r} "
                f"is too large to run whole: try wb.check({s.name!r}, how='whole') all the same, or a config with "
                "fewer layers"
            )
    return None


def compare(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """(largest absolute difference, rmse ratio) in float64; NaN where either holds a NaN."""
    a, b = expected.detach().double().cpu(), actual.detach().double().cpu()
    if a.shape != b.shape:
        raise GraphFails(
            f"results have different shapes before and after: {tuple(a.shape)} and {tuple(b.shape)}"
        )
    both = torch.isinf(a) & (a == b)
    d = torch.where(both, 0.0, b - a)
    a = torch.where(both, 0.0, a)
    scale = float(a.square().mean().sqrt())
    error = float(d.square().mean().sqrt())
    ratio = error / scale if scale != 0 else (0.0 if error == 0 else math.inf)
    return (float(d.abs().max()) if d.numel() else 0.0), ratio


def worst_of(results: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The largest of each; NaN where any is NaN."""
    largest, ratio = torch.tensor(list(results), dtype=torch.float64).amax(0).tolist()
    return largest, ratio


# --- whole graphs


def _one_of(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ConfigError(f"check({name}={given!r}){nearest(str(given), known)}")


def _limit(wb: Workbench, tolerance: float | None, by_dtype: dict[torch.dtype, float]) -> float:
    return by_dtype.get(wb.factory.dtype, by_dtype[torch.bfloat16]) if tolerance is None else tolerance


def weight_source(wb: Workbench, weights: str) -> str:
    """Where weights come from, ``auto`` resolved: loaded, checkpoint or random; raises what cannot be."""
    _one_of("weights", weights, ("auto", "loaded", "checkpoint", "random"))
    if weights == "loaded" and not wb.loaded:
        raise AdkitError(
            "no weights are loaded yet: run through load_weights first, or take weights='checkpoint' or "
            "'random'"
        )
    if weights == "checkpoint" and wb.factory.weights != "checkpoint":
        raise AdkitError(
            f"{wb.name!r} has no checkpoint (weights: {wb.factory.weights}); take weights='random'"
        )
    if weights != "auto":
        return weights
    if wb.loaded:
        return "loaded"
    return "checkpoint" if wb.factory.weights == "checkpoint" else "random"


def _runs_whole(snapshot: Snapshot) -> bool:
    """True when the weights that a graph reads are few enough to run it whole."""
    sizes = {
        n.target: n.val.numel() * n.val.dtype.itemsize
        for n in snapshot
        if n.op == "get_attr" and n.val is not None
    }
    return sum(sizes.values()) <= WHOLE_LIMIT


def stamps_around(wb: Workbench, step: Step) -> tuple[Stamps, Stamps]:
    """What data stood before and after a step; empty for a step that is no longer of the pipeline."""
    states = [*wb._history, wb._state]
    for i, s in enumerate(wb._done()):
        if s is step:
            return states[i].tensors, states[i + 1].tensors
    return {}, {}


def _compiled_by(wb: Workbench, step: Step) -> CompiledModel | None:
    """The compiled model that a step made, if it stands."""
    states = [*wb._history, wb._state]
    for i, s in enumerate(wb._done()):
        if s is step and states[i + 1].compiled is not states[i].compiled:
            return states[i + 1].compiled
    return None


def _held(wb: Workbench, snapshot: Snapshot, stamps: Stamps, source: str) -> dict[str, Tensor]:
    """What a graph reads that need not be loaded; raises NotComparable for data that a step made and that is gone."""
    module = wb._state.module
    known = {*wb.factory.tensors, *getattr(module, "meta", {}).get(FUSED, {})}
    found = {}
    for name in dict.fromkeys(n.target for n in snapshot if n.op == "get_attr"):
        stamp = stamps.get(name)
        if name in known and (stamp is None or stamp.loadable):
            have = None if stamp is None or source != "loaded" else stamp.tensor()
        elif stamp is not None:
            have = stamp.tensor()
            if name in known and (have is None or source == "random"):
                raise NotComparable(_why_gone(wb, name, stamp, source))
        else:
            have = None if module is None else tensor_at(module, name)
        if have is not None and not have.is_meta:
            found[name] = have
    return found


def _why_gone(wb: Workbench, name: str, stamp: Stamp, source: str) -> str:
    """Which step gave a weight data of its own, why a check cannot have it, and what to do."""
    parts = (name, *getattr(wb._state.module, "meta", {}).get(FUSED, {}).get(name, ()))
    after = [s.tensors for s in (*wb._history, wb._state)][1:]
    made = [i for i, t in enumerate(after) if any(p in t and not t[p].loadable for p in parts)]
    stood = [i for i, t in enumerate(after) if t.get(name) is stamp]
    if not made or not stood:
        return f"the data of {name!r} was changed, and is gone: run the pipeline again"
    done, first = wb._done(), after[made[0]]
    part = next(p for p in parts if p in first and not first[p].loadable)
    said = f"step {done[made[0]].name!r} changed the data of {part!r}"
    if source == "random":
        return f"{said}, and random weights cannot stand in for it: take weights='loaded'"
    if stood[-1] + 1 == len(done):
        return f"{said}, and something outside the pipeline changed it again: wb.rewind({done[made[0]].name!r}) and run"
    later = done[stood[-1] + 1].name
    return f"{said}, and step {later!r} changed or freed it since: wb.rewind({later!r}) and check there"


def runnable(wb: Workbench, snapshot: Snapshot, stamps: Stamps, source: str, seed: int) -> GraphModule:
    """``snapshot`` as a module with real weights on the Workbench's device; the Workbench's own stay as
    they are."""
    holder = torch.nn.Module()
    module = wb._state.module
    holder.meta = {  # type: ignore[assignment]
        k: v for k, v in getattr(module, "meta", {}).items() if k not in ("adkit_ids", "adkit_journal")
    }
    for name, have in _held(wb, snapshot, stamps, source).items():
        put_tensor(holder, name, have)
    gm = rebuild(snapshot, holder)
    missing = [n for n in graph_tensor_names(gm) if cast(Tensor, tensor_at(gm, n)).is_meta]
    if missing:
        size = sum({n: cast(Tensor, tensor_at(gm, n)).nbytes for n in missing}.values())
        if size > (free := free_bytes(wb.device)):
            raise MemoryLimitError(
                f"to run this graph of {wb.name!r} takes {human(size)} of {source} weights, and {wb.device} has "
                f"{human(free)} free: use a smaller dtype, another device, or a config with fewer layers"
            )
        factory = wb.factory.with_random_weights(seed) if source == "random" else wb.factory
        with wb.bars as bars:
            load_graph_tensors(gm, factory, missing, wb.device, bars.loading)
    retarget_device(gm, wb.device)
    gm.recompile()
    return gm


def _prompts(wb: Workbench, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vocab = wb.factory.config.get_text_config(decoder=True).vocab_size
    return [torch.randint(vocab, (n,), generator=generator) for n in LENGTHS]


def _unseen_window(snapshot: Snapshot) -> str:
    """A remark when attention is limited to more tokens than the prompts have, so that the limit was not
    tried."""
    limits = {
        v for n in snapshot for k, v in n.kwargs.items() if k in ("window", "chunk") and isinstance(v, int)
    }
    longer = sorted(v for v in limits if v >= max(LENGTHS))
    return (
        f"prompts of {max(LENGTHS)} tokens do not reach the attention window of {longer[0]}" if longer else ""
    )


def logits(gm: GraphModule, snapshot: Snapshot, wb: Workbench, seed: int = 0) -> list[Tensor]:
    """Logits [len, V] of each of a few ragged random prompts at every position, whatever inputs the graph
    has."""
    prompts = _prompts(wb, seed)
    inputs = [n.target for n in snapshot if n.op == "placeholder"]
    prefill = [max(1, len(p) // 2) for p in prompts]
    try:
        with torch.inference_mode():
            if not set(inputs) & set(CACHE_INPUTS):
                return [_whole(gm, inputs, p, n, wb.device) for p, n in zip(prompts, prefill, strict=True)]
            pool = scratch_pool(wb, inputs)
            return packed_logits(lambda **feed: gm(**feed)[0], inputs, pool, prompts, prefill, wb.device)
    except (AdkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an operator makes of arguments that a pass got wrong
        raise GraphFails(f"the graph does not run: {type(error).__name__}: {error}") from error


def _compiled_logits(compiled: CompiledModel, wb: Workbench, seed: int) -> list[Tensor]:
    """The same of a compiled model."""
    prompts = _prompts(wb, seed)
    pool = replace(compiled.caches, tensors={}, num_pages=0)
    with torch.inference_mode():
        prefill = [max(1, len(p) // 2) for p in prompts]
        return packed_logits(compiled.forward, compiled.inputs, pool, prompts, prefill, compiled.device)


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


def scratch_pool(wb: Workbench, inputs: Sequence[str]) -> CachePool:
    """A pool without memory yet for the caches that a graph with these inputs reads."""
    for state in (wb._state, *reversed(wb._history)):
        if state.caches is not None and {s.name for s in state.caches.specs} <= set(inputs):
            return replace(state.caches, tensors={}, num_pages=0)
    raise AdkitError(
        "the graph reads caches that no step of the pipeline as it stands declared; run it again"
    )


def packed_logits(
    forward: Callable[..., Tensor],
    inputs: Sequence[str],
    pool: CachePool,
    sequences: Sequence[Tensor],
    prefill: Sequence[int],
    device: torch.device,
) -> list[Tensor]:
    """Logits [len, V] of known token sequences through a packed, cached graph, all sequences in one batch.

    ``forward`` gives logits [1, T, V]. The first ``prefill[i]`` tokens of each go in at once, the rest one
    a step, as in generation. ``pool`` is given memory for the purpose unless it has enough, whose content is
    then lost.
    """
    size = pool.page_size
    pages = [math.ceil(len(s) / size) for s in sequences]
    if pool.num_pages < 1 + sum(pages):
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
