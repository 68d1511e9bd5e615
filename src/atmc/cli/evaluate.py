"""`atmc evaluate`: accuracies of models, clean and under attack, and checks of the attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from atmc.cli.accuracy_tables import (
    accuracy_table,
    failed_checks,
    format_accuracy,
    new_table,
    verdict_tables,
    warning_boxes,
)
from atmc.cli.options import ImageColumn, LabelColumn, OverwriteFiles, Threat, split_names
from atmc.cli.terminal import console, say


def evaluate(
    files: Annotated[list[Path], typer.Argument(help="Model files; or checkpoints (.pt, .safetensors), with --model.")],
    data: Annotated[str, typer.Option(help="Data set whose test split is used, see compress.")],
    threat: Threat,
    attack: Annotated[str, typer.Option(help="Attacks, separated by commas: {attacks}.")] = "pgd",
    after: Annotated[
        str | None,
        typer.Option(
            help="Run this attack first; the others attack only the images that are still right, and the rest count "
            "as wrong."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option(help="Number of images to attack, the first ones (default: all).")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of pgd.")] = None,
    step_size: Annotated[float | None, typer.Option(help="Step size of pgd, in pixel units.")] = None,
    restarts: Annotated[int, typer.Option(help="Starts of pgd; all but the first are at random points.")] = 1,
    loss: Annotated[str, typer.Option(help="Loss that pgd maximizes: {losses}.")] = "ce",
    checks: Annotated[bool, typer.Option(help="Check 100 images for signs that the attacks are too weak.")] = True,
    transfer_from: Annotated[
        Path | None,
        typer.Option(help="A model, such as the uncompressed one, whose adversarial images are tried as a check."),
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with this model on the same images.")] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print the accuracies of each class too.")] = False,
    curves: Annotated[
        int | None,
        typer.Option(help="Measure accuracy against eps and against the number of steps, on this number of images."),
    ] = None,
    gallery: Annotated[Path | None, typer.Option(help="Draw adversarial examples into this PNG file.")] = None,
    save_examples: Annotated[Path | None, typer.Option(help="Save the adversarial images to this .npz file.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Classify the adversarial images of this file, see --save-examples.")
    ] = None,
    certify: Annotated[
        float | None,
        typer.Option(help="Certify l2 accuracy by randomized smoothing, with noise of this standard deviation."),
    ] = None,
    certify_samples: Annotated[int, typer.Option(help="Noisy copies of each image for --certify.")] = 10_000,
    seconds: Annotated[
        float | None, typer.Option("--time", help="Stop attacking after this number of seconds.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of images attacked at once.")] = 500,
    model: Annotated[
        str | None,
        typer.Option(help="Model of a checkpoint ({models}), or package.module:factory for your own class."),
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Annotated[str, typer.Option(help="Device: cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of random starts.")] = 0,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the figures to this JSON file; for several models, into this folder."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Continue an interrupted evaluation (with --json); skip finished files."
        ),
    ] = False,
    overwrite: OverwriteFiles = False,
) -> None:
    """Measure the accuracy of models, clean and under attack, on a test split, and check the attacks."""
    from atmc.cli.live import LiveLine
    from atmc.commands import evaluate as evaluation
    from atmc.evaluation.evaluate import EvaluationOptions
    from atmc.robust.threats import parse_threat

    options = EvaluationOptions(
        attacks=tuple(split_names(attack)),
        after=after,
        n=n,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        loss=loss,
        seed=seed,
        checks=checks,
        batch_size=batch_size,
        seconds=seconds,
    )
    request = evaluation.EvaluateRequest(
        files=tuple(files),
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
    results: list[dict[str, Any]] = []
    with LiveLine(console) as line:
        try:
            for event in evaluation.evaluate(request):
                line.show(event)
                if isinstance(event, evaluation.Evaluated):
                    results.append(event.figures)
                    for table in evaluation_tables(event.figures, per_class=per_class):
                        console.print(table)
        except KeyboardInterrupt:
            line.close()
            say(
                "interrupted; continue with the same command and --resume"
                if json_path
                else "interrupted; nothing was kept: an evaluation can be continued if it has --json"
            )
            raise
    if len(results) > 1:
        console.print(summary_table(results))


def evaluation_tables(figures: Mapping[str, Any], *, per_class: bool = False) -> list[RenderableType]:
    """Return the tables of one model's figures: accuracies, checks, other measurements, a warning of failed checks."""
    title = f"{figures['model']} on {figures['data']}, {figures['threat']}"
    parts: list[RenderableType] = [accuracy_table(figures, title, "images"), *verdict_tables(figures)]
    if "against" in figures:
        parts.append(_comparison_table(figures["against"]))
    for key, points in figures.get("curves", {}).items():
        parts.append(_curve_table(f"accuracy against {key}", key, points))
    if "smoothing" in figures:
        parts.append(_curve_table("accuracy certified by smoothing", "radius", figures["smoothing"]["curve"]))
    if "replay" in figures:
        parts.append(_replay_table(figures["replay"]))
    if per_class and "per_class" in figures:
        parts.append(_class_table(figures["per_class"]))
    return [*parts, *warning_boxes(figures)]


