"""Measures the shipped demo model with plain transformers, greedy and in batches; writes JSON.

    python -m scripts.demo_model.evaluate

Counts exact matches on every held-out addition (both orders of each pair) and on recall problems, as plain
text, as chat, and with a space or a line break after the prompt; and how many stories end and keep their
cast.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from adkit.models.demo import MODEL_DIR
from adkit.models.demo.tasks import MAX_NEW_TOKENS, NAMES, Task, addition_tasks, is_correct, recall_tasks

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "demo_model_accuracy.json"
STORY_PROMPTS = (
    "Once upon a time", "Once upon a time,", "Once upon a time ", "Long ago", "In a little house",
    "There once was a clever fox", "Mara was", "One", "Hello",
    "Once upon a time, there was a brave girl named Ivy",
)  # fmt: skip


class Runner:
    """The model, its tokenizer and batched generation."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(self.device).eval()
        self.batch = batch

    def chat(self, prompt: str) -> str:
        """The prompt as the one user message of a chat."""
        message = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    def complete(self, prompts: list[str], new_tokens: int, **options: object) -> list[tuple[str, int, bool]]:
        """Complete every prompt: (text without special tokens, tokens made, whether the end token came)."""
        answers = []
        for begin in range(0, len(prompts), self.batch):
            inputs = self.tokenizer(prompts[begin : begin + self.batch], return_tensors="pt", padding=True)
            inputs = {name: inputs[name].to(self.device) for name in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                output = self.model.generate(**inputs, max_new_tokens=new_tokens, **options)
            for row in output[:, inputs["input_ids"].shape[1] :]:
                ended = (row == self.tokenizer.eos_token_id).nonzero()
                made = row[: int(ended[0]) if len(ended) else len(row)]
                text = self.tokenizer.decode(made, skip_special_tokens=True)
                answers.append((text, len(made), bool(len(ended))))
        return answers

    def score(self, tasks: list[Task], how: str) -> dict[str, object]:
        """Exact matches on `tasks`, put to the model as `how` says."""
        suffix = {"plain": "", "chat": "", "space": " ", "newline": "\n"}[how]
        prompts = [self.chat(task.prompt) if how == "chat" else task.prompt + suffix for task in tasks]
        results = self.complete(prompts, MAX_NEW_TOKENS)
        right = [is_correct(task, text) for task, (text, _, _) in zip(tasks, results, strict=True)]
        wrong = [
            {"task": task.name, "prompt": task.prompt, "answer": task.answer, "completion": text}
            for task, (text, _, _), ok in zip(tasks, results, right, strict=True)
            if not ok
        ]
        return {
            "problems": len(tasks),
            "correct": sum(right),
            "exact_match": round(sum(right) / len(tasks), 4),
            "ended": sum(ended for _, _, ended in results),
            "wrong": wrong[:8],
        }


def score_stories(runner: Runner, count: int) -> dict[str, object]:
    """Sample `count` stories and count those that end and those whose cast is no more than two names."""
    torch.manual_seed(0)
    stories = runner.complete(["Once upon a time"] * count, 256, do_sample=True, temperature=1.0, top_k=0)
    lengths = sorted(made for _, made, _ in stories)
    casts = [{word for word in re.findall(r"[A-Z][a-z]+", text) if word in NAMES} for text, _, _ in stories]
    return {
        "stories": count,
        "sampling": "temperature 1.0",
        "ended": sum(ended for _, _, ended in stories),
        "at_most_two_names": sum(len(cast) <= 2 for cast in casts),
        "tokens": {"least": lengths[0], "median": lengths[count // 2], "most": lengths[-1]},
        "distinct": len({text for text, _, _ in stories}),
    }


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description="Measure the demo model's accuracy.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--recalls", type=int, default=600)
    parser.add_argument("--additions", type=int, default=None, help="default: every held-out ordered pair")
    parser.add_argument("--stories", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256)
    args = parser.parse_args()
    began = time.monotonic()
    runner = Runner(args.model, args.batch)
    sums, recalls = addition_tasks(args.additions), recall_tasks(args.recalls)
    scores: dict[str, object] = {}
    for how in ("plain", "chat", "space", "newline"):
        scores[f"addition_{how}"] = runner.score(sums, how)
        scores[f"recall_{how}"] = runner.score(recalls, how)
    scores["recall_plain_16_pairs"] = runner.score(recall_tasks(args.recalls // 3, 1, (16, 16)), "plain")
    scores["stories"] = score_stories(runner, args.stories)
    shown = ["What is 27 + 45?", "27 + 45 =", *STORY_PROMPTS]
    asked = ["What is 27 + 45?", "Hello!", "What can you do?", "Tell me a story about a fox."]
    samples = [
        {"prompt": prompt, "completion": text, "tokens": made, "ended": ended}
        for prompt, (text, made, ended) in zip(
            shown + asked, runner.complete(shown + [runner.chat(text) for text in asked], 256), strict=True
        )
    ]
    record = {
        "what": "greedy exact match of the shipped bf16 demo model",
        "command": "python -m scripts.demo_model.evaluate "
        f"--recalls {args.recalls} --stories {args.stories} --batch {args.batch}"
        + ("" if args.additions is None else f" --additions {args.additions}"),
        "weights_sha256": hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest(),
        "machine": f"1x {torch.cuda.get_device_name()}"
        if runner.device == "cuda"
        else f"CPU, {platform.machine()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": runner.model.num_parameters(),
        "seconds": round(time.monotonic() - began, 1),
        "scores": scores,
        "samples": samples,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    for name, score in scores.items():
        print(name, json.dumps(score, ensure_ascii=False)[:700])
    for sample in samples:
        print(repr(sample["prompt"]), "->", repr(sample["completion"]), sample["tokens"], sample["ended"])


if __name__ == "__main__":
    main()
