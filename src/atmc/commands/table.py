"""`atmc table`: results of many runs as one table, or the tables of Markdown pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atmc.commands.outputs import check_file
from atmc.commands.pages import fill_page
from atmc.commands.rows import default_columns, draw_table, parse_columns, read_results
from atmc.core.files import write_beside


@dataclass(frozen=True, kw_only=True)
class TableRequest:
    """What `atmc table` was asked for; the fields are its options."""

    results: tuple[Path, ...] = ()
    columns: tuple[str, ...] = ()
    style: str = "md"
    out: Path | None = None
    pages: tuple[Path, ...] = ()
    overwrite: bool = False


@dataclass(frozen=True)
class Table:
    """The text of a table that no file was named for, else empty, and the files that were written."""

    text: str
    written: tuple[Path, ...]


def make_table(request: TableRequest) -> Table:
    """Draw the table of some results, or fill the tables of pages.

    Raises:
        ValueError: the request, a result, a column or a page is wrong; pages before a wrong one are written.
    """
    if bool(request.results) == bool(request.pages):
        raise ValueError("expected either results to compare (run folders or JSON files) or --page FILE")
    if request.pages:
        if request.columns or request.out:
            raise ValueError(
                "--page takes its columns from tables.toml and writes the page: leave out --columns and --out"
            )
        return Table("", tuple(file for page in request.pages for file in _write_page(page)))
    if request.out:
        check_file(request.out, overwrite=request.overwrite)
    rows = read_results(list(request.results))
    columns = [column for text in request.columns for column in parse_columns(text)]
    text = draw_table(rows, columns or default_columns(rows), request.style)
    if request.out is None:
        return Table(text, ())
    write_beside(request.out, text.encode())
    return Table("", (request.out,))


def _write_page(page: Path) -> list[Path]:
    """Fill the tables of a page; return the files that were written."""
    filled = fill_page(page)
    files = {**filled.files, page: filled.text}
    for file, text in files.items():
        write_beside(file, text.encode())
    return list(files)