def summary_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with one row per model: clean accuracy, accuracy under each attack, and the checks."""
    attacks = list(dict.fromkeys(name for figures in results for name in figures["attacks"]))
    worst = ["worst case"] if len(attacks) > 1 else []
    table = new_table("all models", ["model"], ["clean", *attacks, *worst, "checks"])
    for figures in results:
        accuracies = [figures["clean"], *map(figures["attacks"].get, attacks)]
        accuracies += [figures.get("worst_case")] if worst else []
        cells = [f"{accuracy['accuracy']:.2%}" if accuracy else "" for accuracy in accuracies]
        failed = len(failed_checks(figures))
        verdict = f"{failed} FAILED" if failed else "none failed" if figures["checks"] else "not run"
        table.add_row(Text(figures["model"]), *cells, Text(verdict, style="bold red" if failed else ""))
    return table


def _comparison_table(other: Mapping[str, Any]) -> Table:
    title = f"A against B = {other['model']}, same images, McNemar's exact test"
    table = new_table(title, ["images"], ["B", "only A right", "only B right", "p", "verdict"])
    for name, test in other["comparison"].items():
        accuracy = other["clean"] if name == "clean" else other["attacks"][name]
        counts = (f"{test['only_a']:,}", f"{test['only_b']:,}", f"{test['p']:.3g}", test["verdict"])
        table.add_row(name, format_accuracy(accuracy), *counts)
    return table


def _curve_table(title: str, key: str, points: Sequence[Mapping[str, Any]]) -> Table:
    table = new_table(title, [], [key, "accuracy [95 % interval]"])
    for point in points:
        table.add_row(f"{point[key]:.4g}", format_accuracy(point))
    return table


def _replay_table(replay: Mapping[str, Any]) -> Table:
    table = new_table(f"replayed: {replay['file']}", ["images"], ["share [95 % interval]"])
    table.add_row("same prediction as the model attacked", format_accuracy(replay["agreement"]))
    table.add_row("right", format_accuracy(replay["accuracy"]))
    table.add_row("right, by the model attacked", f"{replay['accuracy_of_the_attacked_model']:.2%}")
    return table


def _class_table(accuracies: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Return the table of accuracies by class; the keys are clean and the attacks."""
    table = new_table("by class", [], ["class", *accuracies])
    rows_by_class = {name: {row["class"]: row for row in rows} for name, rows in accuracies.items()}
    for label in sorted(rows_by_class["clean"]):
        cells = [format_accuracy(rows[label]) if label in rows else "" for rows in rows_by_class.values()]
        table.add_row(str(label), *cells)
    return table
