"""Nothing of a data set is left out in silence: it is read, listed as not used, or refused by name."""

import json
import os
import struct
import zlib
from io import BytesIO
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from atmc.commands import run as runs
from atmc.commands.config import parse
from atmc.data import load_data

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)


def write_images(root, *folders, n=4):
    for folder in folders:
        os.makedirs(os.path.join(root, folder))
        for i in range(n):
            Image.fromarray(PIXELS + i).save(os.path.join(root, folder, f"{i}.png"))
    return str(root)


def write_table(path, n, names=None):
    buffer = BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    table = pa.table({"image": [{"bytes": buffer.getvalue(), "path": None}] * n, "label": [i % 2 for i in range(n)]})
    features = {"label": {"names": names}} if names else {}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)


SPLITS = ("train/a", "train/b", "test/a", "test/b")


def count(root):
    data = load_data(str(root))
    return len(data.train) + len(data.val), len(data.test)


def test_images_in_folders_of_a_class(tmp_path):
    assert count(write_images(tmp_path, *SPLITS, "train/b/images", "train/a/x/y")) == (16, 8)


def test_images_with_suffixes_in_capitals_and_rare_ones(tmp_path):
    write_images(tmp_path, *SPLITS)
    Image.fromarray(PIXELS).save(tmp_path / "train" / "a" / "5.PNG")
    for name in ("5.jfif", "5.jpe"):
        Image.fromarray(PIXELS).save(tmp_path / "train" / "a" / name, "JPEG")
    assert count(tmp_path) == (11, 8)


def test_notes_hidden_files_and_those_of_systems_are_no_images(tmp_path):
    write_images(tmp_path, *SPLITS, "__MACOSX/train/a", ".git/test")
    for name in ("readme.txt", "boxes.csv", "Thumbs.db", "desktop.ini", ".DS_Store", "._0.png"):
        (tmp_path / "train" / "a" / name).write_text("no image")
    (tmp_path / "test" / "labels.csv").write_text("no image")
    assert count(tmp_path) == (8, 8)
    assert load_data(str(tmp_path)).unused == ()


def test_links_are_followed(tmp_path):
    write_images(tmp_path, *SPLITS)
    (tmp_path / "train" / "a" / "link.png").symlink_to(tmp_path / "train" / "a" / "0.png")
    assert count(tmp_path) == (9, 8)


def write_text(root, name):
    (root / name).write_text("text")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda root: write_images(root, "training/a", "training/b"), "two folders of the split train: .*train and "),
        (lambda root: write_images(root, "val/a", "valid/a"), "two folders of the split validation"),
        (lambda root: write_text(root, "train/a/1.heic"), r"images of a known format.*, got .*1\.heic$"),
        (lambda root: [write_text(root, f"train/a/{i}.npy") for i in range(3)], r"got .*0\.npy and 2 more"),
        (lambda root: write_text(root, "train/a/noname"), "images of a known format.*noname"),
        (lambda root: Image.fromarray(PIXELS).save(root / "train" / "0.png"), "every image in the folder of its class"),
        (lambda root: [(root / s / "c").mkdir() for s in ("train", "test")], "the class c has no images in .*train"),
        (lambda root: (root / "train/a/link.png").symlink_to(root / "nowhere"), "cannot read the image in .*link.png"),
    ],
)
def test_refused_folders(tmp_path, change, sentence):
    write_images(tmp_path, *SPLITS)
    change(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        load_data(str(tmp_path))


def test_other_folders_and_files_with_images_are_listed(tmp_path):
    write_images(tmp_path, *SPLITS, "unlabeled/x", "docs")
    assert load_data(str(tmp_path)).unused == ("docs", "unlabeled")


def test_other_splits_of_tables_are_listed_and_said(tmp_path):
    for name in ("train-00000-of-00001", "test", "extra-00000-of-00001"):
        write_table(tmp_path / f"{name}.parquet", 6)
    assert load_data(str(tmp_path)).unused == ("extra-00000-of-00001.parquet",)
    settings = {"model": "resnet18", "data": str(tmp_path), "threat": "linf:0.1", "ratio": 0.1}
    _, note = islice(runs.run(parse(settings), tmp_path / "out"), 2)
    assert note.text == f"not used of {tmp_path}: extra-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["train-00000-of-00002"], "has 1 of 2 files: train-00001-of-00002.parquet is missing"),
        (["train-00001-of-00003", "train-00002-of-00003"], "has 2 of 3 files: train-00000-of-00003.parquet is missing"),
        (["train-00000-of-00001", "train-00000-of-00002"], "several kinds for the split train"),
        (["train-00000-of-00001", "train"], "several kinds for the split train"),
    ],
)
def test_a_missing_file_of_a_split(tmp_path, files, sentence):
    for name in [*files, "test"]:
        write_table(tmp_path / f"{name}.parquet", 4)
    with pytest.raises(ValueError, match=sentence):
        load_data(str(tmp_path))


def test_all_files_of_a_split(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_table(tmp_path / f"{name}.parquet", 4)
    for name in ("train/0000", "train/0001", "test/0000"):
        write_table(tmp_path / "converted" / f"{name}.parquet", 4)
    assert count(tmp_path / "converted") == (8, 4)
    with pytest.raises(ValueError, match="several sets with a split"):
        load_data(str(tmp_path))


def png16(color, channels):
    """Return a PNG of 16 bits per channel."""
    rows = np.random.default_rng(0).integers(0, 4096, (8, 8 * channels)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, color, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def frames(kind):
    buffer = BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, save_all=True, append_images=[Image.fromarray(PIXELS + 1)])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("gray.png", png16(0, 1), "at most 8 bits per channel"),
        ("rgb.png", png16(2, 3), "at most 8 bits per channel"),
        ("gray-alpha.png", png16(4, 2), "at most 8 bits per channel"),
        ("rgba.png", png16(6, 4), "at most 8 bits per channel"),
        ("deep.ppm", b"P6 8 8 4095\n" + b"\x0f\x01" * 192, "at most 8 bits per channel"),
        ("plain.ppm", b"P3 1 1 1000\n 1 2 3\n", "at most 8 bits per channel"),
        ("moving.gif", frames("GIF"), "expected one image, got a file of 2"),
        ("pages.tif", frames("TIFF"), "expected one image, got a file of 2"),
    ],
)
def test_files_that_hold_more_than_is_read(tmp_path, name, data, sentence):
    write_images(tmp_path, *SPLITS)
    (tmp_path / "train" / "a" / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: expected.*{sentence.removeprefix('expected ')}"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"\x1b[31m", "right\u202eto left".encode()])
def test_class_folders_with_unprintable_names(tmp_path, name):
    write_images(tmp_path, *SPLITS)
    for split in (b"train", b"test"):
        os.rename(os.path.join(os.fsencode(tmp_path), split, b"b"), os.path.join(os.fsencode(tmp_path), split, name))
    with pytest.raises(ValueError, match="expected names of classes in printable Unicode"):
        load_data(str(tmp_path))


def test_class_names_of_a_table_that_are_no_text(tmp_path):
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", 4, names=["a", "b\udce9"])
    with pytest.raises(ValueError, match="expected names of classes in printable Unicode"):
        load_data(str(tmp_path))
