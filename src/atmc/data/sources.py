"""Read labeled images as whole splits of uint8 pixels: scikit-learn's digits, parquet files, image folders, the hub.

Nothing of a data set is left out in silence: what cannot be read is refused by name, and splits of other names than
those of `SPLITS` are listed in `Source.unused`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from atmc.data import image_folder
from atmc.data.decoding import decode_images, format_size

KNOWN = ("digits", "ylecun/mnist", "uoft-cs/cifar10", "uoft-cs/cifar100", "ufldl-stanford/svhn:cropped_digits")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)")
_MAX_UNNAMED = 2**16  # most classes of a source that names none; a column of larger numbers does not hold labels

T = TypeVar("T")


class Split(NamedTuple):
    """One split as read: pixels (n, c, h, w) uint8, labels (n,) int64, and the classes' names if they are known."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...] | None


class Source(NamedTuple):
    """A data set as read.

    Args:
        splits: keys among ``train``, ``validation``, ``test``.
        class_names: the names of all classes.
        unused: splits of other names, which are not read.
    """

    splits: dict[str, Split]
    class_names: tuple[str, ...]
    unused: tuple[str, ...] = ()


def read(name: str, image_column: str | None, label_column: str | None) -> Source:
    """Read a local folder or a hub id.

    Raises:
        ValueError: the name is unknown, or the content is not a set of labeled images of one size.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"expected a folder or a hub id, got the file {name}")
    files, unused = _parquet_files(folder) if folder.is_dir() else ({}, ())
    if folder.is_dir() and not files:
        if image_column is not None or label_column is not None:
            raise ValueError(f"an image folder has no columns, but image_column or label_column was given for {name}")
        images, unused = _read_image_folder(folder)
        return Source(*_unify_splits(images, name), unused)
    if files:
        tables = {split: _read_parquet_files(paths) for split, paths in files.items()}
    else:
        tables, unused = _hub_tables(name)
    splits = {
        split: _read_table(split, table, image_column, label_column)
        for split, table in _select_splits(tables, name).items()
    }
    return Source(*_unify_splits(splits, name), unused)


def _select_splits(splits: dict[str, T], name: str) -> dict[str, T]:
    """Return the splits, train first; raise ValueError if train, or both of test and validation, are missing."""
    if "train" not in splits or not {"test", "validation"} & set(splits):
        raise ValueError(f"expected the splits train and test in {name}, found {' and '.join(splits) or 'neither'}")
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return pixels (1797, 1, 28, 28) and labels of scikit-learn's digits: 8x8, pixels tripled, a border of 2 zeros."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    levels = np.rint(values.reshape(-1, 8, 8) / 16 * 255).astype(np.uint8)
    pixels = np.pad(levels.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    return pixels[:, None], labels.astype(np.int64)


def check_labels(labels: NDArray[np.int64], num_classes: int | None, place: str) -> None:
    """Raise ValueError unless all labels are >= 0 and, if num_classes is given, below it."""
    wrong = labels < 0 if num_classes is None else (labels < 0) | (labels >= num_classes)
    if wrong.any():
        row = int(wrong.argmax())
        expected = ">= 0" if num_classes is None else f"in 0 .. {num_classes - 1}"
        raise ValueError(f"expected labels {expected}, got {labels[row]} in row {row} of {place}")


def _unify_splits(splits: dict[str, Split], name: str) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Repeat gray images if other splits have color, and return the splits with the class names.

    Raises:
        ValueError: the splits differ in image size or classes, or a label has no class.
    """
    channels = max(split.pixels.shape[1] for split in splits.values())
    first = splits["train"]
    names = first.class_names
    if names is None:
        top = int(first.labels.max())
        if top >= _MAX_UNNAMED:
            raise ValueError(f"expected labels below {_MAX_UNNAMED} in {name}, which names no classes, got {top}")
        names = tuple(map(str, range(top + 1)))
    for class_name in names:
        if not class_name.isprintable():  # control characters, and bytes that are no UTF-8
            raise ValueError(f"expected names of classes in printable Unicode in {name}, got {class_name!r}: rename it")
    for key, split in splits.items():
        if split.pixels.shape[2:] != first.pixels.shape[2:]:
            sizes = f"{format_size(first.pixels[0, 0])} in train and {format_size(split.pixels[0, 0])} in {key}"
            raise ValueError(f"expected images of one size in {name}, got {sizes}")
        if split.class_names != first.class_names:
            classes = [", ".join(s.class_names or ("none named",)) for s in (first, split)]
            raise ValueError(f"expected the same classes in train and {key}, got {classes[0]} and {classes[1]}")
        check_labels(split.labels, len(names), key)
        splits[key] = split._replace(pixels=split.pixels.repeat(channels // split.pixels.shape[1], axis=1))
    return splits, names


def _read_image_folder(root: Path) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Read ``split/class/*.png`` (and the like); return the splits, and the names of what else holds images."""
    folders, unused = image_folder.find_splits(root, SPLITS)
    splits = _select_splits(folders, str(root))
    return {split: Split(*image_folder.read_split(folder, split)) for split, folder in splits.items()}, unused


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _parquet_files(root: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """List the files of each split, and the names of files of no split.

    They are ``train-00000-of-00001.parquet``, ``train.parquet`` or ``train/0000.parquet``.
    """
    files: dict[str, list[Path]] = {}
    unused = []
    paths = [path for path in sorted(root.rglob("*.parquet")) if "/." not in f"/{path.relative_to(root).as_posix()}"]
    for path in paths:
        split = SPLITS.get(re.split(r"[-_.]", path.name)[0]) or SPLITS.get(path.parent.name)
        if split is not None:
            files.setdefault(split, []).append(path)
        else:
            unused.append(path.relative_to(root).as_posix())
    if paths and not files:
        raise ValueError(f"expected files named train-*.parquet and test-*.parquet in {root}, got {paths[0].name}")
    for split, split_files in files.items():
        folders = sorted({str(path.parent) for path in split_files})
        if len(folders) > 1:
            raise ValueError(f"found several sets with a split {split}, name the folder of one: {', '.join(folders)}")
        _check_shards(split, split_files)
    return files, tuple(unused)


def _check_shards(split: str, paths: list[Path]) -> None:
    """Raise ValueError if a split's files are numbered and one is missing, or if they are of several names."""
    found: dict[tuple[str, int], list[int]] = {}
    for path in paths:
        match = _SHARD.fullmatch(path.stem)
        stem, number, count = (match[1], int(match[2]), int(match[3])) if match else (path.stem, 0, 1)
        found.setdefault((stem if match else "", count if match else 0), []).append(number)
    if len(found) > 1:
        raise ValueError(f"found files of several kinds for the split {split}, keep those of one: {_join_names(paths)}")
    ((stem, count), numbers) = next(iter(found.items()))
    missing = sorted(set(range(count)) - set(numbers))
    if missing:
        raise ValueError(
            f"the split {split} has {len(numbers)} of {count} files: {stem}-{missing[0]:05d}-of-{count:05d}.parquet is "
            f"missing in {paths[0].parent}"
        )


def _join_names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _read_parquet_files(paths: list[Path]) -> Any:
    """Read the rows of all files of a split into one pyarrow.Table."""
    tables = []
    for path in paths:
        try:
            tables.append(pq.ParquetFile(path).read())
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"cannot read the parquet file {path}: {error}") from error
        if tables[-1].schema != tables[0].schema:
            raise ValueError(f"expected the same columns in {paths[0]} and {path}")
    return pa.concat_tables(tables)


def _read_table(split: str, table: Any, image_column: str | None, label_column: str | None) -> Split:
    """Decode the image and label columns of a pyarrow.Table in the hub's layout."""
    if len(table) == 0:
        raise ValueError(f"the split {split} is empty")
    features = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    image_column = _image_column(table.schema, features, image_column)
    if label_column is None:
        label_column = next((name for name in ("label", "fine_label") if name in table.column_names), "label")
    if label_column not in table.column_names:
        columns = ", ".join(table.column_names)
        raise ValueError(f"found no label column {label_column} in {split}; choose label_column out of: {columns}")
    column = table.column(label_column)
    if not pa.types.is_integer(column.type) or column.null_count:
        kind = f"{column.type}, {column.null_count} of them missing" if column.null_count else column.type
        raise ValueError(f"expected integers in the label column {label_column} of {split}, got {kind}")
    labels = column.to_numpy().astype(np.int64)
    names = features.get(label_column, {}).get("names")
    check_labels(labels, len(names) if names else None, split)  # before the images, which take longer
    places = [f"row {row} of {split}" for row in range(len(table))]
    images = (
        _image_source(value.as_py(), place) for value, place in zip(table.column(image_column), places, strict=True)
    )
    return Split(decode_images(images, places), labels, tuple(names) if names else None)


def _image_column(schema: Any, features: dict[str, Any], name: str | None) -> str:
    """Return the image column: the one of this name, by default the only one.

    An image column is a struct with the file's bytes, or declared as images in the hub's metadata.

    Raises:
        ValueError: there is no image column, none of this name, or several without a name.
    """

    def holds_images(field: Any) -> bool:
        feature = features.get(field.name)
        declared = isinstance(feature, dict) and feature.get("_type") == "Image"
        return declared or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)

    columns = [field.name for field in schema if holds_images(field)]
    if not columns:
        raise ValueError(f"found no image column, the columns are: {', '.join(schema.names)}")
    if name is None and len(columns) > 1:
        raise ValueError(f"found several image columns, name one by image_column: {', '.join(columns)}")
    if name is not None and name not in columns:
        raise ValueError(f"expected image_column to be one of the image columns {', '.join(columns)}, got {name}")
    return name or columns[0]


def _image_source(value: bytes | dict[str, Any] | None, place: str) -> bytes | Path:
    """Return an image's file as bytes, or its path (for image folders of the hub, which are downloaded first)."""
    content = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    if not content:
        raise ValueError(f"expected an image in {place}, got none")
    return Path(content) if isinstance(content, str) else content


def _hub_tables(name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Load the splits of a hub data set as pyarrow.Tables, and name those that are not used.

    The hub is not asked for a name without ``owner/``.
    """
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"found no data set {name}: no folder here, and no hub id like owner/name{_suggest(name)}")
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, configuration = name.partition(":")
    failures = (ConnectionError, FileNotFoundError, HfHubHTTPError, datasets.exceptions.DatasetsError, ValueError)
    try:
        with _hide_progress_bars():
            loaded = datasets.load_dataset(repository, configuration or None)
    except (*failures, RuntimeError) as error:  # RuntimeError: the set is a script, which `datasets` no longer runs
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"found no folder {name}, and cannot load it from the hub: {reason}{_suggest(name)}"
        ) from error
    tables = {
        SPLITS[split]: rows.with_format("arrow")[:].replace_schema_metadata(rows.features.arrow_schema.metadata)
        for split, rows in loaded.items()
        if split in SPLITS
    }
    return tables, tuple(str(split) for split in loaded if split not in SPLITS)


def _suggest(name: str) -> str:
    """Return "; did you mean ...?" with near names of common data sets and of folders, "" if none is near.

    Unlike `errors.did_you_mean` it knows short names of data sets, may name several, and expects paths to be nearer.
    """
    known = {short: full for full in KNOWN for short in (full, full.split("/")[-1])}
    parent = Path(name).expanduser().parent
    folders = [str(path) for path in _subfolders(parent)] if parent.is_dir() else []
    near = get_close_matches(name, known, n=2) or get_close_matches(name.split("/")[-1], known, n=2)
    near = [known[short] for short in near] + get_close_matches(name, folders, n=1, cutoff=0.8)
    near = [other for other in dict.fromkeys(near) if other != name]
    return f"; did you mean {' or '.join(near)}?" if near else ""


@contextmanager
def _hide_progress_bars() -> Iterator[None]:
    """Show no progress bars of the hub's libraries within the context."""
    import datasets
    import huggingface_hub

    libraries: tuple[Any, ...] = (datasets.utils, huggingface_hub.utils)
    enabled = [library for library in libraries if not library.are_progress_bars_disabled()]
    for library in enabled:
        library.disable_progress_bars()
    try:
        yield
    finally:
        for library in enabled:
            library.enable_progress_bars()
