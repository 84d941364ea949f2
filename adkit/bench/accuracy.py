"""Are the numbers right? The engine's logits against a float32 reference, and the demo model's answers.

Logits: sequences of known tokens go through the compiled model as they would be served, a prompt whole and then token
by token (launched one by one: replayed graphs give no logits away, and tests hold that they compute the same), and
through the Hugging Face model with the same weights widened to float32. rmse ratio = rmse(engine - reference) /
rms(reference) over all logits. Hugging Face's own run in the engine's dtype stands beside it: what rounding alone does.

Random weights as Hugging Face draws them are no fair subject of a bound that is meant for trained ones: at full depth
they amplify rounding, Hugging Face's own bf16 run of Llama-3.1-8B to three times the bound
(:mod:`adkit.bench.conditioning` has the reason and the remedy). So random weights are measured twice: ``raw``, as
information, and ``conditioned``, with residual branches scaled by depth, which the bound judges. A checkpoint is judged
as it is, and so is a model whose residual stream cannot be conditioned.

Agreement is the share of positions after the prompt whose largest logit is the same token: of ``all`` positions; of
those ``decided``, whose two largest differ by more than one unit in the dtype's last place; and of those ``separated``,
where they differ by more than three times what errors at the bound make of a difference (3 sqrt(2) x bound x rms of the
position's logits). Random logits over a large vocabulary are all but Gaussian; a third of all positions then lies
closer, and a run within the bound may give either token there. Decided positions are judged, and in the demo's tasks,
where the model is trained to be certain, all; the other two shares tell how to read that. The demo model must also
answer its tasks, and in float32 generate what a CPU does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adkit.bench import conditioning, machine, peers
from adkit.bench.workload import Room
from adkit.checking import compare, packed_logits
from adkit.config import Fragment
from adkit.contract import AdkitError, CompiledModel, ConfigError, SamplingParams
from adkit.graph.snapshot import attribute
from adkit.models import ModelFactory, resolve
from adkit.models.demo.tasks import MAX_NEW_TOKENS, addition_tasks, is_correct, recall_tasks
from adkit.runtime.live import LiveModel
from adkit.workbench import Workbench

#: Largest rmse ratio of a bf16 run, and least agreement on the demo model, whose weights are not random.
DENSE, EXPERTS, AGREEMENT = 0.02, 0.03, 0.99
GREEDY_TOKENS = 256
#: Tokens of a sequence that go in at once and one by one, where there is room for them.
LENGTHS = (192, 64)
_STORIES = ("Once upon a time", "There once was a clever fox", "Long ago", "In a little house")
Row = dict[str, Any]


def measure(
    model: Any,
    *,
    layers: int | None = None,
    sequences: int = 4,
    prompt: int | None = None,
    new: int | None = None,
    dtype: str = "bfloat16",
    tasks: int | None = None,
    seed: int = 0,
    config: Sequence[Fragment] = (),
    overrides: Sequence[str] = (),
    random_weights: bool = False,
    command: str = "",
    progress: bool = True,
    show: Callable[[str], None] = print,
) -> Row:
    """Compare ``model`` in ``dtype`` with its float32 reference; ``ok`` where all figures are within bounds.

    The row has the figures of ``raw`` weights, of ``conditioned`` ones where they are random, and which is ``judged``.
    ``layers`` keeps only so many (with random weights) of a model whose float32 copy would not fit. ``sequences`` of
    ``prompt`` + ``new`` tokens (default: 192 + 64, or as many as there is room for) are random; the demo model gets
    stories and tasks, and goes on for up to ``new`` tokens. ``tasks`` caps the demo's tasks (default: all). Raises
    ConfigError for sizes that cannot be, and for those that this model has no use for.
    """
    sizes = {"sequences": sequences, "prompt": prompt, "new": new, "layers": layers, "tasks": tasks}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} is {size}; give at least 1")
    demo = model == "demo" and not random_weights and layers is None
    if demo and prompt is not None:
        raise ConfigError(
            "the demo's prompts are stories and tasks; leave out prompt, or take random_weights"
        )
    if not demo and tasks is not None:
        raise ConfigError("tasks are the demo's, with its own weights and layers; leave them out for others")
    prompt, new = Room.of(model, config, overrides, sampled=False).fit(prompt, new, LENGTHS, show)
    settings: Row = {
        "max_batch_size": max(sequences, 64 if demo else 1),
        "max_seq_len": max(prompt + new, 512),
    }
    settings |= {"max_num_tokens": max(sequences * prompt, 2048), "dtype": dtype}
    settings["free_gpu_memory_fraction"] = (
        0.2  # a few hundred tokens need little, and others may run beside this
    )
    if not demo:  # logits come from steps launched one by one: nothing to capture for
        settings["transforms"] = {
            "compile_model": {"cuda_graph_batch_sizes": [1], "cuda_graph_num_tokens": []}
        }
    if layers is not None:
        model = _shorter(model, layers)
    options: Row = {"config": [settings, *config], "overrides": overrides, "progress": progress}
    wb = Workbench(model, random_weights=random_weights, **options)
    if wb.factory.weights == "none":
        wb = Workbench(model, random_weights=True, **options)
    wb.run(until="pattern_matcher")
    factory, device = wb.factory, wb.device
    if demo:
        tokens, prompts = _demo_tokens(sequences, new, overrides)
    else:
        tokens, prompts = _random_tokens(factory, sequences, prompt + new, seed), [prompt] * sequences
    experts = any(n.target_name.endswith("moe") or "_moe" in n.target_name for n in wb.graph)
    with wb.bars.busy("Hugging Face in float32"):
        subject = _Subject(wb, tokens, prompts, EXPERTS if experts else DENSE)
    row: Row = {
        "what": f"{factory.name} in {dtype} against Hugging Face in float32",
        "command": command,
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "model": factory.name,
        "weights": factory.weights,
        "layers": int(factory.config.get_text_config(decoder=True).num_hidden_layers),
        "dtype": dtype,
        "sequences": len(tokens),
        "prompt_tokens": sum(prompts),
        "tokens": sum(map(len, tokens)),
        "rmse_ratio_limit": subject.limit,
    }
    llm = wb.llm()
    row["compile"] = wb.steps["compile_model"].info.details.get("backend")
    bars = wb.bars
    with bars.busy("the engine's logits"):
        logits = subject.engine_logits(wb, llm)
    with bars.busy("tasks"):
        scores = _task_scores(llm, tasks) if demo else {}
    del wb, llm
    machine.free(device)
    with bars.busy(f"Hugging Face in {dtype}"):
        row |= subject.figures(logits, factory.dtype)
    judged = row[row["judged"]]
    row["ok"] = judged["rmse_ratio"] < subject.limit and judged["top1_agreement"]["decided"] >= AGREEMENT
    if demo:
        row |= scores
        with bars.busy("greedy texts in float32"):
            row["greedy_float32"] = _greedy_like_cpu(device, overrides)
        # A story may go on in many ways that are equally likely; an answer to a task may not.
        row["tasks_top1_agreement"] = subject.agreement("raw", logits["raw"], factory.dtype, len(_STORIES))
        row["ok"] &= row["tasks_top1_agreement"]["all"] >= AGREEMENT and row["greedy_float32"]["equal"]
        row["ok"] &= all(s["correct"] == s["problems"] for s in scores["tasks"].values())
    show(line(row))
    return row


class _Subject:
    """One model's weights as they are (``raw``) and ``conditioned``: the logits of both, and how far they are apart."""

    def __init__(self, wb: Workbench, tokens: list[Tensor], prompts: list[int], limit: float) -> None:
        self.factory, self.device = wb.factory, wb.device
        self.tokens, self.prompts, self.limit = tokens, prompts, limit
        self.factors: dict[str, float] = {}
        self.unconditioned = "" if self.factory.weights == "random" else "the weights are not random"
        if not self.unconditioned:
            try:
                self.stream = conditioning.residual_stream(wb.graph)
            except conditioning.NoStream as error:
                self.unconditioned = str(error)
        self.reference = self._hugging_face_logits(torch.float32)

    def engine_logits(self, wb: Workbench, llm: LiveModel) -> dict[str, Tensor]:
        """The engine's logits [T, V] of both."""
        found = {"raw": _engine_logits(llm, wb._state.compiled, self.tokens, self.prompts)}
        if self.factors:
            conditioning.scale(self._held(wb), self.factors)
            found["conditioned"] = _engine_logits(llm, wb._state.compiled, self.tokens, self.prompts)
        return found

    def _held(self, wb: Workbench) -> dict[str, Tensor]:
        """The tensors of the engine's graph that conditioning scales; raises AdkitError where one is not to be had."""
        tied = self.factory.tied
        held = {
            n: t for n in self.factors if isinstance(t := attribute(wb.module, n), Tensor) and not t.is_meta
        }
        lost = {tied.get(n, n) for n in self.factors} - {tied.get(n, n) for n in held}
        if lost:
            raise AdkitError(
                f"the compiled graph no longer holds {', '.join(sorted(lost))}, which conditioning scales"
            )
        return held

    def figures(self, ours: dict[str, Tensor], dtype: torch.dtype) -> Row:
        """What is reported: a section for the raw weights and one for the conditioned ones, and which is judged."""
        theirs = self._hugging_face_logits(dtype)
        found: Row = {"judged": "conditioned" if "conditioned" in ours else "raw"}
        if self.unconditioned:
            found["not_conditioned"] = self.unconditioned
        for kind, logits in ours.items():
            found[kind] = {
                "rmse_ratio": round(compare(self.reference[kind], logits)[1], 6),
                "hf_rmse_ratio": round(compare(self.reference[kind], theirs[kind])[1], 6),
                "top1_agreement": self.agreement(kind, logits, dtype),
                "hf_top1_agreement": self.agreement(kind, theirs[kind], dtype),
            }
        if "conditioned" in found:
            # Where the head is the embedding, a token's own logit stands out, and agreement says little.
            best = self.reference["conditioned"].argmax(-1)
            found["conditioned"] |= {
                "branches": len(self.stream.branches),
                "best_is_the_input": round(float((best == torch.cat(self.tokens)).double().mean()), 5),
            }
        return found

    def agreement(self, kind: str, logits: Tensor, dtype: torch.dtype, first: int = 0) -> Row:
        """Top-1 agreement after the prompts, of the sequences from ``first`` on."""
        at = torch.cat(
            [
                (torch.arange(len(t)) >= n - 1) & (i >= first)
                for i, (t, n) in enumerate(zip(self.tokens, self.prompts, strict=True))
            ]
        )
        return _agreement(self.reference[kind][at], logits[at], dtype, self.limit)

    @torch.no_grad()
    def _hugging_face_logits(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The Hugging Face model's logits [T, V] in ``dtype``; the first time, conditioning is worked out."""
        model = peers.load_model(self.factory, self.device, dtype)
        found = {"raw": self._run(model)}
        if not self.unconditioned:
            if not self.factors:
                self.factors = conditioning.factors(model, self.stream, self.tokens[0], self.factory.tied)
            conditioning.scale(dict(model.named_parameters(remove_duplicate=False)), self.factors)
            found["conditioned"] = self._run(model)
        del model
        machine.free(self.device)
        return found

    def _run(self, model: Any) -> Tensor:
        ids = [t[None].to(self.device) for t in self.tokens]
        return torch.cat([model(i, use_cache=False).logits[0].float().cpu() for i in ids])


def line(row: Row) -> str:
    """The outcome for people."""
    parts = []
    for kind in ("conditioned", "raw"):
        if kind not in row:
            continue
        part, judged = row[kind], kind == row["judged"]
        outcome = ("ok" if row["ok"] else "OUT OF BOUNDS") if judged else "for information"
        below = f"below {row['rmse_ratio_limit']}; " if judged else ""
        top, theirs = part["top1_agreement"], part["hf_top1_agreement"]
        weights = f"{kind} {row['weights']} weights" if row["weights"] == "random" else "its weights"
        parts.append(
            f"{weights}: {outcome}, rmse ratio {part['rmse_ratio']:.4f} "
            f"({below}Hugging Face {part['hf_rmse_ratio']:.4f}), top-1 agreement {top['all']:.2%} "
            f"(Hugging Face {theirs['all']:.2%}), {top['decided']:.2%} where {row['dtype']} tells the two largest "
            f"apart, {top['separated']:.2%} where errors within the bound do"
        )
    if "tasks_top1_agreement" in row:
        parts.append(f"in tasks {row['tasks_top1_agreement']['all']:.2%}")
    parts += [f"{name} {s['correct']} of {s['problems']}" for name, s in row.get("tasks", {}).items()]
    if "greedy_float32" in row:
        same = row["greedy_float32"]
        parts.append(f"float32 greedy {'equals' if same['equal'] else 'DIFFERS FROM'} the CPU's")
    return f"{row['model']:<16} {row['layers']:>3} layers: " + "; ".join(parts)


def _shorter(model: Any, layers: int) -> Any:
    """The model's config with only its first layers."""
    config = copy.deepcopy(resolve(model).config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return config


def _random_tokens(factory: ModelFactory, count: int, length: int, seed: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    vocab = factory.config.get_text_config(decoder=True).vocab_size
    return [torch.randint(vocab, (length,), generator=source) for _ in range(count)]


def _demo_tokens(count: int, new: int, overrides: Sequence[str]) -> tuple[list[Tensor], list[int]]:
    """Stories and tasks, each with what the model goes on with in float32 on a CPU; and the prompts' lengths."""
    tasks = zip(addition_tasks(count), recall_tasks(count), strict=True)
    texts = [*_STORIES, *(t.prompt for pair in tasks for t in pair)][:count]
    llm = Workbench(
        "demo", overrides=overrides, progress=False, device="cpu", dtype="float32", max_seq_len=512
    ).llm()
    done = llm.generate(texts, SamplingParams(max_tokens=new), progress=False)
    return [torch.tensor([*c.prompt_token_ids, *c.token_ids]) for c in done], [
        len(c.prompt_token_ids) for c in done
    ]


def _engine_logits(
    llm: LiveModel, compiled: CompiledModel | None, tokens: list[Tensor], prompts: list[int]
) -> Tensor:
    """Logits [T, V] of every position as the engine would compute them, over the engine's own cache."""
    assert compiled is not None
    llm.engine.reset()
    with torch.inference_mode():
        each = packed_logits(
            compiled.forward, compiled.inputs, compiled.caches, tokens, prompts, compiled.device
        )
    llm.engine.reset()  # the pages hold other things now than it knows
    return torch.cat(each).float().cpu()


def _agreement(reference: Tensor, ours: Tensor, dtype: torch.dtype, limit: float) -> Row:
    """Share of rows with the same largest logit: of all, of those that ``dtype`` can decide at all, and of those that
    errors within ``limit`` leave as they are."""
    if not len(reference):
        return dict.fromkeys(("all", "decided", "separated"), 1.0)
    same = (reference.argmax(-1) == ours.argmax(-1)).double()
    first, second = reference.topk(2, -1).values.unbind(-1)
    gap = first - second
    decided = gap > torch.finfo(dtype).eps * first.abs()
    separated = decided & (gap > 3 * math.sqrt(2) * limit * reference.square().mean(-1).sqrt())
    return {
        "all": round(float(same.mean()), 5),
        "decided": round(float(same[decided].mean()), 5) if decided.any() else 1.0,
        "separated": round(float(same[separated].mean()), 5) if separated.any() else 1.0,
        "undecided_share": round(float((~decided).double().mean()), 5),
        "inseparable_share": round(float((~separated).double().mean()), 5),
    }


def _task_scores(llm: LiveModel, most: int | None) -> Row:
    found = {}
    for name, tasks in (("addition", addition_tasks()), ("recall", recall_tasks(600))):
        tasks = tasks[:most]
        done = llm.generate(
            [t.prompt for t in tasks], SamplingParams(max_tokens=MAX_NEW_TOKENS), progress=False
        )
        right = sum(is_correct(t, c.text) for t, c in zip(tasks, done, strict=True))
        found[name] = {"problems": len(tasks), "correct": right}
    return {"tasks": found}


def _greedy_like_cpu(device: torch.device, overrides: Sequence[str]) -> Row:
    """Greedy answers of the demo in float32 on the device and on the CPU, token by token."""
    params = SamplingParams(max_tokens=GREEDY_TOKENS, ignore_eos=True)
    answers = []
    for where in (str(device), "cpu"):
        wb = Workbench("demo", overrides=overrides, progress=False, device=where, dtype="float32",
                       max_seq_len=512, max_batch_size=len(_STORIES))  # fmt: skip
        done = wb.llm().generate(list(_STORIES), params, progress=False)
        answers.append([c.token_ids for c in done])
        del wb
        machine.free(device)
    same = [sum(x == y for x, y in zip(a, b, strict=True)) for a, b in zip(*answers, strict=True)]
    return {
        "prompts": len(_STORIES),
        "tokens": GREEDY_TOKENS,
        "same": same,
        "equal": answers[0] == answers[1],
    }
