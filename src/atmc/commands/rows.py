"""Make one table out of many JSON results: rows and columns in, text out.

A row is a list of mappings, in which names are looked up from the first to the last: the fields of a result, then its
file. A column is an expression of `atmc.commands.expressions` with a title and a format.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atmc.commands.expressions import MISSING, Lookups, Scope, evaluate, is_accuracy, parse, render
from atmc.core.errors import unknown

Row = list[Mapping[str, Any]]
FORMATS = ("md", "csv", "latex")
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MISSING: "--"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


@dataclass(frozen=True)
class Column:
    """A column: its title, the expression that gives its values, and the format they are written in."""

    title: str
    expression: ast.expr
    spec: str = ""


def read_document(path: Path) -> Any:
    """Read a JSON or TOML file, or a .jsonl file as a list with one value per line.

    Raises:
        ValueError: it is not what its name says.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml":
            return tomllib.loads(text)
        return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not {'TOML' if path.suffix == '.toml' else 'JSON'}: {error}") from None


def read_results(paths: Sequence[Path]) -> list[Row]:
    """Read run folders and JSON files of `atmc evaluate --json`, one row each.

    Args:
        paths: run folders, JSON files, or folders that hold such; runs are looked for in all folders below.

    Returns:
        Rows in the order of the paths, within a folder sorted by name. Each has the fields of its JSON, and `run`: the
        run folder or the file without ".json", as seen from the path; if two are the same, the whole path.

    Raises:
        ValueError: there is nothing to read, or a file holds no JSON object.
    """
    files = [(path, file) for path in paths for file in _find_results(path)]
    bases = [file.parent if file.name == "metrics.json" else file.with_suffix("") for _, file in files]
    names = [
        str(base.relative_to(path) if path in base.parents else base.resolve().name)
        for (path, _), base in zip(files, bases, strict=True)
    ]
    shared = {name for name, count in Counter(names).items() if count > 1}
    rows: list[Row] = []
    for (_, file), base, name in zip(files, bases, names, strict=True):
        document = read_document(file)
        if not isinstance(document, dict):
            raise ValueError(f"{file} holds no result: expected a JSON object")
        rows.append([document, {"run": str(base) if name in shared else name}])
    return rows


