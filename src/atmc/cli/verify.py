"""`atmc verify`: which images are proved against every attack of a threat, and which are broken."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from atmc.cli.accuracy_tables import format_accuracy, new_table
from atmc.cli.options import ImageColumn, JsonFile, LabelColumn, OverwriteFiles
from atmc.cli.terminal import console, say


def verify(
    file: Annotated[Path, typer.Argument(help="Model file; or a checkpoint (.pt, .safetensors), with --model.")],
    data: Annotated[str, typer.Option(help="Data set whose test split is used, see compress.")],
    threat: Annotated[str, typer.Option(help="What the adversary may do, in pixel units: linf:8/255 and the like.")],
    n: Annotated[int | None, typer.Option(help="Number of images, the first ones (default: all).")] = None,
    attacks: Annotated[
        bool, typer.Option(help="Run PGD on the images that intervals do not certify; proofs are the same without.")
    ] = True,
    linear: Annotated[
        bool, typer.Option(help="Bound the images that neither intervals nor PGD decide by backward linear bounds.")
    ] = False,
    autoattack: Annotated[
        bool, typer.Option(help="Run AutoAttack on the images that neither bounds nor PGD decide.")
    ] = False,
    time_per_image: Annotated[
        float | None,
        typer.Option(
            help="Seconds for the complete method, which runs with this option only, per image that is undecided at "
            "the end; includes --linear."
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Number of processes that share the images, with one thread each.")
    ] = 1,
    batch_size: Annotated[int, typer.Option(help="Number of images that are taken at once.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the attacks' random starts.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Model of a checkpoint ({models}), or package.module:factory for your own class."),
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    save_examples: Annotated[
        Path | None, typer.Option(help="Save the images that break others to this .npz file, see evaluate.")
    ] = None,
    json_path: JsonFile = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an interrupted verification (with --json).")
    ] = False,
    overwrite: OverwriteFiles = False,
) -> None:
    """Give each test image a verdict: certified against every attack of a threat, broken, or undecided."""
    from atmc.cli.live import LiveLine
    from atmc.commands import verify as verification
    from atmc.evaluation.verify.verify import VerifyOptions
    from atmc.robust.threats import parse_threat

    request = verification.VerifyRequest(
        file=file,
        data=data,
        threat=parse_threat(threat),
        options=VerifyOptions(
            n=n,
            attacks=attacks,
            linear=linear,
            autoattack=autoattack,
            time_per_image=time_per_image,
            processes=processes,
            seed=seed,
            batch_size=batch_size,
        ),
        model=model,
        image_column=image_column,
        label_column=label_column,
        save_examples=save_examples,
        json_path=json_path,
        resume=resume,
        overwrite=overwrite,
    )
    with LiveLine(console) as line:
        try:
            for event in verification.verify(request):
                line.show(event)
                if isinstance(event, verification.Verified):
                    for table in verification_tables(event.figures):
                        console.print(table)
        except KeyboardInterrupt:
            line.close()
            say(
                "interrupted; continue with the same command and --resume"
                if json_path
                else "interrupted; nothing was kept: a verification can be continued if it has --json"
            )
            raise


def verification_tables(figures: Mapping[str, Any]) -> list[RenderableType]:
    """Return the tables of a verification: its accuracies, what each stage decided, and how hard the images were."""
    title = f"{figures['model']} on {figures['data']}, {figures['threat']}"
    accuracies = new_table(title, ["images"], ["accuracy [95 % interval]"])
    accuracies.add_row("clean", format_accuracy(figures["clean"]))
    accuracies.add_row("attacked: at most", format_accuracy(figures["attacked"]))
    accuracies.add_row("certified, under every attack: at least", format_accuracy(figures["certified"]))
    accuracies.add_row("undecided", f"{figures['certified']['undecided']:.2%}")
    stages = new_table("verdicts by stage", ["stage"], ["images", "certified", "broken", "seconds"])
    for row in figures["stages"]:
        verdicts = [f"{row[verdict]:,}" if verdict in row else "" for verdict in ("certified", "broken")]
        stages.add_row(row["stage"], f"{row['images']:,}", *verdicts, f"{row['seconds']:,.1f}")
    return [accuracies, stages, *_search_tables(figures)]


def _search_tables(figures: Mapping[str, Any]) -> list[RenderableType]:
    """Return the table of the distributions over the images of the complete method, as a list, empty if it had none."""
    if "complete" not in figures:
        return []
    search, quantiles = figures["complete"], ("min", "median", "p90", "max")
    title = f"complete: {search['images']:,} images, {search['undecided']:,} undecided"
    table = new_table(title, ["per image"], quantiles)
    table.add_row("seconds", *(f"{search['seconds'][name]:,.1f}" for name in quantiles))
    table.add_row("unstable ReLUs and windows", *(f"{search['unstable'][name]:,.0f}" for name in quantiles))
    return [table]
