"""Are the numbers right? The engine's logits against a float32 reference, and the demo model's answers.

Logits: sequences of known tokens go through the compiled model as they would be served, a prompt whole and then token
by token (launched one by one: replayed graphs give no logits away, and tests hold that they compute the same), and
through the Hugging Face model with the same weights widened to float32. rmse ratio = rmse(engine - reference) /
rms(reference) over all logits; agreement = share of positions after the prompt whose largest logit is the same token,
of all and of those where the reference's two largest differ by more than the engine's dtype can hold. Hugging Face's
own run in the engine's dtype stands beside it: what rounding alone does. The demo model must also answer its tasks,
and in float32 generate what a CPU does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adkit.bench import machine, peers
from adkit.checking import compare, packed_logits
from adkit.config import Fragment
from adkit.contract import CompiledModel, ConfigError, SamplingParams
from adkit.models import ModelFactory, resolve
from adkit.models.demo.tasks import MAX_NEW_TOKENS, addition_tasks, is_correct, recall_tasks
from adkit.runtime.live import LiveModel
from adkit.workbench import Workbench

#: Largest rmse ratio of a bf16 run, and least agreement on the demo model, whose weights are not random.
DENSE, EXPERTS, AGREEMENT = 0.02, 0.03, 0.99
GREEDY_TOKENS = 256
_STORIES = ("Once upon a time", "There once was a clever fox", "Long ago", "In a little house")
Row = dict[str, Any]


def measure(
    model: Any,
    *,
    layers: int | None = None,
    sequences: int = 4,
    prompt: int = 192,
    new: int = 64,
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

    ``layers`` keeps only so many (with random weights) of a model whose float32 copy would not fit. ``sequences`` of
    ``prompt`` + ``new`` tokens are random; the demo model gets stories and tasks, and goes on for up to ``new`` tokens.
    ``tasks`` caps the demo's tasks (default: all). Raises ConfigError for sizes that cannot be.
    """
    if min(sequences, prompt, new) < 1 or (layers is not None and layers < 1):
        raise ConfigError(
            f"sequences {sequences}, prompt {prompt}, new {new}, layers {layers}: give at least 1"
        )
    demo = model == "demo" and not random_weights and layers is None
    settings: Row = {
        "max_batch_size": max(sequences, 64 if demo else 1),
        "max_seq_len": max(prompt + new, 512),
    }
    settings |= {"max_num_tokens": max(sequences * prompt, 2048), "dtype": dtype}
    if layers is not None:
        model = _shorter(model, layers)
    options: Row = {"config": [settings, *config], "overrides": overrides, "progress": progress}
    wb = Workbench(model, random_weights=random_weights, **options)
    if wb.factory.weights == "none":
        wb = Workbench(model, random_weights=True, **options)
    factory, device, llm = wb.factory, wb.device, wb.llm()
    if demo:
        tokens, prompts = _demo_tokens(sequences, new, overrides)
    else:
        tokens, prompts = _random_tokens(factory, sequences, prompt + new, seed), [prompt] * sequences
    ours = _engine_logits(llm, wb._state.compiled, tokens, prompts)
    experts = any(n.target_name.endswith("moe") or "_moe" in n.target_name for n in wb.graph)
    row: Row = {
        "what": f"{factory.name} in {dtype} against Hugging Face in float32",
        "command": command,
        "machine": machine.describe(device),
        "versions": machine.versions(),
        "model": factory.name,
        "weights": factory.weights,
        "layers": int(factory.config.get_text_config(decoder=True).num_hidden_layers),
        "dtype": dtype,
        "compile": wb.steps["compile_model"].info.details.get("backend"),
        "sequences": len(tokens),
        "prompt_tokens": sum(prompts),
        "tokens": sum(map(len, tokens)),
    }
    scores = _task_scores(llm, tasks) if demo else {}
    del wb, llm
    machine.free(device)

    reference = _reference_logits(factory, device, tokens, torch.float32)
    limit = EXPERTS if experts else DENSE
    ratio = compare(reference, ours)[1]
    row |= {"rmse_ratio": round(ratio, 6), "rmse_ratio_limit": limit}
    theirs = _reference_logits(factory, device, tokens, factory.dtype)
    answers = [torch.arange(len(t)) >= n - 1 for t, n in zip(tokens, prompts, strict=True)]
    at = torch.cat(answers)
    row["top1_agreement"] = _agreement(reference[at], ours[at], factory.dtype)
    row["hf_rmse_ratio"] = round(compare(reference, theirs)[1], 6)
    row["hf_top1_agreement"] = _agreement(reference[at], theirs[at], factory.dtype)
    row["ok"] = ratio < limit and row["top1_agreement"]["decided"] >= AGREEMENT
    if demo:
        row |= scores
        row["greedy_float32"] = _greedy_like_cpu(device, overrides)
        # A story may go on in many ways that are equally likely; an answer to a task may not.
        at = torch.cat([yes & (i >= len(_STORIES)) for i, yes in enumerate(answers)])
        row["tasks_top1_agreement"] = _agreement(reference[at], ours[at], factory.dtype)
        row["ok"] &= row["tasks_top1_agreement"]["all"] >= AGREEMENT and row["greedy_float32"]["equal"]
        row["ok"] &= all(s["correct"] == s["problems"] for s in scores["tasks"].values())
    show(line(row))
    return row


def line(row: Row) -> str:
    """The outcome for people."""
    parts = [
        f"{row['model']:<16} {row['layers']:>3} layers: {'ok' if row['ok'] else 'OUT OF BOUNDS'}, rmse ratio "
        f"{row['rmse_ratio']:.4f} (below {row['rmse_ratio_limit']}; Hugging Face {row['hf_rmse_ratio']:.4f})",
        f"top-1 agreement {row['top1_agreement']['all']:.2%} (Hugging Face {row['hf_top1_agreement']['all']:.2%}), "
        f"{row['top1_agreement']['decided']:.2%} where {row['dtype']} can tell the two largest apart",
    ]
    if "tasks_top1_agreement" in row:
        parts.append(f"in tasks {row['tasks_top1_agreement']['all']:.2%}")
    parts += [f"{name} {s['correct']} of {s['problems']}" for name, s in row.get("tasks", {}).items()]
    if "greedy_float32" in row:
        same = row["greedy_float32"]
        parts.append(f"float32 greedy {'equals' if same['equal'] else 'DIFFERS FROM'} the CPU's")
    return "; ".join(parts)


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


@torch.no_grad()
def _reference_logits(
    factory: ModelFactory, device: torch.device, tokens: list[Tensor], dtype: torch.dtype
) -> Tensor:
    model = peers.load_model(factory, device, dtype)
    each = [model(t[None].to(device), use_cache=False).logits[0].float().cpu() for t in tokens]
    del model
    machine.free(device)
    return torch.cat(each)


def _agreement(reference: Tensor, ours: Tensor, dtype: torch.dtype) -> Row:
    """Share of rows with the same largest logit: of all, and of those that ``dtype`` can decide at all."""
    if not len(reference):
        return {"all": 1.0, "decided": 1.0, "undecided_share": 0.0}
    same = reference.argmax(-1) == ours.argmax(-1)
    first, second = reference.topk(2, -1).values.unbind(-1)
    decided = first - second > torch.finfo(dtype).eps * first.abs()
    return {
        "all": round(float(same.double().mean()), 5),
        "decided": round(float(same[decided].double().mean()), 5) if decided.any() else 1.0,
        "undecided_share": round(float((~decided).double().mean()), 5),
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
