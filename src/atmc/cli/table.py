"""`atmc table`: many results as one table in Markdown, CSV or LaTeX, or the tables of a Markdown page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atmc.cli.options import OverwriteFiles
from atmc.cli.terminal import say


def table(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, JSON files of atmc evaluate, or folders that hold such."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            help="Columns, separated by commas: names and dotted paths of the JSON, or arithmetic with them, each as "
            '[TITLE=]EXPRESSION[:FORMAT], such as "run, k / N=nonzeros / dense_weights:.4f". May be repeated.'
        ),
    ] = None,
    style: Annotated[str, typer.Option("--format", help="md (Markdown), csv or latex.")] = "md",
    out: Annotated[Path | None, typer.Option(help="Write the table to this file instead of printing it.")] = None,
    page: Annotated[
        list[Path] | None,
        typer.Option(help="Fill the tables of this Markdown page as tables.toml beside it says. May be repeated."),
    ] = None,
    overwrite: OverwriteFiles = False,
) -> None:
    """Compare runs and evaluations in one table, a row per result; missing values are en dashes."""
    from atmc.commands.table import TableRequest, make_table

    made = make_table(
        TableRequest(
            results=tuple(results or ()),
            columns=tuple(columns or ()),
            style=style,
            out=out,
            pages=tuple(page or ()),
            overwrite=overwrite,
        )
    )
    for file in made.written:
        say(f"{file}")
    print(made.text, end="")
