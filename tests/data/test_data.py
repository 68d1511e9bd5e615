"""Data sets: layouts, the fixed splits, keyed augmentation, every source of images, every error."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from atmc.data import Data, Images, as_images, batch_count, batches, load_data
from atmc.data.augment import augment

PALETTE = [0, 0, 0, 255, 0, 0, 0, 255, 0]  # black, red, green


def keys(images: Images) -> list[bytes]:
    """Return the bytes of each image, which tell the images of a set apart."""
    return [image.numpy().tobytes() for image in images.pixels]


def gray(n: int, start: int = 0, size: int = 4) -> list[Image.Image]:
    """Build n gray images; number i has the constant level start + i."""
    return [Image.new("L", (size, size), start + i) for i in range(n)]


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[Image.Image | bytes | None],
    labels: Sequence[object],
    *,
    label: str = "label",
    image: str = "image",
    names: Sequence[str] | None = None,
    **more: Any,
) -> None:
    """Write a file in the hub's layout: a struct of an image file's bytes and path, a label, features as metadata."""
    cells = [None if x is None else {"bytes": x if isinstance(x, bytes) else encode(x), "path": None} for x in images]
    table = pa.table(
        {
            image: pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            label: pa.array(labels),
        }
        | more
    )
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def write_pair(folder: Path, **options: Any) -> str:
    """Write 20 training and 4 test images, gray, 4x4, of 2 classes, and return their folder."""
    write_parquet(folder / "train-00000-of-00001.parquet", gray(20), [0, 1] * 10, **options)
    write_parquet(folder / "test-00000-of-00001.parquet", gray(4, 100), [0, 1] * 2, **options)
    return str(folder)


def levels(images: Images) -> list[int]:
    """Return the level of each constant image."""
    return images.pixels[:, 0, 0, 0].tolist()


class TestDigits:
    def test_every_pixel_is_tripled_inside_a_border_of_zero(self, digits: Data) -> None:
        for images in (digits.train, digits.val, digits.test):
            assert images.pixels.dtype == torch.uint8
            inner = images.pixels[:, :, 2:-2, 2:-2]
            assert images.pixels.sum() == inner.sum()  # nothing in the border
            small = inner[:, 0, 1::3, 1::3]
            assert torch.equal(inner[:, 0], small.repeat_interleave(3, 1).repeat_interleave(3, 2))
        assert digits.input_shape == (1, 28, 28)
        assert (digits.num_classes, digits.class_names) == (10, tuple("0123456789"))

    def test_splits_hold_each_of_scikit_learns_images_once_with_its_label(self, digits: Data) -> None:
        values, labels = load_digits(return_X_y=True)
        expected = {np.rint(v * 255 / 16).astype(np.uint8).tobytes(): y for v, y in zip(values, labels, strict=True)}
        served = {}
        for images in (digits.train, digits.val, digits.test):
            for image, label in zip(images.pixels[:, 0, 3:-2:3, 3:-2:3], images.labels.tolist(), strict=True):
                served[image.numpy().tobytes()] = label
        assert len(expected) == 1797
        assert served == expected
        assert len(digits.train) + len(digits.val) + len(digits.test) == 1797

    def test_splits_are_stratified(self, digits: Data) -> None:
        total = torch.bincount(torch.as_tensor(load_digits().target)).double()
        in_test = torch.bincount(digits.test.labels)
        assert in_test.sum() == 360
        assert ((in_test - total * 360 / 1797).abs() < 1).all()
        in_val = torch.bincount(digits.val.labels)
        assert in_val.sum() == 143  # a tenth of 1437
        assert ((in_val - (total - in_test) * 143 / 1437).abs() < 1).all()

    def test_no_seed_moves_the_splits(self, digits: Data) -> None:
        np.random.seed(5)
        torch.manual_seed(5)
        again = load_data("digits")
        for one, other in ((digits.train, again.train), (digits.val, again.val), (digits.test, again.test)):
            assert torch.equal(one.pixels, other.pixels)
            assert torch.equal(one.labels, other.labels)

    def test_splits_stay_as_published(self, digits: Data) -> None:
        """Recorded once: figures of different versions are comparable only while these stay."""
        assert [zlib.crc32(x.pixels.numpy().tobytes()) for x in (digits.val, digits.test)] == [240057904, 3052875993]

    def test_limit_takes_nested_parts_of_train_only(self, digits: Data) -> None:
        small, large = load_data("digits", limit=50), load_data("digits", limit=200)
        assert (len(small.train), len(large.train)) == (50, 200)
        assert set(keys(small.train)) < set(keys(large.train)) < set(keys(digits.train))
        assert torch.equal(small.val.pixels, digits.val.pixels)
        assert torch.equal(small.test.pixels, digits.test.pixels)
        assert torch.equal(load_data("digits", limit=1294).train.pixels, digits.train.pixels)
        assert len(set(small.train.labels.tolist())) > 5  # not simply the first by class

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="expected limit >= 1, got 0"):
            load_data("digits", limit=0)
        with pytest.raises(ValueError, match="digits has no columns"):
            load_data("digits", label_column="label")


class TestImages:
    def test_float_pixels_are_the_nearest_floats(self) -> None:
        images = Images(torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1), torch.zeros(256, dtype=torch.int64))
        wanted = np.arange(256, dtype=np.float32) / np.float32(255)
        assert np.array_equal(images.float_pixels(slice(None)).flatten().numpy(), wanted)
        assert images.float_pixels([255, 0]).flatten().tolist() == [1.0, 0.0]
        floats = Images(torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64))
        assert torch.equal(floats.float_pixels(torch.tensor([2])), floats.pixels[2:])

    @pytest.mark.parametrize("indices", [[4, 1], (4, 1), np.array([4, 1]), torch.tensor([4, 1])])
    def test_take(self, indices: Any) -> None:
        images = Images(torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), torch.arange(5))
        assert images.take(indices).labels.tolist() == [4, 1]
        assert levels(images.take(indices)) == [4, 1]
        assert levels(images.take(slice(1, 3))) == [1, 2]
        assert len(images.take([])) == 0
        assert images.to("cpu").labels.tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("pixels", "labels", "message"),
        [
            (torch.zeros(2, 3, 3), torch.zeros(2).long(), r"expected pixels \(n, c, h, w\).*\(2, 3, 3\)"),
            (torch.zeros(2, 1, 3, 3), torch.zeros(3).long(), r"expected pixels.*\(3,\)"),
            (torch.zeros(2, 1, 3, 3).double(), torch.zeros(2).long(), "float64"),
            (torch.zeros(2, 1, 3, 3), torch.zeros(2), "int64 labels"),
        ],
    )
    def test_refusals(self, pixels: Tensor, labels: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Images(pixels, labels)

    def test_mean_and_std_of_each_channel(self) -> None:
        labels = torch.tensor([0, 1])
        pixels = torch.tensor([[0, 51, 255], [255, 51, 204]], dtype=torch.uint8).view(2, 3, 1, 1).expand(2, 3, 2, 5)
        for train in (Images(pixels, labels), Images(pixels.float() / 255, labels)):
            data = Data(name="hand-made", train=train, val=train, test=train, num_classes=2, class_names=("0", "1"))
            assert data.mean == (0.5, 0.2, 0.9)
            assert data.std == (0.5, 0.001, 0.1)  # a constant channel is not divided by 0


class TestParquet:
    def test_hub_layout(self, tmp_path: Path) -> None:
        data = load_data(write_pair(tmp_path, names=("cat", "dog")))
        assert (data.num_classes, data.class_names, data.input_shape) == (2, ("cat", "dog"), (1, 4, 4))
        assert (len(data.train), len(data.val)) == (18, 2)
        assert sorted(levels(data.train) + levels(data.val)) == list(range(20))
        assert data.val.labels.sort().values.tolist() == [0, 1]
        assert levels(data.test) == [100, 101, 102, 103]
        for images in (data.train, data.val, data.test):
            assert [level % 2 for level in levels(images)] == images.labels.tolist()
        assert data.name == str(tmp_path)

    def test_shards_in_a_subfolder_are_read_in_order(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", gray(5, 5), [0] * 5)
        write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", gray(5), [1] * 5)
        write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", gray(1, 99), [0])
        write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", gray(1, 98), [0])
        write_parquet(tmp_path / "data" / "extra-00000-of-00001.parquet", gray(1, 97), [0])
        write_parquet(tmp_path / ".cache" / "train-00000-of-00001.parquet", gray(1, 96), [0])
        data = load_data(str(tmp_path))
        assert levels(data.train) == list(range(10))
        assert data.train.labels.tolist() == [1] * 5 + [0] * 5
        assert (levels(data.val), levels(data.test)) == ([98], [99])
        assert data.class_names == ("0", "1")

    def test_validation_is_used_for_a_missing_test_split(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "train" / "0000.parquet", gray(20), [0, 1] * 10)
        write_parquet(tmp_path / "validation" / "0000.parquet", gray(1, 99), [0])
        data = load_data(str(tmp_path))
        assert (len(data.train), len(data.val), levels(data.test)) == (18, 2, [99])

    def test_validation_split_is_stratified_capped_and_fixed(self, tmp_path: Path) -> None:
        labels = [0] * 30 + [1] * 70
        write_parquet(tmp_path / "train.parquet", gray(100), labels)
        write_parquet(tmp_path / "test.parquet", gray(1), [0])
        data = load_data(str(tmp_path))
        assert torch.bincount(data.val.labels).tolist() == [3, 7]
        assert torch.bincount(data.train.labels).tolist() == [27, 63]
        assert levels(load_data(str(tmp_path), limit=9).val) == levels(data.val)
        write_parquet(tmp_path / "test.parquet", gray(3), [1, 0, 1])
        assert levels(load_data(str(tmp_path)).val) == levels(data.val)

    def test_at_most_5000_validation_images(self, tmp_path: Path) -> None:
        dot = encode(Image.new("L", (1, 1)))
        write_parquet(tmp_path / "train.parquet", [dot] * 50_010, [0, 1] * 25_005)
        write_parquet(tmp_path / "test.parquet", [dot], [0])
        data = load_data(str(tmp_path))
        assert torch.bincount(data.val.labels).tolist() == [2500, 2500]
        assert len(data.train) == 45_010

    def test_label_columns(self, tmp_path: Path) -> None:
        more = {"coarse_label": pa.array([3] * 20), "label_2": pa.array([1.5] * 20)}
        for split in ("train", "test"):
            write_parquet(tmp_path / f"{split}.parquet", gray(20), [0, 1] * 10, label="fine_label", **more)
        assert load_data(str(tmp_path)).num_classes == 2
        assert load_data(str(tmp_path), label_column="coarse_label").num_classes == 4
        with pytest.raises(ValueError, match="expected integers in the label column label_2 of train, got double"):
            load_data(str(tmp_path), label_column="label_2")
        with pytest.raises(ValueError, match=r"no label column colour .* of: image, fine_label, coarse_label, label_2"):
            load_data(str(tmp_path), label_column="colour")

    def test_image_columns(self, tmp_path: Path) -> None:
        second = pa.array([{"bytes": encode(x), "path": "x"} for x in gray(20, 50)])
        for split in ("train", "test"):
            write_parquet(tmp_path / f"{split}.parquet", gray(20), [0, 1] * 10, image="img", mask=second)
        with pytest.raises(ValueError, match="several image columns, name one by image_column: img, mask"):
            load_data(str(tmp_path))
        assert levels(load_data(str(tmp_path), image_column="mask").test) == list(range(50, 70))
        with pytest.raises(ValueError, match="one of the image columns img, mask, got label"):
            load_data(str(tmp_path), image_column="label")

    def test_a_binary_column_declared_as_image_is_one(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            table = pa.table({"picture": [encode(x) for x in gray(4)], "label": [0, 1, 0, 1]})
            features = {"picture": {"_type": "Image"}, "label": {"_type": "Value", "dtype": "int64"}}
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{split}.parquet")
        assert levels(load_data(str(tmp_path)).test) == [0, 1, 2, 3]

    def test_modes(self, tmp_path: Path) -> None:
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette(PALETTE)
        images = [
            Image.new("L", (4, 4), 7),
            Image.new("RGB", (4, 4), (1, 2, 3)),
            palette,
            Image.new("RGBA", (4, 4), (4, 5, 6, 0)),
            Image.new("1", (4, 4), 1),
            Image.new("LA", (4, 4), (9, 0)),
        ]
        write_parquet(tmp_path / "train.parquet", gray(4), [0, 1, 0, 1])
        write_parquet(tmp_path / "test.parquet", images, [0, 1] * 3)
        data = load_data(str(tmp_path))
        wanted = [[7, 7, 7], [1, 2, 3], [255, 0, 0], [4, 5, 6], [255, 255, 255], [9, 9, 9]]
        assert data.test.pixels[:, :, 3, 1].tolist() == wanted
        assert data.input_shape == (3, 4, 4)  # gray train images became RGB with the others
        assert (data.train.pixels == data.train.pixels[:, :1]).all()
        assert sorted(levels(data.train) + levels(data.val)) == [0, 1, 2, 3]

    def test_orientation_is_applied(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        turned = encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
        for split in ("train", "test"):
            write_parquet(tmp_path / f"{split}.parquet", [turned] * 2, [0, 0])
        assert load_data(str(tmp_path)).input_shape == (3, 8, 4)

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            ([*gray(3), encode(gray(1)[0])[:45]], [0, 1, 0, 1], "cannot read the image in row 3 of train"),
            ([*gray(2), b"GIF?", *gray(1)], [0, 1, 0, 1], "cannot read the image in row 2 of train"),
            ([*gray(3), None], [0, 1, 0, 1], "expected an image in row 3 of train, got none"),
            ([*gray(3), *gray(1, size=5)], [0, 1, 0, 1], "one size, got 4x4 and, in row 3 of train, 5x5"),
            ([*gray(3), Image.new("I;16", (4, 4))], [0, 1, 0, 1], "row 3 of train: expected at most 8 bits.*I;16"),
            (gray(4), [0, 1, -1, 1], "expected labels >= 0, got -1 in row 2 of train"),
            (gray(4), ["a", "b", "c", "d"], "expected integers in the label column label of train, got string"),
            (gray(4), [0, 1, None, 1], "expected integers .* got int64, 1 of them missing"),
            (gray(4), [0, 1, 2**40, 1], "expected labels below 65536 .*which names no classes"),
            ([], pa.array([], pa.int64()), "the split train is empty"),
            (gray(1), [1], "expected at least 2 training images, got 1"),
        ],
    )
    def test_refused_rows(self, tmp_path: Path, images: list[Any], labels: Any, message: str) -> None:
        write_pair(tmp_path)
        write_parquet(tmp_path / "train-00000-of-00001.parquet", images, labels)
        with pytest.raises(ValueError, match=message):
            load_data(str(tmp_path))

    def test_refused_sets(self, tmp_path: Path) -> None:
        write_pair(tmp_path, names=("cat", "dog"))
        test = tmp_path / "test-00000-of-00001.parquet"
        write_parquet(test, gray(3), [0, 1, 2], names=("cat", "dog"))
        with pytest.raises(ValueError, match=r"expected labels in 0 \.\. 1, got 2 in row 2 of test"):
            load_data(str(tmp_path))
        write_parquet(test, gray(3), [0, 1, 0], names=("cat", "cow"))
        with pytest.raises(ValueError, match="same classes in train and test, got cat, dog and cat, cow"):
            load_data(str(tmp_path))
        write_parquet(test, gray(3, size=6), [0, 1, 0], names=("cat", "dog"))
        with pytest.raises(ValueError, match=r"one size in .*, got 4x4 in train and 6x6 in test"):
            load_data(str(tmp_path))
        test.write_bytes(b"PAR1, but not really")
        with pytest.raises(ValueError, match=r"cannot read the parquet file .*test-00000"):
            load_data(str(tmp_path))
        test.unlink()
        with pytest.raises(ValueError, match=r"expected the splits train and test in .*, found train$"):
            load_data(str(tmp_path))

    def test_labels_beyond_those_of_train(self, tmp_path: Path) -> None:
        write_pair(tmp_path)
        write_parquet(tmp_path / "test-00000-of-00001.parquet", gray(2), [0, 5])
        with pytest.raises(ValueError, match=r"expected labels in 0 \.\. 1, got 5 in row 1 of test"):
            load_data(str(tmp_path))

    def test_refused_files(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a" / "train-0.parquet", gray(2), [0, 1])
        write_parquet(tmp_path / "b" / "train-0.parquet", gray(2), [0, 1])
        with pytest.raises(ValueError, match=r"several sets with a split train, name the folder of one: .*a, .*b"):
            load_data(str(tmp_path))
        write_parquet(tmp_path / "c" / "rows.parquet", gray(2), [0, 1])
        with pytest.raises(ValueError, match=r"expected files named train-\*.parquet .*, got rows.parquet"):
            load_data(str(tmp_path / "c"))
        with pytest.raises(ValueError, match="expected a folder or a hub id, got the file"):
            load_data(str(tmp_path / "c" / "rows.parquet"))
        write_parquet(tmp_path / "a" / "train-1.parquet", gray(2), [0, 1], label="other")
        with pytest.raises(ValueError, match=r"expected the same columns in .*train-0.parquet and .*train-1.parquet"):
            load_data(str(tmp_path / "a"))

    def test_no_image_column(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / f"{split}.parquet")
        with pytest.raises(ValueError, match="found no image column, the columns are: text, label"):
            load_data(str(tmp_path))


class TestImageFolder:
    def write(self, root: Path) -> str:
        for split, start in (("train", 0), ("test", 100)):
            for c, name in enumerate(("cat", "dog")):
                (root / split / name).mkdir(parents=True)
                for i, image in enumerate(gray(10, start + 10 * c)):
                    image.save(root / split / name / f"{i}.png")
        (root / "train" / "dog" / "notes.txt").write_text("no image")
        (root / "train" / ".hidden").mkdir()
        return str(root)

    def test_layout(self, tmp_path: Path) -> None:
        data = load_data(self.write(tmp_path))
        assert data.class_names == ("cat", "dog")
        assert (len(data.train), len(data.val)) == (18, 2)
        assert sorted(levels(data.test)) == list(range(100, 120))
        assert len(set(data.test.labels[:10].tolist())) == 2  # not by class, as the folders are
        assert [int(level >= 110) for level in levels(data.test)] == data.test.labels.tolist()
        assert sorted(levels(data.train) + levels(data.val)) == list(range(20))
        assert [level // 10 for level in levels(data.val)] == data.val.labels.tolist() == [0, 1]

    def test_val_folder_is_the_validation_split(self, tmp_path: Path) -> None:
        self.write(tmp_path)
        (tmp_path / "test").rename(tmp_path / "val")
        (tmp_path / "train").rename(tmp_path / "test")
        with pytest.raises(ValueError, match=r"expected the splits train and test in .*, found"):
            load_data(str(tmp_path))
        self.write(tmp_path / "more")
        (tmp_path / "more" / "train").rename(tmp_path / "train")
        data = load_data(str(tmp_path))
        assert (sorted(levels(data.val)), sorted(levels(data.test))) == (list(range(100, 120)), list(range(20)))
        assert len(data.train) == 20

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="found neither parquet files nor train/<class>/"):
            load_data(str(tmp_path))
        self.write(tmp_path)
        with pytest.raises(ValueError, match="an image folder has no columns"):
            load_data(str(tmp_path), image_column="image")
        gray(1, size=9)[0].save(tmp_path / "test" / "dog" / "0.png")
        with pytest.raises(ValueError, match=r"one size, got 4x4 and, in .*test/dog/0.png, 9x9"):
            load_data(str(tmp_path))
        (tmp_path / "test" / "dog" / "0.png").write_text("corrupt")
        with pytest.raises(ValueError, match=r"cannot read the image in .*test/dog/0.png"):
            load_data(str(tmp_path))
        (tmp_path / "test" / "dog" / "0.png").unlink()
        (tmp_path / "test" / "dog").rename(tmp_path / "test" / "cow")
        with pytest.raises(ValueError, match="same classes in train and test, got cat, dog and cat, cow"):
            load_data(str(tmp_path))
        for image in tmp_path.glob("test/*/*"):
            image.unlink()
        with pytest.raises(ValueError, match="the split test is empty"):
            load_data(str(tmp_path))


class TestHub:
    def hub_set(self, n: int, start: int = 0) -> datasets.Dataset:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
        return datasets.Dataset.from_dict({"image": gray(n, start), "label": [i % 2 for i in range(n)]}, features)

    def test_a_hub_id_with_a_configuration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        bars: Any = huggingface_hub.utils

        def loader(*args: object) -> datasets.DatasetDict:
            calls.append(args)
            assert datasets.utils.are_progress_bars_disabled()
            assert bars.are_progress_bars_disabled()
            parts = {"train": self.hub_set(20), "test": self.hub_set(4, 100), "extra": self.hub_set(2, 200)}
            return datasets.DatasetDict(parts)

        monkeypatch.setattr(datasets, "load_dataset", loader)
        data = load_data("someone/animals:small")
        assert calls == [("someone/animals", "small")]
        assert (data.class_names, levels(data.test)) == (("cat", "dog"), [100, 101, 102, 103])
        assert sorted(levels(data.train) + levels(data.val)) == list(range(20))
        assert not datasets.utils.are_progress_bars_disabled()
        load_data("someone/animals")
        assert calls[1] == ("someone/animals", None)

    def test_images_in_the_hubs_cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        paths = []
        for i, image in enumerate(gray(4)):
            paths.append(str(tmp_path / f"{i}.png"))
            image.save(paths[-1])
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        rows = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 0, 1]}, features)
        monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict({"train": rows, "test": rows}))
        assert levels(load_data("someone/folder").test) == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        "error",
        [
            ConnectionError("no route\nsecond line"),
            datasets.exceptions.DatasetNotFoundError("no route"),
            datasets.exceptions.DatasetGenerationError("no route"),
            RuntimeError("no route"),
            ValueError("no route"),
        ],
    )
    def test_an_error_of_the_hub_is_one_sentence(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def loader(*_: object) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", loader)
        message = "found no folder ylecun/mnst, .*the hub: no route; did you mean ylecun/mnist.?$"
        with pytest.raises(ValueError, match=message) as caught:
            load_data("ylecun/mnst")
        assert "\n" not in str(caught.value)
        assert not datasets.utils.are_progress_bars_disabled()

    def test_offline(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        with pytest.raises(
            ValueError, match=r"cannot load it from the hub: .*; did you mean uoft-cs/cifar100 or .*cifar10\?$"
        ):
            load_data("uoft-cs/cifar-100")

    @pytest.mark.parametrize(
        ("name", "near"),
        [("digit", "digits"), ("mnist", "ylecun/mnist"), ("cifar10", "uoft-cs/cifar10"), ("./mnist", "ylecun/mnist")],
    )
    def test_other_names_never_ask_the_hub(self, monkeypatch: pytest.MonkeyPatch, name: str, near: str) -> None:
        monkeypatch.setattr(datasets, "load_dataset", None)
        with pytest.raises(ValueError, match=f"found no data set {name}: no folder here.*did you mean {near}"):
            load_data(name)

    def test_a_folder_nearby_is_suggested(self, tmp_path: Path) -> None:
        (tmp_path / "flowers").mkdir()
        with pytest.raises(ValueError, match=f"did you mean {tmp_path / 'flowers'}"):
            load_data(str(tmp_path / "flower"))

    def test_a_folder_takes_precedence_over_the_hub(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(datasets, "load_dataset", None)
        monkeypatch.chdir(tmp_path)
        write_pair(tmp_path / "ylecun" / "mnist")
        assert len(load_data("ylecun/mnist").test) == 4


class MapStyle(Dataset[Any]):
    """A map-style dataset that, as many, never raises IndexError."""

    def __init__(self, images: Sequence[Any], labels: Sequence[Any]) -> None:
        self.pairs = list(zip(images, labels, strict=True))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> Any:
        return self.pairs[position % len(self.pairs)]


class Stream(IterableDataset[Any]):
    def __init__(self, pairs: Dataset[Any]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return (self.pairs[i] for i in range(len(self)))


class TestAsImages:
    x = (torch.arange(7 * 3 * 2 * 4) * 37 % 256).to(torch.uint8).view(7, 3, 2, 4)
    y = torch.tensor([3, 0, 1, 1, 2, 0, 3])

    def forms(self) -> dict[str, object]:
        x, y = self.x, self.y
        floats = x.float() / 255
        pillow = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in x]
        singles = MapStyle(list(floats), y.tolist())
        return {
            "tensors": (x, y),
            "list of tensors": [floats, y],
            "arrays": (x.numpy(), y.numpy()),
            "float64 array": (x.numpy() / 255, y.numpy().astype(np.uint8)),
            "a list of labels": (x, y.tolist()),
            "TensorDataset": TensorDataset(x, y),
            "map-style": singles,
            "Pillow": MapStyle(pillow, y.tolist()),
            "list of pairs": list(zip(x.numpy(), y.numpy(), strict=True)),
            "two labels' kinds": MapStyle(list(x), [torch.tensor(3), np.int64(0), 1, *y[3:].view(-1, 1)]),
            "iterable": Stream(singles),
            "generator": ((image, label) for image, label in zip(floats, y, strict=True)),
            "DataLoader": DataLoader(singles, batch_size=3),
            "DataLoader without batches": DataLoader(singles, batch_size=None),
            "DataLoader of a stream": DataLoader(Stream(singles), batch_size=4),
            "mixed": [(x[0], 3), (floats[1], 0), (x[2:], y[2:])],
            "images": Images(x, y),
            "float images": Images(floats, y),
        }

    def test_all_forms_agree(self) -> None:
        for name, form in self.forms().items():
            images = as_images(form)
            assert images.pixels.dtype == torch.uint8, name
            assert torch.equal(images.pixels, self.x), name
            assert torch.equal(images.labels, self.y), name

    def test_a_pair_of_pairs_is_a_dataset(self) -> None:
        assert as_images([(self.x[0], 5), (self.x[1], 6)]).labels.tolist() == [5, 6]

    def test_gray_pillow_images(self) -> None:
        images = as_images(list(zip(gray(3), [0, 1, 2], strict=True)))
        assert images.pixels.shape == (3, 1, 4, 4)
        assert levels(images) == [0, 1, 2]

    def test_a_shuffling_loader_is_read_once(self) -> None:
        loader = DataLoader(TensorDataset(self.x, torch.arange(7)), batch_size=2, shuffle=True)
        images = as_images(loader)
        assert sorted(images.labels.tolist()) == list(range(7))
        assert torch.equal(images.pixels, self.x[images.labels])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_other_floats_stay(self, dtype: torch.dtype) -> None:
        x = torch.tensor([0.0, 1.0, 0.5, 0.25], dtype=dtype).view(1, 1, 2, 2)
        images = as_images((x.requires_grad_(), [0]))
        assert images.pixels.dtype == torch.float32
        assert torch.equal(images.pixels, x.float())
        assert not images.pixels.requires_grad

    def test_one_part_that_stays_float_makes_all_float(self) -> None:
        images = as_images([(torch.ones(1, 1, 1), 0), (torch.full((1, 1, 1), 0.123), 1)])
        assert torch.equal(images.pixels.flatten(), torch.tensor([1.0, 0.123]))

    def test_nothing_is_shared_with_the_source(self) -> None:
        x = self.x.clone()
        images = as_images((x, self.y))
        x.zero_()
        assert torch.equal(images.pixels, self.x)

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.tensor([-0.5, 2.0]).view(2, 1, 1, 1), "found values from -0.5 to 2; normalization belongs"),
            (torch.tensor([0.0, 255.0]).view(2, 1, 1, 1), "found values from 0 to 255"),
            (torch.tensor([0.0, float("nan")]).view(2, 1, 1, 1), "not finite"),
            (torch.zeros(2, 5, 5), r"an image \(c, h, w\) with its label, or .* got images \(2, 5, 5\)"),
            (np.zeros((2, 8, 9, 3), np.uint8), r"expected channels before .* \(2, 8, 9, 3\): permute"),
            (np.zeros((2, 8, 9, 1), np.float32), "expected channels before"),
            (torch.zeros(2, 1, 5, 5).long(), r"expected images of uint8 or of floating point .*int64"),
            (np.zeros((2, 1, 5, 5), np.int32), "int32"),
            (torch.zeros(3, 1, 5, 5), r"got images \(3, 1, 5, 5\) and labels \(2,\)"),
            (torch.zeros(2, 5), r"images \(2, 5\)"),
        ],
    )
    def test_refused_images(self, x: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            as_images((x, torch.tensor([0, 1])))

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            ([-1, 0], "expected labels >= 0, got -1 in row 0 of the images given"),
            (torch.tensor([0.0, 1.0]), "expected integer labels, got torch.float32"),
            (np.array([0.0, 1.0]), "expected integer labels, got float64"),
            ([True, False], "expected integer labels, got bool"),
            (["cat", "dog"], "expected integer labels, got <U3"),
            (None, "expected integer labels, got object"),
            (torch.eye(2).long(), r"labels \(2, 2\)"),
        ],
    )
    def test_refused_labels(self, y: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            as_images((torch.zeros(2, 1, 5, 5), y))

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (3, "expected .*pairs.* got int"),
            ("digits", "expected .*pairs.* got str"),
            (torch.zeros(3, 1, 2, 2), "expected .*pairs.* got Tensor"),
            ({"image": 1}, "expected .*pairs.* got dict"),
            ([{"image": 1, "label": 2}], "got dict at position 0"),
            ([(1, 2, 3)], "got 3 values at position 0"),
            (TensorDataset(torch.zeros(3, 1, 2, 2)), "got 1 values at position 0"),
            ([], "expected at least one image"),
            ((torch.zeros(0, 1, 2, 2), torch.zeros(0).long()), "expected at least one image"),
            ([("path.png", 1)], "expected images of uint8 or of floating point .*got str"),
            ([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 3), 0)], r"one shape, got \(1, 2, 2\) and \(1, 2, 3\)"),
            ([(torch.zeros(2, 2), 0)], r"got images \(2, 2\)"),
            ([(Image.new("F", (2, 2)), 0)], "8 bits"),
        ],
    )
    def test_refused_sources(self, source: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            as_images(source)


@pytest.fixture
def ramp() -> Images:
    """Build 9 images of 2x6x7 pixels, with unique levels above zero in each image and channel."""
    pixels = torch.arange(1, 85).view(1, 2, 6, 7) + torch.arange(9).view(9, 1, 1, 1)
    return Images(pixels.to(torch.uint8), torch.arange(9) % 3)


class TestBatches:
    def test_an_epoch_serves_every_example_once(self, ramp: Images) -> None:
        served = list(batches(ramp, 4, seed=1, epoch=2))
        assert [len(batch.x) for batch in served] == [4, 5]
        index = torch.cat([batch.index for batch in served])
        assert sorted(index.tolist()) == list(range(9))
        for batch in served:
            assert batch.x.dtype == torch.float32
            assert torch.equal(batch.x, ramp.pixels[batch.index].float() / 255)
            assert torch.equal(batch.y, ramp.labels[batch.index])

    def test_order_depends_on_seed_and_epoch_only(self, ramp: Images) -> None:
        def order(**options: Any) -> list[int]:
            served = batches(ramp, **{"batch_size": 2, "seed": 0, "epoch": 0, **options})
            return [i for batch in served for i in batch.index.tolist()]

        assert order() == order(batch_size=9) == order(augment="crop-flip")
        assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9
        assert order(batch_size=4) == order()

    @given(st.integers(1, 40), st.integers(1, 45))
    @settings(deadline=None)
    def test_no_batch_of_one_beside_others(self, n: int, batch_size: int) -> None:
        images = Images(torch.zeros(n, 1, 1, 1), torch.zeros(n, dtype=torch.int64))
        sizes = [len(batch.x) for batch in batches(images, batch_size, seed=0, epoch=0)]
        assert sum(sizes) == n
        assert len(sizes) == batch_count(n, batch_size)
        assert set(sizes[:-1]) <= {batch_size}
        assert len(sizes) == 1 or batch_size == 1 or 2 <= sizes[-1] <= batch_size + 1

    def test_refusals_come_at_the_call(self, ramp: Images) -> None:
        with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
            batches(ramp, 0, seed=0, epoch=0)
        with pytest.raises(
            ValueError,
            match="unknown augmentation 'flop': expected one of none, crop, flip, crop-flip; did you mean 'flip'",
        ):
            batches(ramp, 1, seed=0, epoch=0, augment="flop")

    @pytest.mark.parametrize("name", ["crop", "flip", "crop-flip"])
    def test_an_example_is_augmented_alike_in_any_batch(self, ramp: Images, name: str) -> None:
        def by_index(batch_size: int, **options: Any) -> Tensor:
            served = list(batches(ramp, batch_size, **{"seed": 3, "epoch": 5, "augment": name, **options}))
            return torch.cat([b.x for b in served])[torch.cat([b.index for b in served]).argsort()]

        together = by_index(9)
        assert torch.equal(together, by_index(1))
        assert torch.equal(together, by_index(4))
        assert not torch.equal(together, by_index(9, seed=4))
        assert not torch.equal(together, by_index(9, epoch=6))
        floats = Images(ramp.float_pixels(slice(None)), ramp.labels)
        (batch,) = batches(floats, 9, seed=3, epoch=5, augment=name)
        assert torch.equal(together, batch.x[batch.index.argsort()])


class TestAugment:
    def test_flips_are_exact_and_even(self) -> None:
        x = torch.arange(12.0).view(1, 2, 2, 3).expand(1000, 2, 2, 3)
        out = augment(x, torch.arange(1000), name="flip", seed=0, epoch=0)
        kept = (out == x).flatten(1).all(1)
        mirrored = (out == x.flip(3)).flatten(1).all(1)
        assert (kept ^ mirrored).all()
        assert 400 < int(mirrored.sum()) < 600  # six standard deviations

    def test_crops_are_windows_of_the_padded_image(self) -> None:
        x = torch.arange(1.0, 85.0).view(1, 2, 6, 7).expand(2000, 2, 6, 7)
        out = augment(x, torch.arange(2000), name="crop", seed=0, epoch=0)
        padded = torch.zeros(2, 14, 15)
        padded[:, 4:10, 4:11] = x[0]
        windows = padded.unfold(1, 6, 1).unfold(2, 7, 1).permute(1, 2, 0, 3, 4).reshape(81, -1)
        same = (out.flatten(1)[:, None] == windows).all(2)
        assert (same.sum(1) == 1).all()
        assert (same.sum(0) > 0).all()  # each of the 9 x 9 windows occurs

    def test_crop_flip_is_the_crop_and_then_the_flip(self, ramp: Images) -> None:
        index = torch.arange(9)
        both = augment(ramp.pixels, index, name="crop-flip", seed=0, epoch=0)
        cropped = augment(ramp.pixels, index, name="crop", seed=0, epoch=0)
        assert torch.equal(both, augment(cropped, index, name="flip", seed=0, epoch=0))
        assert torch.equal(augment(ramp.pixels, index, name="none", seed=0, epoch=0), ramp.pixels)
