"""`atmc export`: write a model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atmc.cli.options import ImageColumn, LabelColumn, ModelFile, OverwriteFiles, OwnClass
from atmc.cli.terminal import say


def export(
    file: ModelFile,
    to: Annotated[str, typer.Option(help="Format: onnx, safetensors, c or vnnlib.")],
    out: Annotated[Path, typer.Option(help="File to write; for c and vnnlib a folder.")],
    model: OwnClass = None,
    data: Annotated[
        str | None,
        typer.Option(help="Compare the export on this data set's test images, see compress (default: random images)."),
    ] = None,
    threat: Annotated[
        str | None,
        typer.Option(
            help="Compare on PGD examples under this threat too; it is also that of vnnlib's properties (default: that "
            "of the file's training)."
        ),
    ] = None,
    n: Annotated[
        int, typer.Option(help="Number of images to compare on, and for vnnlib to write, the first ones.")
    ] = 256,
    time_per_image: Annotated[
        float | None, typer.Option(help="Timeout of each property of vnnlib, in seconds (default: 60).")
    ] = None,
    with_wrong: Annotated[
        bool,
        typer.Option("--with-wrong", help="Write properties of images too that are wrong without an attack (vnnlib)."),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name of the C files and functions (default: the model file's), so that two models can be linked."
        ),
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    overwrite: OverwriteFiles = False,
) -> None:
    """Write a model as ONNX, safetensors, C source or VNN-LIB, and compare what was written with PyTorch."""
    from atmc.commands import export as exports
    from atmc.robust.threats import parse_threat

    request = exports.ExportRequest(
        file=file,
        to=to,
        out=out,
        model=model,
        data=data,
        threat=parse_threat(threat) if threat else None,
        n=n,
        time_per_image=time_per_image,
        with_wrong=with_wrong,
        name=name,
        image_column=image_column,
        label_column=label_column,
        overwrite=overwrite,
    )
    exported = exports.export(request)
    for path, size in exported.files.items():
        say(f"{path}  {size:,} bytes")
    for line in [*exported.notes, *exported.agreements]:
        say(f"  {line}")