def _find_results(path: Path) -> list[Path]:
    """Return a path's result files.

    Raises:
        ValueError: it does not exist or holds none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"there is no file or folder {path}")
    evaluations = [file for file in path.glob("*.json") if file.name != "metrics.json" and _is_evaluation(file)]
    results = sorted([*path.rglob("metrics.json"), *evaluations])
    if not results:
        raise ValueError(f"{path} holds no run (metrics.json) and no JSON file of atmc evaluate")
    return results


def _is_evaluation(path: Path) -> bool:
    document = read_document(path)
    return isinstance(document, dict) and "attacks" in document


def parse_columns(text: str) -> list[Column]:
    """Parse columns that are separated by commas, as in "run, k / N=nonzeros / dense_weights:.4f, file_bytes:,".

    A comma inside brackets or quotes does not separate, nor does one right after a colon, which is a format.
    """
    ends = [at for at in _positions_outside(text, ",") if not text[:at].endswith(":")]
    parts = [text[start:end] for start, end in zip([0, *(at + 1 for at in ends)], [*ends, len(text)], strict=True)]
    return [parse_column(part) for part in parts]


def parse_column(text: str) -> Column:
    """Parse one column, "TITLE=EXPRESSION:FORMAT"; title and format may be left out.

    Raises:
        ValueError: it cannot be read.
    """
    signs = _positions_outside(text, "=")
    equals = [at for at in signs if "=" not in text[at + 1 : at + 2] and text[at - 1] not in "=!<>"]
    title, rest = (text[: equals[0]], text[equals[0] + 1 :]) if equals else ("", text)
    colons = list(_positions_outside(rest, ":"))
    source, spec = (rest[: colons[-1]], rest[colons[-1] + 1 :]) if colons else (rest, "")
    return Column(title.strip() or source.strip(), parse(source), spec.strip())


def _positions_outside(text: str, character: str) -> Iterator[int]:
    """Yield the positions of a character outside of brackets and quotes."""
    depth, quote = 0, ""
    for at, here in enumerate(text):
        if quote:
            quote = "" if here == quote else quote
        elif here in "\"'":
            quote = here
        elif here in "([{":
            depth += 1
        elif here in ")]}":
            depth -= 1
        elif here == character and depth == 0:
            yield at


def default_columns(rows: Sequence[Row]) -> list[Column]:
    """Return the usual columns of a table of runs, without those that have no value in any row."""
    fields = {"file bytes": "file_bytes:,", "nonzeros": "nonzeros:,", "bits": "bits", "clean": "clean"}
    columns = [f"{name}={name}" for name in ("run", "method", "threat")]
    columns += [f"{title}={source}" for title, source in fields.items()]
    attacks = dict.fromkeys(name for row in rows for name in Scope(row).look_up("attacks") or {})
    columns += [f"{name}=attacks[{name!r}]" for name in attacks]
    columns += [f"{name}={name}" for name in ("certified", "attacked")]
    columns.append("failed checks=failed(checks)")
    parsed = [parse_column(column) for column in columns]
    return [column for column in parsed if any(evaluate(column.expression, Scope(row)) is not None for row in rows)]


def draw_table(
    rows: Sequence[Row],
    columns: Sequence[Column],
    style: str = "md",
    *,
    definitions: Mapping[str, ast.expr] | None = None,
    align: bool = True,
) -> str:
    """Return a table as text.

    Args:
        rows: one per line of the table.
        columns: what the lines show.
        style: "md", Markdown; "csv", raw values without formats, with four columns per accuracy; or "latex", a tabular
            with the rules of booktabs.
        definitions: further names that the columns use.
        align: pad the cells of Markdown to the same width.

    Raises:
        ValueError: a column has a name that no row has, or a value that its format does not fit.
    """
    if style not in FORMATS:
        raise unknown("format", style, FORMATS)
    lookups = Lookups()
    values = [[_evaluate_cell(column, Scope(row, definitions or {}, lookups)) for column in columns] for row in rows]
    lookups.check()
    titles = [column.title for column in columns]
    if style == "csv":
        return _draw_csv(titles, values)
    cells = [[render_cell(value, column) for value, column in zip(line, columns, strict=True)] for line in values]
    return _draw_markdown(titles, cells, align=align) if style == "md" else _draw_latex(titles, cells, values)


def _evaluate_cell(column: Column, scope: Scope) -> Any:
    """Return the value of a cell; errors name the column."""
    try:
        return evaluate(column.expression, scope)
    except ValueError as error:
        raise ValueError(f"column {column.title!r}: {error}") from None


def render_cell(value: Any, column: Column) -> str:
    """Return a cell's text; errors name the column."""
    try:
        return render(value, column.spec)
    except ValueError as error:
        raise ValueError(f"column {column.title!r}: {error}") from None


def _draw_markdown(titles: list[str], cells: list[list[str]], *, align: bool) -> str:
    lines = [[cell.replace("|", r"\|").replace("\n", " ") for cell in line] for line in [titles, *cells]]
    widths = [max(3, *map(len, column)) if align else 0 for column in zip(*lines, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rule = "|" + "|".join("-" * (width + 2 if align else 3) for width in widths) + "|"
    drawn = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([drawn[0], rule, *drawn[1:]]) + "\n"


def _draw_csv(titles: list[str], values: list[list[Any]]) -> str:
    wide = [any(is_accuracy(value) for value in column) for column in zip(*values, strict=True)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ("", "_low", "_high", "_n")
    writer.writerow(
        [title + end for title, four in zip(titles, wide, strict=True) for end in (ends if four else ("",))]
    )
    for line in values:
        cells: list[Any] = []
        for value, four in zip(line, wide, strict=True):
            if is_accuracy(value):
                cells += [value["accuracy"], *value["ci95"], value["n"]]
            else:
                cells += [None if value is None else re.sub(r"[*`]", "", render(value)), *([None] * 3 * four)]
        writer.writerow(cells)
    return text.getvalue()


def _draw_latex(titles: list[str], cells: list[list[str]], values: list[list[Any]]) -> str:
    columns = list(zip(*values, strict=True))
    layout = "".join("l" if any(isinstance(value, str) for value in column) else "r" for column in columns)
    lines = [" & ".join(map(_escape_latex, line)) + r" \\" for line in [titles, *cells]]
    head = ["% needs \\usepackage{booktabs}", rf"\begin{{tabular}}{{{layout}}}", r"\toprule", lines[0], r"\midrule"]
    return "\n".join([*head, *lines[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escape_latex(text: str) -> str:
    """Return text for LaTeX, with Markdown's bold and code as LaTeX's."""
    text = "".join(_LATEX.get(character, character) for character in text)
    text = re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", text)
    return re.sub(r"`(.*?)`", r"\\texttt{\1}", text)
