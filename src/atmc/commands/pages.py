"""Fill the tables of a Markdown page from JSON files, as the file tables.toml beside the page describes them.

A table stands on the page between the lines ``<!-- table: NAME -->`` and ``<!-- end of table -->``. `docs/tables.md`
describes tables.toml.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atmc.commands.expressions import Lookups, Scope, evaluate, parse, render
from atmc.commands.rows import Row, draw_table, parse_column, read_document
from atmc.core.errors import unknown

DESCRIPTION = "tables.toml"
_KEYS = ("sources", "join", "rows", "group", "baseline", "where", "sort", "columns", "text", "file")
_TABLE = re.compile(r"(<!-- table: (?P<name>[^\n>]+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True)
class FilledPage:
    """A page whose tables are made from today's JSON files, and the CSV files that tables.toml asks for beside it."""

    text: str
    files: dict[Path, str]


def fill_page(page: Path) -> FilledPage:
    """Make all tables of a page.

    A mark ``NAME of PATH`` takes the table from another description, relative to the page.

    Args:
        page: the Markdown file; it is read, not written.

    Raises:
        ValueError: there is no such page, tables.toml or mark, or a table's description does not fit the files.
    """
    if not page.is_file():
        raise ValueError(f"there is no file {page}")
    text = page.read_text(encoding="utf-8")
    marks = [match["name"] for match in _TABLE.finditer(text)]
    if not marks or len(marks) != text.count("<!-- table: "):
        raise ValueError(f"expected tables in {page} between '<!-- table: NAME -->' and '<!-- end of table -->'")
    drawn: dict[str, str] = {}
    files: dict[Path, str] = {}
    for mark in dict.fromkeys(marks):
        name, _, other = mark.partition(" of ")
        description = _Description.read(page.parent / (other or DESCRIPTION))
        drawn[mark] = description.draw(name, "md")
        if not other:
            files |= description.draw_files()
    return FilledPage(_TABLE.sub(lambda match: f"{match[1]}\n{drawn[match['name']]}\n{match[3]}", text), files)


@dataclass(frozen=True)
class _Description:
    """The content of one tables.toml."""

    path: Path
    tables: Mapping[str, Any]
    definitions: Mapping[str, ast.expr]

    @classmethod
    def read(cls, path: Path) -> _Description:
        """Read a tables.toml. Raises ValueError if it is missing or is not TOML."""
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
        definitions = {name: parse(source) for name, source in tables.pop("define", {}).items()}
        return cls(path, tables, definitions)

    def draw(self, name: str, style: str) -> str:
        """Return one table. Raises ValueError, with the file and the name, if it does not fit the JSON files."""
        if name not in self.tables:
            raise unknown(f"table of {self.path}", name, self.tables)
        try:
            return _draw(self.tables[name], self.path.parent, self.definitions, style)
        except ValueError as error:
            raise ValueError(f"{self.path}, table {name!r}: {error}") from None

    def draw_files(self) -> dict[Path, str]:
        """Return the CSV files that tables ask for."""
        named = {name: table["file"] for name, table in self.tables.items() if "file" in table}
        return {self.path.with_name(file): self.draw(name, "csv") for name, file in named.items()}


def _draw(table: Mapping[str, Any], folder: Path, definitions: Mapping[str, ast.expr], style: str) -> str:
    """Return one table, or the lines of text that take its place."""
    for key in table:
        if key not in _KEYS:
            raise unknown("key", key, _KEYS)
    if "baseline" in table and "group" not in table:
        raise ValueError("expected a baseline only beside group")
    if "sources" not in table or ("columns" in table) == ("text" in table):
        raise ValueError("expected sources, and either columns or text")
    rows = _build_rows(table, folder, definitions)
    if "text" in table:
        return "".join(render(evaluate(parse(table["text"]), Scope(row, definitions))) + "\n" for row in rows)
    columns = [parse_column(column) for column in table["columns"]]
    return draw_table(rows, columns, style, definitions=definitions, align=False)


