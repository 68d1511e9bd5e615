"""Writing to disk: a file is the old one or the whole new one, and an error says which file it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_beside(path: Path, data: bytes) -> int:
    """Write to a temporary neighbour and rename, so that path is always the old file or the whole new one.

    Returns:
        the number of bytes.

    Raises:
        OSError: a full disk, say; it names path, and the neighbour is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with _named(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(data)


def append_line(path: Path, text: str) -> None:
    """Add a line to a text file. Raises OSError that names it; part of the line may be there then."""
    with _named(path), open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def remove_leftovers(folder: Path) -> None:
    """Take away the temporary neighbours that a killed `write_beside` left."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within, an OSError is about this path, whatever the system's own says: a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
