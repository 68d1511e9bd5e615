"""The ``atmc`` command: parse arguments, print what happens."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from atmc.cli.display import NARROW, Display, inspection_table, result_tables
from atmc.cli.evaluation_display import EvaluationDisplay, evaluation_tables
from atmc.commands import config as configs
from atmc.commands.evaluate import Assessed, Request, assess
from atmc.commands.run import Finished, Stage, run
from atmc.core.version import __version__
from atmc.evaluation.attacks import ATTACKS, Custom
from atmc.evaluation.evaluate import Options
from atmc.robust.threats import parse_threat

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make an image classifier small and hard to fool at once.",
)
UsageError: Any = typer.BadParameter.__bases__[0]  # click's, of whichever click typer brings along
_TYPER_INTERRUPTED = 130  # what it makes of Ctrl-C; older versions raise Abort
console = Console(width=None if sys.stdout.isatty() else 150)


def _version(value: bool) -> None:
    if value:
        console.print(f"atmc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make an image classifier small and hard to fool at once."""


@app.command()
def compress(
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    model: Annotated[str | None, typer.Option(help="Zoo name or package.module:factory.")] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, a hub id, a folder of parquet files, or an image folder.")
    ] = None,
    threat: Annotated[str | None, typer.Option(help="linf:8/255, l2:0.5 or l1:12, in pixel units.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Nonzeros over conv and linear weights.")] = None,
    nonzeros: Annotated[int | None, typer.Option(help="The number of nonzeros itself.")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="Size of the file: 24kB, 24KiB, 1.5MB.")] = None,
    bits: Annotated[int | None, typer.Option(help="At most 2^bits distinct values a tensor (1 to 8).")] = None,
    method: Annotated[str | None, typer.Option(help="atmc, al0, al0q, alr, ap, nap or da.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Start from these weights: .atmc, .safetensors or .pt.")
    ] = None,
    epochs: Annotated[str | None, typer.Option(help="20, or dense=20,l0=10,admm=10,tune=5.")] = None,
    objective: Annotated[str | None, typer.Option(help="natural, gaussian, mixed, pgd_at, trades or mart.")] = None,
    attack: Annotated[str | None, typer.Option(help="Attacks of the final evaluation, separated by commas.")] = None,
    eval_n: Annotated[int | None, typer.Option(help="Test images under attack (default: all).")] = None,
    checks: Annotated[bool | None, typer.Option(help="Let the final evaluation doubt itself (default: yes).")] = None,
    limit: Annotated[int | None, typer.Option(help="Train on so many images only, always the same ones.")] = None,
    val_n: Annotated[
        int | None,
        typer.Option(help="Validate on so many images only, for a trial (default: all; 1,000 attacked)."),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Where the data has several.")] = None,
    label_column: Annotated[str | None, typer.Option(help="If not label or fine_label.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; options given here override it.")] = None,
    seed: Annotated[int | None, typer.Option(help="Keys every random draw.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16, for training.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the run that is there.")] = False,
) -> None:
    """Train the most robust model that fits the budget; write its file, read it back, evaluate it."""
    values: dict[str, Any] = configs.read_toml(config) if config else {}
    if resume and not values and model is None:
        if not (out / "config.toml").exists():
            raise ValueError(f"there is no run in {out} to go on with")
        values = configs.read_toml(out / "config.toml")
    given = {
        "model": model,
        "data": data,
        "threat": threat,
        "ratio": ratio,
        "nonzeros": nonzeros,
        "max_bytes": max_bytes,
        "bits": bits,
        "method": method,
        "checkpoint": checkpoint,
        "image_column": image_column,
        "label_column": label_column,
        "eval_n": eval_n,
        "checks": checks,
        "limit": limit,
        "seed": seed,
        "device": device,
        "precision": precision,
        "threads": threads,
        "attacks": _names(attack) if attack else None,
    }
    if (ratio, nonzeros, max_bytes) != (None, None, None) or method == "da":
        values = {key: value for key, value in values.items() if key not in ("ratio", "nonzeros", "max_bytes")}
    if method == "da":
        values.pop("bits", None)
    values |= {key: value for key, value in given.items() if value is not None}
    training: dict[str, Any] = {"epochs": _parse_epochs(epochs), "objective": objective}
    training |= {"val_n": val_n, "val_clean_n": val_n}
    training = {key: value for key, value in training.items() if value is not None}
    if training:
        configured = values.get("training", {})
        if isinstance(training.get("epochs"), dict) and isinstance(configured.get("epochs"), dict):
            training["epochs"] = {**configured["epochs"], **training["epochs"]}
        values["training"] = {**configured, **training}
    settings = configs.parse(values, str(config) if config else "options")
    metrics = _followed(run(settings, out, resume=resume, overwrite=overwrite), out)
    for table in result_tables(metrics):
        console.print(table)
    _say(f"model   {out / 'model.atmc'}\nreport  {out / 'report.html'}")