def _build_rows(table: Mapping[str, Any], folder: Path, definitions: Mapping[str, ast.expr]) -> list[Row]:
    """Read a table's sources; make, group, choose and sort its rows.

    Rows that came from the same entry by the last expression of `rows` are siblings: they are grouped and sorted among
    themselves.
    """
    lookups = Lookups()

    def value_in(row: Row, source: str) -> Any:
        return evaluate(parse(source), Scope(row, definitions, lookups))

    rows = _read_sources(table["sources"], folder)
    for name, source in table.get("join", {}).items():
        for row in rows:
            path = folder / render(value_in(row, source))
            row.append({name: read_document(path) if path.is_file() else None})
    families = [rows]
    for source in table.get("rows", []):
        families = [_make_children(value_in(row, source), row) for siblings in families for row in siblings]
    chosen: list[Row] = []
    for siblings in families:
        if "group" in table:
            siblings = _group(siblings, table["group"], definitions, table.get("baseline"))
        siblings = [row for row in siblings if value_in(row, table.get("where", "True"))]
        keys = [[value_in(row, key) for key in table.get("sort", [])] for row in siblings]
        order = sorted(range(len(siblings)), key=lambda at: [(key is None, key) for key in keys[at]])
        chosen += [siblings[at] for at in order]
    lookups.check()
    return chosen


def _read_sources(sources: Sequence[str], folder: Path) -> list[Row]:
    """Read the files of `sources`, which may have wildcards, a row each.

    Raises:
        ValueError: a source matches no file.
    """
    rows: list[Row] = []
    for source in sources:
        paths = sorted(folder.glob(source)) if "*" in source else [folder / source]
        if not paths or not paths[0].is_file():
            raise ValueError(f"there is no file {folder / source}")
        for path in paths:
            run = path.parent.name if path.name == "metrics.json" else path.stem
            document = read_document(path)
            names = {"run": run, "folder": path.parent.relative_to(folder).as_posix(), "document": document}
            rows.append([document, names] if isinstance(document, dict) else [names])
    return rows


def _make_children(value: Any, parent: Row) -> list[Row]:
    """Return a row per entry of a JSON list or object; names are looked up in the entry first, then in the parent.

    An entry of an object has its name as `key`; an entry that is no object is `value`.
    """
    if isinstance(value, Mapping):
        entries = [({"key": key}, entry) for key, entry in value.items()]
    else:
        entries = [({}, entry) for entry in value or []]
    return [
        [*([entry] if isinstance(entry, Mapping) else []), {"value": entry, **names}, *parent]
        for names, entry in entries
    ]


def _group(
    rows: Sequence[Row],
    names: Sequence[str],
    definitions: Mapping[str, ast.expr],
    baseline: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Return a row per combination of the values of these names, with its rows in the list `members`.

    Args:
        definitions: expressions by name, which the names may be as well.
        baseline: values of some names. Each row gets the list `baseline`: the members of the group that has these
            values and otherwise the row's own; None if there is none, or it is the row's own group.

    Raises:
        ValueError: the baseline names something else, or no group has its values.
    """
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        merged = {key: value for mapping in reversed(row) for key, value in mapping.items()}
        groups.setdefault(tuple(Scope(row, definitions).look_up(name) for name in names), []).append(merged)
    wanted = dict(baseline or {})
    for name in wanted:
        if name not in names:
            raise unknown("name of baseline", name, names)
    if wanted and not any(wanted.items() <= dict(zip(names, values, strict=True)).items() for values in groups):
        raise ValueError(f"no group has the values of baseline: {wanted}")
    grouped: list[Row] = []
    for values, members in groups.items():
        own = dict(zip(names, values, strict=True))
        other = tuple((own | wanted)[name] for name in names)
        others = groups.get(other) if baseline and other != values else None
        grouped.append([own, {"members": members, "baseline": others}])
    return grouped
