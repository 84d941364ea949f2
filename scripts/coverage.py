"""Which causal LMs of transformers run through adkit exactly: every type of its mapping, tried.

    python scripts/coverage.py                      # all; writes the record and the page
    python scripts/coverage.py --types llama bloom  # some; only prints
    python scripts/coverage.py --types llama --write  # merges them into the record
    python scripts/coverage.py --timeout 600        # on a machine that is busy with other work

The record is ``benchmarks/results/coverage.json``, the page ``docs/coverage.md``. Each type becomes a tiny
random checkpoint made to be sensitive (``tests/zoo.py``), goes through ``adkit.Workbench`` on the CPU in
float32, and a ragged packed batch of three prompts with eight decode steps is compared with Hugging Face
running each prompt alone. Models run in a worker process that is started anew when it crashes or takes longer
than the limit (a minute, unless told otherwise), so one model cannot stop the rest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shlex
import sys
import tempfile
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/coverage.json"
PAGE = ROOT / "docs/coverage.md"

LENGTHS = (3, 17, 9)
STEPS = 8
TOLERANCE = 1e-5
TIMEOUT = 60.0
MOST_PARAMETERS = 20_000_000

#: What each outcome means, best first.
OUTCOMES = {
    "ok": f"logits of every position within rmse ratio {TOLERANCE:g} of Hugging Face",
    "refused": "one clear error, before any token is generated",
    "error": "an error that does not say what to do",
    "wrong": "logits differ: a bug",
    "timeout": "took longer than the time limit",
    "crash": "the process died",
    "not tried": "no tiny model: our sizes do not suit the type, or transformers cannot make or run it here",
}


def attempt(kind: str, folder: Path) -> dict[str, Any]:
    """Run one type; ``outcome`` and what belongs to it (``rmse`` ratio, ``reason``, ``step``)."""
    import torch

    import adkit
    from adkit.checking import packed_logits
    from adkit.contract import AdkitError
    from tests.zoo import meta_twin, rmse_ratio, tiny, tiny_config

    try:
        parameters = sum(p.numel() for p in meta_twin(tiny_config(kind)).parameters())
        if parameters > MOST_PARAMETERS:
            reason = f"the tiny model is not tiny ({parameters / 1e6:.0f}M parameters)"
            return {"outcome": "not tried", "reason": reason}
        config, model = tiny(kind)
        model.save_pretrained(folder)
        generator = torch.Generator().manual_seed(1)
        vocab = config.get_text_config(decoder=True).vocab_size
        prompts = [torch.randint(3, min(vocab, 131), (n,), generator=generator) for n in LENGTHS]
        expected = [_greedy(model, p) for p in prompts]
        if not all(bool(torch.isfinite(logits).all()) for _, logits in expected):
            return {"outcome": "not tried", "reason": "the tiny random model's logits are not finite"}
    except Exception as error:
        return {"outcome": "not tried", "reason": _line(error)}
    wb = None
    try:
        wb = adkit.Workbench(
            folder, device="cpu", dtype="float32", max_seq_len=64, page_size=4, progress=False
        )
        wb.run()
        compiled = wb._state.compiled
        assert compiled is not None
        assert compiled.caches is not None
        sequences = [tokens for tokens, _ in expected]
        with torch.inference_mode():
            got = packed_logits(
                compiled.forward, compiled.inputs, compiled.caches, sequences, LENGTHS, wb.device
            )
    except AdkitError as error:
        return {"outcome": "refused", "step": _next(wb), "reason": _lines(error, folder)}
    except Exception as error:
        return {"outcome": "error", "step": _next(wb), "reason": _line(error)}
    ratio = max(rmse_ratio(g, e) for g, (_, e) in zip(got, expected, strict=True))
    if ratio < TOLERANCE:
        return {"outcome": "ok", "rmse": ratio}
    with torch.no_grad():
        whole = [model(input_ids=tokens[None]).logits[0] for tokens in sequences]
    alone = max(rmse_ratio(g, w) for g, w in zip(got, whole, strict=True))
    if alone < TOLERANCE:
        reason = (
            f"as Hugging Face without its cache, with which it differs from itself (rmse ratio {ratio:.1e})"
        )
        return {"outcome": "ok", "rmse": alone, "reason": reason}
    return {"outcome": "wrong", "rmse": ratio}


def _greedy(model: Any, prompt: Any) -> tuple[Any, Any]:
    """Tokens and logits of Hugging Face alone, sequences whole where it has no cache or cannot use its own."""
    import torch

    from tests.reference import hf_greedy

    with torch.no_grad():
        try:
            if getattr(model(input_ids=prompt[None], use_cache=True), "past_key_values", None) is not None:
                return hf_greedy(model, prompt, STEPS)
        except (AttributeError, RuntimeError):
            pass
        tokens = prompt
        for _ in range(STEPS):
            logits = model(input_ids=tokens[None], use_cache=False).logits
            tokens = torch.cat((tokens, logits[0, -1:].argmax(-1)))
        return tokens, model(input_ids=tokens[None], use_cache=False).logits[0]


def _next(wb: Any) -> str:
    if wb is None:
        return "Workbench"
    return next((s.name for s in wb.steps if s.status in ("failed", "pending")), "run")


def _line(error: BaseException) -> str:
    text = str(error).strip() or repr(error)
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def _lines(error: BaseException, folder: Path) -> str:
    """The error without the paths of this machine."""
    from transformers import __file__ as hf

    text = str(error).replace(str(Path(hf).parent), "transformers").replace(str(folder), "checkpoint")
    return text[:1200]


def worker(connection: Connection) -> None:
    """Answer types with outcomes until told None."""
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    connection.send("ready")
    while (kind := connection.recv()) is not None:
        with tempfile.TemporaryDirectory() as folder:
            connection.send(attempt(kind, Path(folder) / kind))


class Worker:
    """A process that tries types, started when needed."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.process: Any = None

    def ask(self, kind: str) -> dict[str, Any]:
        """The outcome of one type; a crash or a timeout is one too."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, there = context.Pipe()
            self.process = context.Process(target=worker, args=(there,), daemon=True)
            self.process.start()
            there.close()
            self.connection.recv()
        self.connection.send(kind)
        try:
            if self.connection.poll(self.timeout):
                return dict(self.connection.recv())
            outcome = {"outcome": "timeout"}
        except EOFError:
            outcome = {"outcome": "crash"}
        self.process.kill()
        self.process = None
        return outcome

    def close(self) -> None:
        """Let the process end."""
        if self.process is not None:
            self.connection.send(None)
            self.process.join()


def page(record: dict[str, Any]) -> str:
    """The record as a page of documentation."""
    types: dict[str, dict[str, Any]] = record["types"]
    counts = Counter(r["outcome"] for r in types.values())
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    text = [
        "# Which models run",
        "",
        f"Written by `{record['command']}` ({versions}); numbers in `benchmarks/results/coverage.json`.",
        f"Every one of the {len(types)} types of transformers' causal LM mapping, as a tiny random",
        "checkpoint made sensitive, on the CPU in float32: a ragged packed batch of three prompts (3, 17",
        "and 9 tokens) and eight decode steps over the paged cache, against Hugging Face running each",
        "prompt alone. Types that are decoders only when told so (BERT and its kin) are told so.",
        "",
        "| outcome | types | meaning |",
        "|---|---|---|",
        *(f"| {k} | {counts[k]} | {meaning} |" for k, meaning in OUTCOMES.items() if counts[k]),
    ]
    for outcome in OUTCOMES:
        rows = {k: r for k, r in sorted(types.items()) if r["outcome"] == outcome}
        if not rows:
            continue
        text += ["", f"## {outcome}: {len(rows)}", ""]
        if outcome == "ok":
            text += ["| type | rmse ratio | |", "|---|---|---|"]
            text += [f"| {k} | {r['rmse']:.1e} | {r.get('reason', '')} |" for k, r in rows.items()]
        else:
            text += ["| type | where | why |", "|---|---|---|"]
            text += [f"| {k} | {r.get('step', '')} | {_cell(r)} |" for k, r in rows.items()]
    return "\n".join(text) + "\n"


def _cell(result: dict[str, Any]) -> str:
    if "rmse" in result:
        return f"rmse ratio {result['rmse']:.1e}"
    lines = [s.strip() for s in result.get("reason", "").splitlines()]
    shown = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [""])[0]
    return shown.replace("|", "\\|")[:360]


def main() -> None:
    """Try the types asked for, record what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", nargs="*", help="only these types")
    parser.add_argument("--write", action="store_true", help="with --types: merge into the recorded table")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, help="seconds that one type may take (default: %(default)g)"
    )
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.zoo import all_types

    worker_, results = Worker(options.timeout), {}
    recorded = json.loads(RESULTS.read_text())["types"] if options.types and options.write else {}
    for kind in options.types or all_types():
        results[kind] = worker_.ask(kind)
        shown = results[kind].get("rmse", results[kind].get("reason", ""))
        print(kind, results[kind]["outcome"], results[kind].get("step", ""), shown, flush=True)
        if options.write:  # at once: what is known stays when the run is stopped
            write({**recorded, **results})
    worker_.close()
    print(dict(Counter(r["outcome"] for r in results.values())))
    if not options.types:
        write(results)


def write(types: dict[str, dict[str, Any]]) -> None:
    """The record and the page."""
    import torch
    import transformers

    record = {
        "command": shlex.join(["python", "scripts/coverage.py"]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "types": dict(sorted(types.items())),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(record))


if __name__ == "__main__":
    main()
