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
    from atmc.commands.outputs import check_file
    from atmc.commands.pages import fill_page
    from atmc.commands.table import default_columns, draw_table, parse_columns, read_results
    from atmc.core.files import write_beside

    if bool(results) == bool(page):
        raise ValueError("expected either results to compare (run folders or JSON files) or --page FILE")
    if page and (columns or out):
        raise ValueError("--page takes its columns from tables.toml and writes the page: leave out --columns and --out")
    if out:
        check_file(out, overwrite=overwrite)
    for path in page or []:
        filled = fill_page(path)
        for file, text in {**filled.files, path: filled.text}.items():
            write_beside(file, text.encode())
            say(str(file))
    if results:
        rows = read_results(results)
        chosen = [column for text in columns or [] for column in parse_columns(text)]
        text = draw_table(rows, chosen or default_columns(rows), style)
        if out:
            write_beside(out, text.encode())
        else:
            print(text, end="")
