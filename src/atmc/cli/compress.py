"""`atmc compress`: one run, from options and a configuration file to a run folder."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from atmc.cli.accuracy_tables import accuracy_table, verdict_tables, warning_boxes
from atmc.cli.options import THREAT_HELP, ImageColumn, LabelColumn, split_names
from atmc.cli.terminal import console, say


def compress(
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="Model of the zoo ({models}), or package.module:factory for your own class.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Data set: digits, a Hugging Face hub id, a folder of parquet files, or an image folder."),
    ] = None,
    threat: Annotated[str | None, typer.Option(help=THREAT_HELP)] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Budget: nonzeros as a fraction of the conv and linear weights.")
    ] = None,
    nonzeros: Annotated[int | None, typer.Option(help="Budget: number of nonzeros.")] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Budget: largest size of the file, such as 24kB, 24KiB or 1.5MB.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Bits per nonzero, 1 to 8: at most 2^bits distinct values per tensor.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Compression method: {methods} (default: atmc).")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Start from the weights in this .atmc, .safetensors or .pt file.")
    ] = None,
    epochs: Annotated[
        str | None, typer.Option(help="Epochs: 20 for every phase, or dense=20,l0=10 for some (default: {epochs}).")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="Training loss; its options may be left out: {objectives} (default: by threat and model)."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(help="Let the model normalize its images by the data set's mean and deviation (default: yes)."),
    ] = None,
    attack: Annotated[
        str | None, typer.Option(help="Attacks of the final evaluation, separated by commas: {attacks}.")
    ] = None,
    eval_n: Annotated[int | None, typer.Option(help="Number of test images to attack (default: all).")] = None,
    checks: Annotated[
        bool | None, typer.Option(help="Check the final evaluation for signs of weak attacks (default: yes).")
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(help="Verify test images by intervals at the end (default: if the objective trains for it)."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of images to train on, always the same ones (default: all).")
    ] = None,
    val_n: Annotated[
        int | None, typer.Option(help="Number of images to validate on (default: all, 1,000 of them attacked).")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    config: Annotated[
        Path | None, typer.Option(help="Configuration file (TOML); options given here override its values.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random draw (default: 0).")] = None,
    device: Annotated[str | None, typer.Option(help="Device: auto, cpu or cuda (default: auto).")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision of training: auto, fp32 or bf16 (default: auto).")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Number of CPU threads (default: torch's choice).")] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite/--no-overwrite", help="Replace the run that the folder holds.")
    ] = False,
) -> None:
    """Train the most robust model that fits the budget; write its file, read it back, evaluate it."""
    from atmc.commands.config import configure
    from atmc.commands.run import run

    options = {
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
        "verify": verify,
        "limit": limit,
        "normalize": normalize,
        "seed": seed,
        "device": device,
        "precision": precision,
        "threads": threads,
        "attacks": split_names(attack) if attack else None,
        "epochs": parse_epochs(epochs) if epochs else None,
        "objective": objective,
        "val_n": val_n,
    }
    settings = configure(options, file=config, folder=out, resume=resume)
    metrics = show_run(run(settings, out, resume=resume, overwrite=overwrite), out)
    for table in result_tables(metrics):
        console.print(table)
    say(f"model   {out / 'model.atmc'}\nreport  {out / 'report.html'}")


def show_run(events: Iterable[Any], out: Path) -> dict[str, Any]:
    """Show a run's events and return its metrics; if the run ends early, say how to continue it."""
    from atmc.cli.live import LiveLine
    from atmc.commands.run import Finished, Message

    resumable, metrics = False, {}
    config, resume = out / "config.toml", f"continue with: atmc compress --out {shlex.quote(str(out))} --resume"
    with LiveLine(console) as line:
        try:
            for event in events:
                line.show(event)
                if isinstance(event, Message):
                    resumable = event.resumable
                if isinstance(event, Finished):
                    metrics = event.metrics
        except KeyboardInterrupt:
            line.close()
            started = resumable and config.exists()
            say(f"interrupted; {resume if started else 'nothing was started: give the same command again'}")
            raise typer.Exit(1) from None
        except OSError:
            line.close()
            if resumable and config.exists():
                say(f"stopped; when the cause of the error is removed, {resume}")
            raise
    return metrics


def parse_epochs(text: str) -> int | dict[str, int]:
    """Read --epochs: a number, or a number per phase.

    >>> parse_epochs("dense=20,l0=10")
    {'dense': 20, 'l0': 10}

    Raises:
        ValueError: the text is neither.
    """
    try:
        if "=" not in text:
            return int(text)
        pairs = [part.partition("=") for part in text.split(",")]
        return {name.strip(): int(count) for name, _, count in pairs}
    except ValueError:
        raise ValueError(f"expected --epochs 20 or --epochs dense=20,l0=10,admm=10,tune=5, got {text!r}") from None


def result_tables(metrics: Mapping[str, Any]) -> list[RenderableType]:
    """Return the table of a finished run's accuracies and sizes, that of its checks, and a warning if one failed."""
    title = f"{metrics['model']} on {metrics['data']}, {metrics['threat']}"
    table = accuracy_table(metrics, title, "test split, decoded file")
    size, dense = metrics["file_bytes"], metrics["dense_file_bytes"]
    table.add_section()
    most = f" of at most {metrics['max_bytes']:,}" if metrics.get("max_bytes") else ""
    table.add_row("file", f"{size:,} bytes{most}")
    table.add_row("dense float32", f"{dense:,} bytes ({dense / size:.1f} times the file)")
    table.add_row("nonzeros", f"{metrics['nonzeros']:,} of {metrics['dense_weights']:,} weights")
    table.add_row("nominal ratio", f"{metrics['nominal_ratio']:.5f}")
    return [table, *verdict_tables(metrics), *warning_boxes(metrics)]
