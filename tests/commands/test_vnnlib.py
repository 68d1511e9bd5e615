"""`atmc export --to vnnlib`: read back by a parser of its own, the properties are those that `atmc verify` decides."""

import csv
import sys
from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
from command_line import call, expect_refusal
from small_networks import HIDDEN, train_on_digits

import atmc
from atmc.deploy.export import onnx_export
from atmc.deploy.export.vnnlib_export import to_vnnlib

EPS = 0.03
EXPORT = ["export", "net.atmc", "--to", "vnnlib", "--data", "digits", "--model", "vnnlib_models:build"]


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """Make a folder with a small trained network of the digits, net.atmc, and its class."""
    folder = tmp_path_factory.mktemp("vnnlib")
    (folder / "vnnlib_models.py").write_text(HIDDEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        import vnnlib_models

        model = train_on_digits(vnnlib_models.build(10))
        atmc.save(model, "net.atmc", input_shape=(1, 28, 28), threat=f"linf:{EPS}")
        atmc.save(model, "silent.atmc", input_shape=(1, 28, 28))
        with torch.no_grad():
            model[3].bias[(atmc.load_data("digits").test.labels[0] + 1) % 10] += 1e6
        atmc.save(model, "wrong.atmc", input_shape=(1, 28, 28))
        yield folder
    sys.modules.pop("vnnlib_models", None)


def parse(text: str) -> list:
    """Parse S-expressions into nested lists; a semicolon begins a comment."""
    lines = [line.split(";")[0] for line in text.splitlines()]
    stack: list[list] = [[]]
    for token in " ".join(lines).replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            stack.append([])
        elif token == ")":
            stack[-2].append(stack.pop())
        else:
            stack[-1].append(token)
    (expressions,) = stack
    return expressions


class Property:
    """A property: its box, lists of exact numbers, and the pairs (j, y) of which Y_j >= Y_y is a counterexample."""

    def __init__(self, text: str) -> None:
        self.declared = {"X": 0, "Y": 0}
        self.lower: dict[int, Fraction] = {}
        self.upper: dict[int, Fraction] = {}
        self.pairs: list[tuple[int, int]] = []
        for expression in parse(text):
            match expression:
                case ["declare-const", name, "Real"]:
                    letter, index = name.split("_")
                    assert int(index) == self.declared[letter]
                    self.declared[letter] += 1
                case ["assert", ["<=" | ">=" as relation, name, value]] if name.startswith("X_"):
                    ends = self.upper if relation == "<=" else self.lower
                    assert int(name[2:]) not in ends
                    ends[int(name[2:])] = Fraction(value)
                case ["assert", ["or", *cases]]:
                    for case in cases:
                        ((relation, one, other),) = case[1:]
                        assert (case[0], relation, one[:2], other[:2]) == ("and", ">=", "Y_", "Y_")
                        self.pairs.append((int(one[2:]), int(other[2:])))
                case _:
                    raise AssertionError(expression)

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the box as float64."""
        return tuple(np.array([float(ends[i]) for i in range(self.declared["X"])]) for ends in (self.lower, self.upper))

    def is_violated(self, logits: np.ndarray) -> np.ndarray:
        """Return (n,) bool: which logits (n, classes) are those of a counterexample."""
        return np.stack([logits[:, j] >= logits[:, y] for j, y in self.pairs]).any(0)


def test_what_is_written_is_what_verify_decides(here, capsys):
    """No point of a certified image's box is a counterexample; the image that broke another one is."""
    assert call(*EXPORT, "--out", "all", "--n", 60, "--time-per-image", 12.5) == 0
    printed = capsys.readouterr().out
    data = atmc.load_data("digits").test
    model = atmc.load("net.atmc", factory=sys.modules["vnnlib_models"].build)
    result = atmc.verify(model, data, threat=f"linf:{EPS}", n=60)
    right = [row for row, stage in enumerate(result.decided_by) if stage != "clean"]
    assert 40 < len(right) < 60
    names = [f"image-{row:05d}.vnnlib" for row in right]
    with open("all/instances.csv", newline="") as file:
        assert list(csv.reader(file)) == [["model.onnx", name, "12.5"] for name in names]
    assert {path.name for path in (here / "all").iterdir()} == {"model.onnx", "instances.csv", *names}
    assert f"  {len(right)} properties, " in printed
    assert f"  {60 - len(right)} of the first 60 images are wrong without an attack and left out" in printed
    network = (here / "all" / "model.onnx").read_bytes()
    shapes = [
        [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for graph in [onnx.load_from_string(network).graph]
        for value in (*graph.input, *graph.output)
    ]
    assert shapes == [[1, 1, 28, 28], [1, 10]]
    run, rng, checked = onnx_export.open_runtime(network), np.random.default_rng(0), {"certified": 0, "broken": 0}
    for row, name in zip(right, names, strict=True):
        image, label = data.float_pixels([row])[0].numpy(), int(data.labels[row])
        prop = Property((here / "all" / name).read_text())
        assert prop.declared == {"X": 784, "Y": 10}
        assert sorted(prop.pairs) == [(j, label) for j in range(10) if j != label]
        low, high = prop.ends()
        verdict = result.verdicts[row]
        if verdict == "certified":
            corners = rng.random((30, 784)) < 0.5
            images = np.where(corners, low, high)
        elif verdict == "broken":
            images = result.examples.adv[row].double().numpy().reshape(1, -1)
            assert (low - 1e-7 <= images).all()  # an attack rounds to float32
            assert (images <= high + 1e-7).all()
        else:
            continue
        logits = np.concatenate([run(one.reshape(1, *image.shape)) for one in images.astype(np.float32)])
        assert prop.is_violated(logits).all() == prop.is_violated(logits).any() == (verdict == "broken")
        checked[verdict] += 1
    assert min(checked.values()) >= 5


@pytest.mark.parametrize("eps", [0.2, 1e-9, 76 / 255, 1 / 3, 1.0])
def test_the_box_is_rounded_outward(eps):
    pixels = [0.0, 1.0, 0.1, 0.5, 1 / 3, 1e-30, 1 - 2.0**-24, 0.7]
    image = np.array(pixels, np.float32).reshape(2, 2, 2)
    prop = Property(to_vnnlib(image, 2, eps, 4, comments=["two\nlines"]))
    assert prop.pairs == [(0, 2), (1, 2), (3, 2)]
    for i, pixel in enumerate(image.ravel().tolist()):
        low, high = Fraction(pixel) - Fraction(eps), Fraction(pixel) + Fraction(eps)
        assert max(low, 0) >= prop.lower[i] > low - Fraction(1, 10**12) or prop.lower[i] == 0 >= low
        assert min(high, 1) <= prop.upper[i] < high + Fraction(1, 10**12) or prop.upper[i] == 1 <= high
        assert 0 <= prop.lower[i] <= prop.upper[i] <= 1


def test_images_that_are_wrong_and_an_earlier_export(here, capsys):
    assert call(*EXPORT, "--out", "few", "--n", 8, "--with-wrong") == 0
    assert "left out" not in capsys.readouterr().out
    assert len((here / "few" / "instances.csv").read_text().splitlines()) == 8
    assert (here / "few" / "instances.csv").read_text().startswith("model.onnx,image-00000.vnnlib,60\n")
    before = {path.name: path.read_bytes() for path in (here / "few").iterdir()}
    assert "few/model.onnx exists: add --overwrite" in expect_refusal(capsys, *EXPORT, "--out", "few", "--n", 2)
    assert {path.name: path.read_bytes() for path in (here / "few").iterdir()} == before
    assert call(*EXPORT, "--out", "few", "--n", 2, "--overwrite", "--with-wrong", "--threat", "linf:0.1") == 0
    names = {path.name for path in (here / "few").iterdir()}
    assert names == {"model.onnx", "instances.csv", "image-00000.vnnlib", "image-00001.vnnlib"}
    assert "linf:0.1" in (here / "few" / "image-00000.vnnlib").read_text()
    (here / "few" / "model.onnx").unlink()
    (here / "few" / "instances.csv").unlink()
    assert "image-00000.vnnlib exists: add --overwrite" in expect_refusal(capsys, *EXPORT, "--out", "few")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threat", "l2:0.5"], "proofs exist for linf only, got l2:0.5"),
        (["--threat", "linf:8"], "is linf:8/255 meant?"),
        (["--time-per-image", 0], "expected a finite time per image > 0 seconds, got 0"),
        (["--n", 0], "expected n >= 1, got 0"),
        (["--out", "net.atmc"], "net.atmc is a file: properties are written into a folder"),
        (["--out", "none/new"], "there is no folder none to write new into"),
        (["--data", None], "properties are of images: add --data"),
        (["--to", "onnx", "--with-wrong"], "--time-per-image and --with-wrong are for vnnlib, the format is onnx"),
        (["--to", "c", "--time-per-image", 5], "--time-per-image and --with-wrong are for vnnlib, the format is c"),
    ],
)
def test_refusals(here, capsys, options, message):
    command = [*EXPORT, "--out", "new"]
    if options[-1] is None:
        position = command.index(options[0])
        del command[position : position + 2]
    else:
        command += options
    before = set(here.iterdir())
    assert message in expect_refusal(capsys, *command)
    assert set(here.iterdir()) == before


def test_models_without_a_threat_or_a_right_answer(here, capsys):
    command = ["export", "silent.atmc", *EXPORT[2:], "--out", "new"]
    assert "silent.atmc names no threat: add --threat" in expect_refusal(capsys, *command)
    command = ["export", "wrong.atmc", *EXPORT[2:], "--out", "new", "--threat", "linf:0.1"]
    message = expect_refusal(capsys, *command, "--n", 1)
    assert "wrong.atmc gets all of the first 1 images wrong: add --with-wrong, or raise --n" in message
    assert not (here / "new").exists()


def test_values_that_make_no_property():
    with pytest.raises(ValueError, match="expected a label from 0 to 1, got 2"):
        to_vnnlib(np.zeros((1, 1, 1), np.float32), 2, 0.1, 2)
    for pixel in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match=r"expected pixels in \[0, 1\]"):
            to_vnnlib(np.full((1, 1, 1), pixel, np.float32), 0, 0.1, 2)
