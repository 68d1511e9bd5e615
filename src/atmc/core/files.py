"""Write files so that each is the old one or the whole new one, and so that errors name the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_beside(path: Path, data: bytes) -> int:
    """Write a temporary file in the same folder and rename it, so that path is the old file or the whole new one.

    Returns:
        The number of bytes.

    Raises:
        OSError: such as a full disk; it names path, and the temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _name_errors(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with _name_errors(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(data)


def append_line(path: Path, text: str) -> None:
    """Append a line to a text file.

    Raises:
        OSError: it names path; part of the line may be in the file.
    """
    with _name_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed `write_beside` left in a folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


@contextmanager
def _name_errors(path: Path) -> Iterator[None]:
    """Make an OSError within the context name this path; the system's own error for a full disk names no file."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
