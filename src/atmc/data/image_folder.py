"""Read a folder of images, ``split/class/*.png``; what cannot be read there is refused by name, never left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atmc.data.decoding import SUFFIXES, decode_images

NOTES = {  # of files that go with a data set and are no images
    *(".txt", ".md", ".rst", ".html", ".pdf", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".csv", ".tsv"),
    *(".ini", ".cfg", ".log", ".py", ".sh", ".ipynb", ".db", ".sqlite", ".parquet"),
}
SYSTEM = {"thumbs.db", "desktop.ini", "icon\r", "__macosx"}  # what operating systems leave, in lower case

Folder = tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...]]


def find_splits(root: Path, names: Mapping[str, str]) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return the folders of the splits of an image folder, and what else holds images there.

    Args:
        names: name of a folder -> its split.

    Raises:
        ValueError: two folders are of one split, or there is no split at all.
    """
    folders: dict[str, Path] = {}
    for folder in _subfolders(root):
        split = names.get(folder.name)
        if split in folders:
            raise ValueError(f"found two folders of the split {split}: {folders[split]} and {folder}; keep one")
        if split is not None:
            folders[split] = folder
    if not folders:
        raise ValueError(f"found neither parquet files nor train/<class>/ with images in the folder {root}")
    others = [path for path in _visible(root) if path not in folders.values()]
    return folders, tuple(path.name for path in others if any(map(_is_image, [path, *_files(path)])))


def read_split(folder: Path, split: str) -> Folder:
    """Return the images of a split (n, c, h, w), their labels (n,), and the classes: the folders, sorted as text.

    The images of a class may lie in folders of its folder.

    Raises:
        ValueError: an image lies in no class, a class of the training split is empty, or a file is neither an image
            that can be read nor a note.
    """
    _refuse([path for path in _visible(folder) if _is_image(path)], "expected every image in the folder of its class")
    groups = {class_folder.name: list(_files(class_folder)) for class_folder in _subfolders(folder)}
    files = [path for group in groups.values() for path in group]
    others = [path for path in files if path.suffix.lower() not in SUFFIXES | NOTES]
    _refuse(others, "expected images of a known format (" + ", ".join(sorted(SUFFIXES)) + ") and notes")
    images = {name: [path for path in group if _is_image(path)] for name, group in groups.items()}
    if not any(images.values()):
        raise ValueError(f"the split {split} is empty: found no images in {folder}/<class>/")
    empty = [name for name, group in images.items() if not group]
    if empty and split == "train":
        raise ValueError(f"the class {empty[0]} has no images in {folder}: remove the folder in all splits")
    paths = [path for group in images.values() for path in group]
    labels = np.repeat(np.arange(len(images)), [len(group) for group in images.values()])
    return decode_images(paths, map(str, paths)), labels, tuple(images)


def _refuse(paths: list[Path], reason: str) -> None:
    """Raise ValueError if there are files, naming the first."""
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise ValueError(f"{reason}, got {paths[0]}{more}")


def _visible(folder: Path) -> list[Path]:
    """List what is in a folder, sorted, without hidden files and those that operating systems leave."""
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in paths if path.name.lower() not in SYSTEM)


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _files(folder: Path) -> Iterable[Path]:
    """Yield the files in a folder and in its folders; a link that leads nowhere is one. A file has none."""
    for path in _visible(folder) if folder.is_dir() else []:
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
