"""Throughput: many requests, all there at once, drained, beside peers and against a simulated limit.

Output tokens/s = output tokens / (last token - submission). The limit is the time that ``work.least_seconds`` gives for
the same requests at this machine's measured rates, with a cache of all memory that the weights leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from adkit.bench import peers
from adkit.bench.machine import peak_bytes
from adkit.bench.results import Result, Row, heading, line, result_of
from adkit.bench.subject import Subject
from adkit.bench.timeline import throughput_figures
from adkit.bench.work import least_seconds
from adkit.bench.workload import LENGTHS, Lengths, Room, Workload, make_workload
from adkit.config import Fragment
from adkit.contract import ConfigError

#: Most sequences in a step and most tokens in a step, unless settings say otherwise.
MAX_BATCH, MAX_TOKENS = 512, 8192
_WARM_TOKENS = 8


def measure(
    model: Any,
    *,
    requests: int,
    prompt: str | int | None = None,
    new: str | int | None = None,
    vs: Sequence[str] = (),
    seed: int = 0,
    peer_seconds: float = 120,
    config: Sequence[Fragment] = (),
    overrides: Sequence[str] = (),
    random_weights: bool = False,
    tp: int | None = None,
    attention_dp: bool = False,
    command: str = "",
    progress: bool = True,
    show: Callable[[str], None] = print,
    keep: Callable[[Result], object] = lambda result: None,
) -> Result:
    """Figures of ``model`` over ``requests`` of these lengths.

    Weights are random where it has none or ``random_weights`` asks for them. ``tp`` and ``attention_dp``: see
    ``subject``. ``prompt`` and ``new`` are numbers of tokens or ranges (``"100-1024"``), drawn uniformly from ``seed``
    (default: 128 of both, or as many as there is room for). ``keep`` is given the result after every row. Returns plain
    data, see ``results``. Raises ConfigError for sizes and peers that cannot be.
    """
    names = peers.check(vs, seconds=peer_seconds)
    if requests < 1:
        raise ConfigError(f"requests is {requests}; give at least 1")
    prompts = None if prompt is None else Lengths.parse(prompt, "prompt")
    news = None if new is None else Lengths.parse(new, "new")
    p, n = Room.of(model, config, overrides).fit(
        prompts.high if prompts else None, news.high if news else None, LENGTHS, show
    )
    prompts, news = prompts or Lengths(p, p), news or Lengths(n, n)
    defaults = {
        "max_batch_size": min(requests, MAX_BATCH),
        "max_seq_len": p + n,
        "max_num_tokens": MAX_TOKENS,
    }
    subject = Subject(
        model, defaults, config=config, overrides=overrides, random_weights=random_weights, tp=tp,
        attention_dp=attention_dp,
    )  # fmt: skip
    subject.build()
    load = make_workload(requests, prompts, news, subject.vocab, seed)
    what = f"throughput of {subject.factory.name}, {requests} requests of {prompts} in and {news} out, all at once"
    sizes = {"requests": requests, "prompt": str(prompts), "new": str(news), "seed": seed}
    sizes |= {"prompt_tokens": load.prompt_tokens, "new_tokens": load.new_tokens}
    result = result_of(subject, "throughput", what, sizes, command)

    lengths = [len(p) for p in load.prompts]
    least = least_seconds(subject.work, subject.ceilings, lengths, load.news, subject.cache_limit)
    limit = load.new_tokens / least
    result["limit_output_tokens_per_second"] = round(limit, 1)

    show(heading(result))

    def add(row: Row) -> None:
        result["rows"].append(row)
        show(line(row))
        keep(result)

    def share(row: Row) -> Row:
        return row | {"limit_share": round(float(row["output_tokens_per_second"]) / limit, 3)}

    warm = load.first(subject.settings["max_batch_size"], _WARM_TOKENS)
    subject.run(warm, progress=progress)
    run, stats = subject.run(load, progress=progress)
    row: Row = {**subject.name, "requests": requests, **throughput_figures(run, lengths)}
    row |= {
        "batch_occupancy": round(stats.batch_occupancy, 1),
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "peak_bytes": peak_bytes(subject.device),
    }
    add(share(row))
    subject.close()

    def figures(run: Callable[[Workload], Any], load: Workload) -> Row:
        run(load.first(8, _WARM_TOKENS))
        return share(throughput_figures(run(load), lengths))

    peers.measure(
        names, subject.factory, subject.device, [load], figures, limit=peer_seconds, progress=progress,
        add=add,
    )  # fmt: skip
    return result