def _followed(events: Iterator[Any], out: Path) -> dict[str, Any]:
    """Show a run's events; its metrics. Where it ends early, say how to go on."""
    resumable, metrics = False, {}
    config, resume = out / "config.toml", f"go on with: atmc compress --out {shlex.quote(str(out))} --resume"
    with Display(console) as display:
        try:
            for event in events:
                display.show(event)
                if isinstance(event, Stage):
                    resumable = event.resumable
                if isinstance(event, Finished):
                    metrics = event.metrics
        except KeyboardInterrupt:
            display.close()
            begun = resumable and config.exists()
            _say(f"interrupted; {resume if begun else 'nothing had begun: give the same command again'}")
            raise typer.Exit(1) from None
        except OSError:
            display.close()
            if resumable and config.exists():
                _say(f"stopped; once the error is mended, {resume}")
            raise
    return metrics


def _say(text: str) -> None:
    """A line for a person, as it is: names may hold what rich would take for markup."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _names(text: str) -> list[str]:
    """'pgd, fgsm' -> two names."""
    return [name.strip() for name in text.split(",")]


def _parse_epochs(text: str | None) -> int | dict[str, int] | None:
    """'20' or 'dense=20,l0=10'."""
    if text is None:
        return None
    try:
        if "=" not in text:
            return int(text)
        pairs = [part.partition("=") for part in text.split(",")]
        return {name.strip(): int(count) for name, _, count in pairs}
    except ValueError:
        raise ValueError(f"expected --epochs 20 or --epochs dense=20,l0=10,admm=10,tune=5, got {text!r}") from None


@app.command()
def evaluate(
    file: Annotated[Path, typer.Argument(help="Model file; or .pt or .safetensors weights, with --model.")],
    data: Annotated[str, typer.Option(help="As in compress; its test split is used.")],
    threat: Annotated[str, typer.Option(help="linf:8/255, l2:0.5 or l1:12, in pixel units.")],
    attack: Annotated[str, typer.Option(help=f"Separated by commas: {', '.join(ATTACKS)}.")] = "pgd",
    n: Annotated[int | None, typer.Option(help="Images under attack, the first ones (default: all).")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of pgd.")] = None,
    step_size: Annotated[float | None, typer.Option(help="Step size of pgd, in pixel units.")] = None,
    restarts: Annotated[int, typer.Option(help="Starts of pgd; from the second on at random points.")] = 1,
    loss: Annotated[str, typer.Option(help="Loss of pgd: ce, dlr or margin.")] = "ce",
    checks: Annotated[bool, typer.Option(help="Let the evaluation doubt itself, on 100 images.")] = True,
    transfer_from: Annotated[
        Path | None, typer.Option(help="A model whose adversarial images are tried too, say the dense one.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with this model on the same images.")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print each class's accuracies too.")] = False,
    curves: Annotated[
        int | None, typer.Option(help="Accuracy against eps and against steps, on so many images.")
    ] = None,
    gallery: Annotated[Path | None, typer.Option(help="Draw adversarial examples into this PNG.")] = None,
    save_examples: Annotated[Path | None, typer.Option(help="Save the adversarial images (.npz).")] = None,
    replay: Annotated[Path | None, typer.Option(help="Show saved adversarial images to this model.")] = None,
    certify: Annotated[
        float | None, typer.Option(help="Certified l2 accuracy by smoothing with noise of this sigma.")
    ] = None,
    certify_samples: Annotated[int, typer.Option(help="Noisy copies of each image for --certify.")] = 10_000,
    seconds: Annotated[float | None, typer.Option("--time", help="Stop attacking after so many seconds.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images attacked at once.")] = 500,
    model: Annotated[
        str | None, typer.Option(help="Zoo name of a checkpoint; package.module:factory for your own class.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Where the data has several.")] = None,
    label_column: Annotated[str | None, typer.Option(help="If not label or fine_label.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Keys random starts.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted evaluation (with --json).")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
) -> None:
    """Measure a model's accuracy, clean and under attack, on a test split, and doubt the result."""
    custom = Custom(steps, step_size, restarts, loss)
    options = Options(tuple(_names(attack)), n, custom, seed, checks, batch_size, seconds)
    request = Request(
        file=file,
        data=data,
        threat=parse_threat(threat),
        options=options,
        model=model,
        image_column=image_column,
        label_column=label_column,
        device=device,
        transfer_from=transfer_from,
        against=against,
        replay=replay,
        save_examples=save_examples,
        gallery=gallery,
        curves=curves,
        certify=certify,
        certify_samples=certify_samples,
        json_path=json_path,
        resume=resume,
        overwrite=overwrite,
    )
    with EvaluationDisplay(console) as display:
        try:
            for event in assess(request):
                display.show(event)
                if isinstance(event, Assessed):
                    figures = event.figures
        except KeyboardInterrupt:
            display.close()
            again = "the same command with --resume" if json_path else "nothing: only --json FILE keeps a state"
            _say(f"to go on: {again}")
            raise
    for table in evaluation_tables(figures, per_class=per_class):
        console.print(table)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Model file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in a model file, tensor by tensor, byte by byte."""
    from atmc.pack.inspect import inspection

    found = inspection(file)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        console.print(inspection_table(found, narrow=console.width < NARROW))


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="Model file.")],
    to: Annotated[str, typer.Option(help="onnx, safetensors or c.")],
    out: Annotated[Path, typer.Option(help="File to write; for c a folder.")],
    model: Annotated[str | None, typer.Option(help="package.module:factory for your own class.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Compare on this data's test images, as in compress (default: random images).")
    ] = None,
    threat: Annotated[
        str | None, typer.Option(help="Compare on PGD examples under it (default: what the file was trained for).")
    ] = None,
    n: Annotated[int, typer.Option(help="Images to compare on, the first ones.")] = 256,
    image_column: Annotated[str | None, typer.Option(help="Where the data has several.")] = None,
    label_column: Annotated[str | None, typer.Option(help="If not label or fine_label.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
) -> None:
    """Write a model for other programs: ONNX, safetensors, or C source."""
    from atmc.commands import export as exports

    request = exports.Request(
        file=file,
        to=to,
        out=out,
        model=model,
        data=data,
        threat=parse_threat(threat) if threat else None,
        n=n,
        image_column=image_column,
        label_column=label_column,
        overwrite=overwrite,
    )
    done = exports.export(request)
    for path, size in done.files.items():
        _say(f"{path}  {size:,} bytes")
    for line in [*done.notes, *done.agreements]:
        _say(f"  {line}")


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(help="Model file.")],
    data: Annotated[
        str | None, typer.Option(help="Calibrate int8 on its training images, and show accuracies; as in compress.")
    ] = None,
    threads: Annotated[str | None, typer.Option(help="Separated by commas (default: 1, and all).")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    reps: Annotated[int, typer.Option(help="Rounds of measuring, in which the engines take turns.")] = 11,
    n: Annotated[int, typer.Option(help="Test images for the accuracies, the first ones.")] = 1000,
    unsimplified: Annotated[
        bool, typer.Option("--unsimplified", help="Dense engines on the network as it is, too.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="package.module:factory for your own class.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Where the data has several.")] = None,
    label_column: Annotated[str | None, typer.Option(help="If not label or fine_label.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
) -> None:
    """Latency, memory and accuracy on the CPU, against the dense engines that are installed."""
    from atmc.cli.bench_display import bench_tables
    from atmc.commands.bench import bench as benches

    request = benches.Request(
        file=file,
        data=data,
        threads=benches.numbers(threads, "threads") if threads else (),
        batches=benches.numbers(batch, "batch"),
        reps=reps,
        n=n,
        model=model,
        image_column=image_column,
        label_column=label_column,
        json_path=json_path,
        overwrite=overwrite,
        unsimplified=unsimplified,
    )
    with console.status("") as status:
        for event in benches.bench(request):
            if isinstance(event, benches.Benched):
                figures = event.figures
            else:
                status.update(event.text)
    for table in bench_tables(figures, narrow=console.width < NARROW):
        console.print(table)


def main() -> None:
    """Run the command. Exit status: 0 done, 2 the user's input was wrong, 1 anything else."""
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
        if status == _TYPER_INTERRUPTED:
            raise typer.Abort
        sys.exit(status)
    except UsageError as error:
        print(f"atmc: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        print("atmc: interrupted", file=sys.stderr)
        sys.exit(1)
    except ValueError as error:
        print(f"atmc: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"atmc: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) else 1)
    except RuntimeError as error:
        print(f"atmc: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
