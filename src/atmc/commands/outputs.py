"""Rules of what commands write: nothing is replaced unless the user asks, and one run at a time writes to a folder."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atmc.core.files import remove_leftovers, write_beside

# the files of a run folder; `checkpoint` is a folder that exists while the run is unfinished
CONFIG, LOG, MODEL, METRICS, REPORT = "config.toml", "log.jsonl", "model.atmc", "metrics.json", "report.html"
CHECKPOINT = "checkpoint"


class FolderInUse(ValueError):
    """Another process is writing to the run folder."""


def check_file(path: Path, *, overwrite: bool) -> None:
    """Raise ValueError if a command may not write this file: its folder is missing, or it exists already."""
    check_parent(path)
    check_absent(path, overwrite=overwrite)


def check_parent(path: Path) -> None:
    """Raise ValueError if the folder that a file or folder is to be written into does not exist."""
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} into")


def check_examples_file(path: Path) -> None:
    """Raise ValueError if adversarial images cannot be written to this file: no folder, or a name without .npz."""
    check_parent(path)
    if path.suffix != ".npz":
        raise ValueError(f"expected a name that ends in .npz for the examples, got {path}")


def check_absent(path: Path, *, overwrite: bool) -> None:
    """Raise ValueError if a file exists already and the user did not ask to replace it."""
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: add --overwrite to replace it")


def check_run_folder(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Return whether a run folder holds a run to resume; False if a new run may start in it.

    Raises:
        ValueError: it is a file, holds other files, or holds a run while neither resume nor overwrite was asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    started = (folder / CONFIG).exists()
    if started and not (resume or overwrite):
        raise ValueError(f"{folder} holds a run already: add --resume to continue it or --overwrite to replace it")
    if folder.exists() and not started and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run of atmc: choose another folder")
    return started and resume


def clear_run_folder(folder: Path) -> None:
    """Delete a run's files, its configuration last, since that marks the folder as a run's."""
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    for name in (MODEL, METRICS, REPORT, LOG, CONFIG):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it; the lock ends with the process, however it ends.

    Raises:
        FolderInUse: another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(f"{folder} is in use by another run") from None
        remove_leftovers(folder)
        remove_leftovers(folder / CHECKPOINT)
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON; the file is always the old one or the whole new one."""
    write_beside(path, (json.dumps(value, indent=1) + "\n").encode())
