"""``adkit bench latency|throughput|prefill|accuracy MODEL``: measure, print, write JSON and a picture."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from adkit.contract import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    help="Measure generation beside Hugging Face and against what the machine can do.",
    pretty_exceptions_enable=False,
)

_ROOM = "(default: {}, or what the model has room for)"
Model = Annotated[str, typer.Argument(help="demo, a bundled config, a local directory, or a Hugging Face id")]
Vs = Annotated[str, typer.Option(help="Peers in the same process, as hf,hf-static-compile,hf-continuous")]
Seed = Annotated[int, typer.Option(help="Draws prompts and lengths")]
Overrides = Annotated[
    list[str],
    typer.Option("--set", help="Override, as max_batch_size=64 or transforms.fuse_gemms.enabled=false"),
]
Config = Annotated[list[Path], typer.Option("--config", help="YAML fragment; repeatable")]
Random = Annotated[bool, typer.Option(help="Seeded random weights, although there may be a checkpoint")]
Ranks = Annotated[
    int | None,
    typer.Option(help="Ranks to cut the model over, a process each; torchrun's, where it started this"),
]
OwnSequences = Annotated[
    bool,
    typer.Option("--attention-dp", help="Each rank attends to sequences of its own, with a cache of its own"),
]
Out = Annotated[Path | None, typer.Option(help="Write the figures as JSON")]
Plot = Annotated[Path | None, typer.Option(help="Draw the figures: a .svg, .png or .pdf file")]
PeerSeconds = Annotated[float, typer.Option(help="Stop a peer's run after this long")]


@app.command()
def latency(
    model: Model,
    batch: Annotated[list[int], typer.Option(help="Batch size; repeatable")] = [1],  # noqa: B006
    prompt: Annotated[int | None, typer.Option(help=f"Tokens in each prompt {_ROOM.format(128)}")] = None,
    new: Annotated[int | None, typer.Option(help=f"New tokens a request {_ROOM.format(128)}")] = None,
    vs: Vs = "",
    seed: Seed = 0,
    peer_seconds: PeerSeconds = 120,
    overrides: Overrides = [],  # noqa: B006
    config: Config = [],  # noqa: B006
    random_weights: Random = False,
    tp: Ranks = None,
    attention_dp: OwnSequences = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Decoding at fixed batch sizes: tokens a second, delays, share of the memory's bandwidth."""
    from adkit.bench.latency import measure

    _check_files(out, plot)
    _finish(
        measure(
            model, batches=batch, prompt=prompt, new=new, vs=_names(vs), seed=seed, peer_seconds=peer_seconds,
            overrides=overrides, config=config, random_weights=random_weights,
            tp=tp, attention_dp=attention_dp, command=_command(model), keep=_keep(out),
        ),
        out, plot,
    )  # fmt: skip


@app.command()
def throughput(
    model: Model,
    requests: Annotated[int, typer.Option(help="Requests, all there at once")] = 256,
    prompt: Annotated[
        str | None,
        typer.Option(help=f"Tokens in each prompt, as 128 or 100-1024 (uniform) {_ROOM.format(128)}"),
    ] = None,
    new: Annotated[
        str | None,
        typer.Option(help=f"New tokens a request, as 128 or 100-1024 (uniform) {_ROOM.format(128)}"),
    ] = None,
    vs: Vs = "",
    seed: Seed = 0,
    peer_seconds: PeerSeconds = 120,
    overrides: Overrides = [],  # noqa: B006
    config: Config = [],  # noqa: B006
    random_weights: Random = False,
    tp: Ranks = None,
    attention_dp: OwnSequences = False,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Many requests drained: output tokens a second, delays, occupancy, share of a simulated limit."""
    from adkit.bench.throughput import measure

    _check_files(out, plot)
    _finish(
        measure(
            model, requests=requests, prompt=prompt, new=new, vs=_names(vs), seed=seed,
            peer_seconds=peer_seconds, overrides=overrides, config=config, random_weights=random_weights,
            tp=tp, attention_dp=attention_dp, command=_command(model), keep=_keep(out),
        ),
        out, plot,
    )  # fmt: skip


@app.command()
def prefill(
    model: Model,
    prompt: Annotated[int | None, typer.Option(help=f"Tokens in the prompt {_ROOM.format(8192)}")] = None,
    vs: Vs = "",
    seed: Seed = 0,
    overrides: Overrides = [],  # noqa: B006
    config: Config = [],  # noqa: B006
    random_weights: Random = False,
    tp: Ranks = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """One long prompt to its first token: FLOP/s of the model's own work, share of the matmul rate."""
    from adkit.bench.prefill import measure

    _check_files(out, plot)
    _finish(
        measure(
            model, prompt=prompt, vs=_names(vs), seed=seed, overrides=overrides, config=config,
            random_weights=random_weights,
            tp=tp, command=_command(model), keep=_keep(out),
        ),
        out, plot,
    )  # fmt: skip


@app.command()
def accuracy(
    model: Model,
    layers: Annotated[int | None, typer.Option(help="Keep only so many layers, with random weights")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to compare")] = 4,
    prompt: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of each that go in at once {_ROOM.format(192)}; the demo has texts of its own"
        ),
    ] = None,
    new: Annotated[
        int | None, typer.Option(help=f"Tokens of each that go in one by one {_ROOM.format(64)}")
    ] = None,
    dtype: Annotated[str, typer.Option(help="The engine's dtype")] = "bfloat16",
    tasks: Annotated[int | None, typer.Option(help="Most tasks of a kind for the demo model")] = None,
    seed: Seed = 0,
    overrides: Overrides = [],  # noqa: B006
    config: Config = [],  # noqa: B006
    random_weights: Random = False,
    out: Out = None,
) -> None:
    """The engine's logits against a float32 reference; the demo model's answers too. Status 1 out of bounds."""
    from adkit.bench.accuracy import measure

    _check_files(out, None)
    row = measure(
        model, layers=layers, sequences=sequences, prompt=prompt, new=new, dtype=dtype, tasks=tasks, seed=seed,
        overrides=overrides, config=config, random_weights=random_weights, command=_command(model),
    )  # fmt: skip
    _finish(row, out, None)
    raise typer.Exit(0 if row["ok"] else 1)


def _names(text: str) -> list[str]:
    return [n for n in (part.strip() for part in text.split(",")) if n]


def _command(model: str) -> str:
    """The command line as it can be repeated elsewhere: of paths only their last part, no output files."""
    given = [Path(model).name if a == model else a for a in sys.argv[1:]]
    kept, skip = [], False
    for a in given:
        if not skip and a not in ("--out", "--plot"):
            kept.append(a if a.startswith("-") or not Path(a).is_absolute() else Path(a).name)
        skip = a in ("--out", "--plot")
    return " ".join(["adkit", *kept])


def _check_files(out: Path | None, plot: Path | None) -> None:
    """What cannot be written is said before minutes are spent on measuring it."""
    from adkit.bench import picture

    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"cannot write {str(out)!r}: its folder does not exist")
    if out is not None and out.is_dir():
        raise ConfigError(f"cannot write {str(out)!r}: it is a folder; give a file name in it")
    if plot is not None:
        picture.check_path(plot)


def _keep(out: Path | None) -> Callable[[dict[str, Any]], object]:
    """Writes what there is so far, in case something later takes too long."""
    from adkit.bench import results

    return lambda result: out is not None and results.write(result, out)


def _finish(result: dict[str, Any], out: Path | None, plot: Path | None) -> None:
    from adkit.bench import picture, results

    if out is not None:
        results.write(result, out)
    if plot is not None:
        picture.save([result], plot)
