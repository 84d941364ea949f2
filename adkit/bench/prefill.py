"""Prefill: one long prompt to its first token, as FLOP/s of the model's own work.

FLOPs are ``work.prefill_flops``: linears for every token, lm_head for the one row that is sampled from, the causal half
of attention. Seconds are from submission to the token's arrival on the host, for every engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from adkit.bench import machine, peers
from adkit.bench.results import Result, Row, heading, line, result_of
from adkit.bench.subject import Subject
from adkit.bench.workload import Lengths, Room, make_workload
from adkit.config import Fragment
from adkit.contract import ConfigError

REPEATS = 5
#: Tokens in the prompt, where the model has room for them.
PROMPT = 8192
PEERS = ("hf",)


def measure(
    model: Any,
    *,
    prompt: int | None = None,
    vs: Sequence[str] = (),
    seed: int = 0,
    config: Sequence[Fragment] = (),
    overrides: Sequence[str] = (),
    random_weights: bool = False,
    tp: int | None = None,
    command: str = "",
    progress: bool = True,
    show: Callable[[str], None] = print,
    keep: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Figures of ``model`` on one prompt, the median of five runs.

    Weights are random where it has none or ``random_weights`` asks for them. ``tp``: on so many ranks, see ``subject``.
    ``prompt``: tokens (default: 8,192, or as many as there is room for), which go in as one step unless settings say
    otherwise. The peer ``hf`` is the Hugging Face model's forward with a cache, logits of the last token alone.
    ``keep`` is given the result after every row. Returns plain data, see ``results``. Raises ConfigError for a prompt
    and peers that cannot be.
    """
    names = peers.check(vs, PEERS)
    if prompt is not None and prompt < 1:
        raise ConfigError(f"prompt is {prompt}; give at least 1 token")
    prompt, _ = Room.of(model, config, overrides).fit(prompt, 1, (PROMPT, 1), show)
    defaults = {"max_batch_size": 1, "max_seq_len": prompt + 1, "max_num_tokens": prompt}
    subject = Subject(
        model, defaults, config=config, overrides=overrides, random_weights=random_weights, tp=tp
    )
    subject.build()
    load = make_workload(1, Lengths(prompt, prompt), Lengths(1, 1), subject.vocab, seed)
    flops = subject.work.prefill_flops(prompt)
    what = f"prefill of {subject.factory.name}, one prompt of {prompt} tokens"
    sizes = {"prompt": prompt, "seed": seed, "repeats": REPEATS, "model_flops": flops}
    result = result_of(subject, "prefill", what, sizes, command)

    def figures(run: Callable[[], float]) -> Row:
        for _ in range(2):
            run()
        seconds = statistics.median(run() for _ in range(REPEATS))
        return {
            "seconds": round(seconds, 6),
            "flops_per_second": round(flops / seconds),
            "tokens_per_second": round(prompt / seconds, 1),
            "matmul_share": round(flops / seconds / subject.ceilings.matmul, 3),
            "peak_bytes": machine.peak_bytes(subject.device),
        }

    show(heading(result))

    def add(row: Row) -> None:
        result["rows"].append(row)
        show(line(row))
        keep(result)

    head: Row = {"engine": "adkit", "requests": 1}
    add(head | figures(lambda: subject.run(load, progress=progress)[0].first_token[0]))
    subject.close()
    for name in names:
        head = {"engine": name, "requests": 1}
        try:
            peer = peers.load_model(subject.factory, subject.device)
            machine.reset_peak(subject.device)
            add(head | figures(lambda peer=peer: _hf(peer, load.prompts[0], subject.device)))  # type: ignore[misc]
        except Exception as error:  # whatever another library makes of the model
            add(head | {"error": peers.told(error)})
    return result


@torch.no_grad()
def _hf(model: Any, prompt: list[int], device: torch.device) -> float:
    machine.sync(device)
    start = time.perf_counter()
    ids = torch.tensor([prompt], device=device)
    model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - start
