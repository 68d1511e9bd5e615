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
    autoattack: Annotated[
        bool, typer.Option(help="Run AutoAttack on the images that neither a proof nor PGD decides.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Number of images that are taken at once.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the attacks' random starts.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Model of a checkpoint ({models}), or package.module:factory for your own class."),
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
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
        options=VerifyOptions(n=n, autoattack=autoattack, seed=seed, batch_size=batch_size),
        model=model,
        image_column=image_column,
        label_column=label_column,
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
    """Return the tables of a verification: its accuracies, and what each stage decided."""
    title = f"{figures['model']} on {figures['data']}, {figures['threat']}"
    attacks = " and ".join(figures["attacked"]["attacks"])
    accuracies = new_table(title, ["images"], ["accuracy [95 % interval]"])
    accuracies.add_row("clean", format_accuracy(figures["clean"]))
    accuracies.add_row(f"attacked, by {attacks}: at most", format_accuracy(figures["attacked"]))
    accuracies.add_row("certified, under every attack: at least", format_accuracy(figures["certified"]))
    accuracies.add_row("undecided", f"{figures['certified']['undecided']:.2%}")
    stages = new_table("verdicts by stage", ["stage", "verdict"], ["images", "decided", "seconds"])
    for row in figures["stages"]:
        numbers = (f"{row['images']:,}", f"{row['decided']:,}", f"{row['seconds']:,.1f}")
        stages.add_row(row["stage"], row["verdict"], *numbers)
    return [accuracies, stages]
