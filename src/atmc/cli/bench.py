"""`atmc bench`: latency and memory of a model file."""

from __future__ import annotations

from typing import Annotated

import typer

from atmc.cli.options import ImageColumn, JsonFile, LabelColumn, ModelFile, OverwriteFiles, OwnClass
from atmc.cli.terminal import console, is_narrow


def bench(
    file: ModelFile,
    data: Annotated[
        str | None,
        typer.Option(help="Data set whose training images calibrate int8, and whose test images give accuracies."),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, separated by commas (default: 1, and all processors).")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1,8,64",
    reps: Annotated[int, typer.Option(help="Rounds of measuring; in each round every engine has its turn.")] = 11,
    n: Annotated[int, typer.Option(help="Number of test images for the accuracies, the first ones.")] = 1000,
    unsimplified: Annotated[
        bool, typer.Option("--unsimplified", help="Measure the dense engines on the unsimplified network too.")
    ] = False,
    model: OwnClass = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    json_path: JsonFile = None,
    overwrite: OverwriteFiles = False,
) -> None:
    """Measure latency, memory and accuracy on the CPU beside the dense engines that are installed."""
    from atmc.cli.bench_tables import bench_tables
    from atmc.commands.bench import bench as benches

    request = benches.BenchRequest(
        file=file,
        data=data,
        threads=benches.parse_numbers(threads, "threads") if threads else (),
        batches=benches.parse_numbers(batch, "batch"),
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
    for table in bench_tables(figures, narrow=is_narrow()):
        console.print(table)
