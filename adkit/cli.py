"""The ``adkit`` command."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from adkit.bench.commands import app as bench
from adkit.contract import AdkitError, Completion, ConfigError
from adkit.graph.step import Step

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Turn a Hugging Face model into an inference engine, one inspectable step at a time.",
    pretty_exceptions_enable=False,
)

app.add_typer(bench, name="bench")

_INTERRUPTED = 130  # the status that a shell knows Ctrl-C by
Set = Annotated[list[str], typer.Option("--set", help="Override, as transforms.fuse_gemms.enabled=false")]
Config = Annotated[
    list[Path], typer.Option("--config", help="YAML fragment merged over the defaults; repeatable")
]


@app.command()
def run(
    model: Annotated[
        str, typer.Argument(help="demo, a bundled config, a local directory, or a Hugging Face id")
    ],
    until: Annotated[str | None, typer.Option(help="Stop after this stage or transform")] = None,
    overrides: Set = [],  # noqa: B006
    config: Config = [],  # noqa: B006
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Text to go on from; repeatable")] = [],  # noqa: B006
    max_tokens: Annotated[int, typer.Option(help="Most new tokens for each prompt")] = 128,
    report: Annotated[Path | None, typer.Option(help="Write the walk as one HTML file")] = None,
    save: Annotated[Path | None, typer.Option(help="Save the run as JSON, to load again")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the record, .json or .json.gz")] = None,
    random_weights: Annotated[
        bool, typer.Option(help="Seeded random weights, although there may be a checkpoint")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Let the model's repository run its own code")
    ] = False,
    tp: Annotated[
        int | None,
        typer.Option(help="Ranks to cut the model over, a process each; torchrun's, where it started this"),
    ] = None,
    attention_dp: Annotated[
        bool,
        typer.Option(
            "--attention-dp", help="Each rank attends to sequences of its own, with a cache of its own"
        ),
    ] = False,
) -> None:
    """Walk a model through the pipeline, a line a stage; then generate and report if asked to."""
    from adkit import SamplingParams, Workbench
    from adkit.ranks import place

    start = time.perf_counter()
    # What would only fail once everything has run is said before.
    params = SamplingParams(max_tokens=max_tokens)
    if prompt and until is not None:
        raise ConfigError("--prompt needs the whole pipeline: leave out --until")
    if not all(prompt):
        raise ConfigError("--prompt is empty; give at least one character")
    _check_files(report=report, save=save, record=record)
    what: dict[str, Any] = {
        "model": model, "config": list(config), "overrides": overrides, "random_weights": random_weights,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    with place(tp, what, attention_dp) as here:
        if here.follows:
            return
        if until is not None and here.dist.world_size > 1:
            raise ConfigError(
                "ranks need the whole pipeline: leave out --until (wb.shard(tp=...) shows one step by step)"
            )
        wb = Workbench(**{**what, **here.settings})
        failed = _walk(wb, until, prompt, params, report, save, record)
    print(f"\n{time.perf_counter() - start:.1f} s", flush=True)
    if failed:
        raise AdkitError(f"{len(failed)} of {len(prompt)} prompts failed: {failed[0]}")


def _walk(
    wb: Any,
    until: str | None,
    prompt: list[str],
    params: Any,
    report: Path | None,
    save: Path | None,
    record: Path | None,
) -> list[str]:
    """Print what happens and write the files; returns why prompts failed."""
    print(
        f"{wb.name}: {type(wb.factory.config).__name__}, {wb.factory.dtype}, on {wb.device}, weights: "
        f"{wb.factory.weights}"
    )
    if prompt and wb.factory.weights == "none":
        raise ConfigError(
            f"--prompt needs weights, and {wb.name!r} has none: {wb.factory.why_no_weights} (here: --random-weights)"
        )
    if prompt:
        with warnings.catch_warnings(action="ignore"):  # the reason is in the error
            tokenizer = wb.factory.tokenizer()
        if tokenizer is None:
            raise ConfigError(
                f"--prompt needs a tokenizer, and {wb.factory.why_no_tokenizer}: put the model's tokenizer files "
                "there, or leave out --prompt"
            )
    stages = _StageLines()
    wb.run(until, on_step=stages.add)
    stages.flush()
    completions: Iterable[Completion] = []
    if prompt:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\d+ of \d+ requests failed")  # said at the end, as an error
            completions = wb.llm().generate(prompt, params, progress=False)
        for text, completion in zip(prompt, completions, strict=True):
            print(f"\n> {text}\n{completion.text.strip()}")
    if report is not None:
        print(f"\nreport: {wb.report(report, list(zip(prompt, completions, strict=True)))}")
    if save is not None:
        print(f"saved: {wb.save(save)}")
    if record is not None:
        print(f"record: {wb.record(record)}")
    return [c.error or "no reason given" for c in completions if c.finish_reason == "error"]


def _check_files(**files: Path | None) -> None:
    """ConfigError for files that could not be written, said before there is anything to write."""
    for option, path in files.items():
        if path is None:
            continue
        if path.is_dir():
            raise ConfigError(f"--{option} {str(path)!r} is a folder; give a file name in it")
        if option == "record" and not path.name.endswith((".json", ".json.gz")):
            raise ConfigError(f"--record {str(path)!r}: the name must end in .json or .json.gz")
        if option == "save" and not path.resolve().parent.is_dir():
            raise ConfigError(f"cannot write --save {str(path)!r}: its folder does not exist")


class _StageLines:
    """Prints a line when a stage has ended."""

    def __init__(self) -> None:
        self.ran: list[Step] = []
        self.begin = time.perf_counter()

    def add(self, step: Step) -> None:
        """Take the next step that ran."""
        if self.ran and self.ran[-1].stage != step.stage:
            self.flush(but=step)
        self.ran.append(step)

    def flush(self, but: Step | None = None) -> None:
        """Print the stage; the time since its first step began, less what ``but``, already run, took."""
        if self.ran:
            late = 0.0 if but is None else but.seconds + but.record_seconds
            now = time.perf_counter()
            print(_stage_line(self.ran[0].stage, self.ran, now - self.begin - late), flush=True)
            self.begin = now - late
        self.ran = []


def _stage_line(stage: str, ran: list[Step], seconds: float) -> str:
    changed = [s for s in ran if s.changed]
    nodes = len(ran[-1].after)
    what = (
        ", ".join(f"{s.name} x{s.info.num_matches}" for s in changed if s.info.num_matches)
        or "nothing to change"
    )
    skipped = [
        f"{s.name} skipped: {s.info.reason}"
        for s in ran
        if s.status in ("skipped", "failed") and s.info.reason
    ]
    if stage in ("factory", "export", "weight_load", "compile"):
        what = ", ".join(s.name for s in ran if s.status == "done") or "-"
    line = f"[{stage:<16}] {seconds:6.2f} s  {nodes:>5} nodes  {what}"
    return "\n".join([line, *(f"{'':29}{s}" for s in skipped)])


@app.command()
def passes(key: Annotated[str | None, typer.Argument(help="A transform to explain")] = None) -> None:
    """List the transforms, or explain one with its configuration fields."""
    import inspect

    from adkit.passes import all_passes, get_pass

    if key is None:
        for cls in sorted(all_passes().values(), key=lambda c: (c.stage.position, c.key)):
            summary = inspect.cleandoc(cls.__doc__ or "").splitlines()[0]
            print(f"{cls.stage.value:<17} {cls.key:<34} {summary}")
        return
    cls = get_pass(key)
    print(f"{cls.key}  (stage {cls.stage.value})\n\n{inspect.cleandoc(cls.__doc__ or '')}\n\nFields:")
    for name, field in cls.Config.model_fields.items():
        default = cls.stage.value if name == "stage" else field.get_default(call_default_factory=True)
        kind = getattr(field.annotation, "__name__", str(field.annotation)).replace("typing.", "")
        print(f"  {name:<22} {kind} = {default!r}\n{'':25}{field.description}")


@app.command("config")
def show_config(
    model: Annotated[str, typer.Argument(help="A model, as for run")],
    overrides: Set = [],  # noqa: B006
    config: Config = [],  # noqa: B006
) -> None:
    """Print the configuration that a run of the model would use, as YAML."""
    from adkit.config import load_config
    from adkit.models import resolve

    settings = load_config(list(config), overrides)
    resolve(model, dtype=settings.dtype, device=settings.usable_device())
    print(settings.to_yaml(), end="")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A record (wb.record), .json or .json.gz")],
    b: Annotated[Path, typer.Argument(help="Another")],
) -> None:
    """Compare two records: passes, matches, operations, the program at the end. Exits 1 when they differ."""
    from adkit.viz import compare

    names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
    found = compare(_record(a), _record(b), names)
    print(found)
    if found:
        sys.exit(1)


@app.command()
def view(
    record: Annotated[Path, typer.Argument(help="A record (wb.record), .json or .json.gz")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write: .html, .dot, or .json for Model Explorer")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page")] = True,
) -> None:
    """Write a record as one standalone page and open it, or export its graphs for other programs."""
    import webbrowser

    from adkit.viz import RecordError, export, write_page

    data = _record(record)
    stem = record.name.removesuffix(".gz").removesuffix(".json")
    target = out if out is not None else record.with_name(f"{stem}.html")
    if target.exists() and target.samefile(record):
        raise ConfigError(
            f"--out {str(out)!r} is the record itself, which an export would replace; name another file"
        )
    try:
        made = write_page(data, target) if target.suffix == ".html" else export(data, target)
    except (RecordError, OSError) as error:
        raise AdkitError(str(error)) from None
    print(made)
    if browser and made.suffix == ".html":
        webbrowser.open(made.resolve().as_uri())


def _record(path: Path) -> Any:
    from adkit.viz import RecordError, load_record

    try:
        return load_record(path)
    except RecordError as error:
        raise AdkitError(str(error)) from None


def main() -> None:
    """Entry point: adkit's own errors are one line, not a traceback."""
    status = 1
    try:
        app()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if status == _INTERRUPTED:  # which typer takes without a word
            print("adkit: interrupted", file=sys.stderr)
        raise
    except AdkitError as error:
        print(f"adkit: {error}", file=sys.stderr)
        sys.exit(status)
    except KeyboardInterrupt:
        status = _INTERRUPTED
        print("adkit: interrupted", file=sys.stderr)
        sys.exit(status)
    finally:
        if "adkit.runtime.ranks" in sys.modules:
            sys.modules["adkit.runtime.ranks"].leave(status)
