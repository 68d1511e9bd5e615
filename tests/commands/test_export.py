"""`atmc export`: what is written, what is compared, and what is refused in one sentence."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from command_line import call, expect_refusal
from safetensors import safe_open

import atmc
from atmc.commands import export as exports
from atmc.commands.checkpoints import load_weights
from atmc.core import files
from atmc.deploy.export import onnx_export

MODELS = """
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))

def bent(num_classes):
    net = build(num_classes)
    net[1] = nn.GELU()
    return net

def zeros(num_classes):
    net = build(num_classes)
    for value in net.parameters():
        nn.init.zeros_(value)
    return net
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Make a current folder with models to import, and model files: lenet.atmc, mine.atmc, bent.atmc."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "export_models.py").write_text(MODELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lenet = atmc.models.build("lenet", 10, mean=[0.1], std=[0.3], seed=0)
        with torch.no_grad():
            for value in lenet.parameters():
                value[torch.rand(value.shape, generator=torch.Generator().manual_seed(0)) < 0.99] = 0
        atmc.save(lenet, "lenet.atmc", threat="linf:0.1", method="atmc")
        for name, factory in (("mine", "build"), ("bent", "bent")):
            atmc.save(atmc.models.build(f"export_models:{factory}", 10, seed=0), f"{name}.atmc")
        yield folder
    sys.modules.pop("export_models", None)


@pytest.fixture
def lenet(here):
    return here / "lenet.atmc"


def test_onnx(lenet, digits, tmp_path, capsys):
    out = tmp_path / "lenet.onnx"
    assert call("export", lenet, "--to", "onnx", "--out", out, "--data", "digits", "--n", 70) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{out}  {out.stat().st_size:,} bytes"
    assert printed[1] == "  opset 13, IR version 7"
    assert printed[2].startswith("  70 test images of digits: largest difference ")
    assert printed[3].startswith("  70 PGD-10 examples of these under linf:0.1: largest difference ")
    assert all(line.endswith("the same top-1 on 70") for line in printed[2:])
    x = digits.test.float_pixels(slice(0, 20))
    logits = onnx_export.open_runtime(out.read_bytes())(x.numpy())
    with torch.no_grad():
        expected = atmc.load(lenet)(x).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    props = {prop.key: prop.value for prop in onnx.load(out).metadata_props}
    assert props.items() >= {"model": "lenet", "threat": "linf:0.1", "method": "atmc"}.items()
    first = out.read_bytes()
    assert call("export", lenet, "--to", "onnx", "--out", out, "--threat", "l2:0.5", "--n", 1, "--overwrite") == 0
    printed = capsys.readouterr().out
    assert "  1 random images: " in printed
    assert "under l2:0.5" in printed
    assert out.read_bytes() == first


def test_a_users_own_class(here, tmp_path, capsys):
    command = ["export", "mine.atmc", "--to", "onnx", "--out", tmp_path / "mine.onnx"]
    assert "give the factory that builds it" in expect_refusal(capsys, *command)
    command += ["--model", "export_models:build"]
    assert expect_refusal(capsys, *command).endswith("mine.atmc does not say what images its model takes: add --data")
    assert call(*command, "--data", "digits") == 0
    assert "PGD" not in capsys.readouterr().out  # neither the file nor the command names a threat
    command = ["export", "bent.atmc", "--to", "onnx", "--out", tmp_path / "bent.onnx", "--data", "digits", "--model"]
    assert "cannot export bent.atmc to onnx: aten.gelu of layer 1 is not supported; supported are" in expect_refusal(
        capsys, *command, "export_models:bent"
    )
    assert "did you mean 'bent'?" in expect_refusal(capsys, *command, "export_models:bend")


def test_safetensors(lenet, tmp_path, capsys):
    """The state dict can be loaded into the same architecture."""
    out = tmp_path / "lenet.safetensors"
    assert call("export", lenet, "--to", "safetensors", "--out", out) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  the state dict of lenet: 10 tensors"
    fresh, loaded = atmc.models.build("lenet", 10, mean=[0.5], std=[0.5]), atmc.load(lenet)
    load_weights(fresh, str(out))
    assert all(value.equal(loaded.state_dict()[name]) for name, value in fresh.state_dict().items())
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata.items() >= {"model": "lenet", "classes": "10", "input_shape": "[1, 28, 28]"}.items()
    again = atmc.models.build_from_spec(json.loads(metadata["spec"]))
    assert again.state_dict().keys() == loaded.state_dict().keys()


def test_c(lenet, tmp_path, capsys):
    out = tmp_path / "c"
    command = ["export", lenet, "--to", "c", "--out", out, "--data", "digits", "--n", 20]
    assert call(*command) == 0
    assert {path.name for path in out.iterdir()} == {"lenet.h", "lenet.c", "lenet_test.c"}
    printed = capsys.readouterr().out
    assert "bytes of tables, an arena of" in printed
    assert printed.count("the same top-1 on 20") == (2 if shutil.which("cc") else 0)
    assert "lenet.h exists: add --overwrite" in expect_refusal(capsys, *command)


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no compiler here")
def test_two_models_in_one_program(lenet, tmp_path):
    for name in ("one", "two"):
        assert call("export", lenet, "--to", "c", "--out", tmp_path / name, "--name", name, "--n", 2) == 0
    program = '#include "one/one.h"\n#include "two/two.h"\nint main(void) { return ONE_CLASSES - TWO_CLASSES; }\n'
    (tmp_path / "main.c").write_text(program)
    sources = ["main.c", "one/one.c", "two/two.c"]
    subprocess.run(["cc", "-std=c99", *sources, "-o", "program"], cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "program"], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "c", "--name", "a b"], "expected a name that C allows for a function, got 'a b'"),
        (["--name", "one"], "a name is for --to c, got --to onnx"),
        (["--to", "tflite"], "unknown format 'tflite': expected one of onnx, safetensors, c, vnnlib"),
        (["--n", 0], "expected n >= 1, got 0"),
        (["--threat", "0.1"], "expected a threat like linf:8/255"),
        (["--threat", "linf:8"], "eps 8 is above the largest linf distance"),
        (["--data", "nowhere/at-all"], "nowhere/at-all"),
        (["--out", "none/model.onnx"], "there is no folder none to write model.onnx into"),
        (["--out", "lenet.atmc/model.onnx"], "there is no folder lenet.atmc to write model.onnx into"),
        (["--out", "."], ". is a folder: expected the name of the file to write"),
        (["--out", "mine.atmc"], "mine.atmc exists: add --overwrite to replace it"),
        (["--out", "lenet.atmc", "--overwrite"], "lenet.atmc is the model file itself"),
        (["--to", "c", "--out", "mine.atmc"], "mine.atmc is a file: C sources are written into a folder"),
        (["--to", "safetensors", "--data", "digits"], "leave out --data and --threat"),
    ],
)
def test_refusals(lenet, capsys, monkeypatch, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {path.name: path.stat().st_mtime_ns for path in lenet.parent.iterdir()}
    defaults = {"--to": "onnx", "--out": "new.onnx"}
    for option, value in zip(options[::2], [*options[1::2], None], strict=False):
        defaults[option] = value
    arguments = [part for option, value in defaults.items() for part in (option, value) if part is not None]
    assert message in expect_refusal(capsys, "export", lenet, *arguments)
    assert {path.name: path.stat().st_mtime_ns for path in lenet.parent.iterdir()} == before


def test_files_that_are_no_models(lenet, tmp_path, capsys):
    data = bytearray(lenet.read_bytes())
    data[4] = 1
    (tmp_path / "old.atmc").write_bytes(data)
    (tmp_path / "text.atmc").write_text("not a model")
    options = ["--to", "onnx", "--out", tmp_path / "out.onnx"]
    assert "version 1" in expect_refusal(capsys, "export", tmp_path / "old.atmc", *options)
    assert "text.atmc" in expect_refusal(capsys, "export", tmp_path / "text.atmc", *options)
    assert "No such file" in expect_refusal(capsys, "export", tmp_path / "none.atmc", *options)
    assert not (tmp_path / "out.onnx").exists()


def test_a_full_disk(lenet, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    for to in ("onnx", "safetensors"):
        message = expect_refusal(capsys, "export", lenet, "--to", to, "--out", tmp_path / "out", "--n", 1, status=1)
        assert message == f"atmc: {tmp_path / 'out'}: No space left on device"
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_is_not_written(lenet, tmp_path, capsys, monkeypatch):
    """One logit of one image differs by a thousandth of the largest logit."""
    original = onnx_export.open_runtime

    def wrong(data):
        run = original(data)

        def changed(images):
            logits = run(images)
            logits[-1, 0] += 1e-3 * np.abs(logits).max()
            return logits

        return changed

    monkeypatch.setattr(onnx_export, "open_runtime", wrong)
    command = ["export", lenet, "--to", "onnx", "--out", tmp_path / "out.onnx", "--n", 5]
    message = expect_refusal(capsys, *command, status=1)
    assert "the export does not compute what PyTorch does: 5 random images" in message
    assert not list(tmp_path.iterdir())


def test_missing_packages(lenet, tmp_path, capsys, monkeypatch):
    command = ["export", lenet, "--to", "onnx", "--out", tmp_path / "out.onnx", "--n", 5]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        assert expect_refusal(capsys, *command, status=1) == "atmc: onnx is not installed: pip install 'atmc[deploy]'"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert call(*command) == 0
    assert "  not compared with PyTorch: onnxruntime is not installed: pip" in capsys.readouterr().out


def test_agreement():
    expected = np.array([[1.0, -4.0], [0.5, 0.25]], np.float32)
    logits = np.array([[1.0, -3.5], [0.125, 0.25]], np.float32)
    agreement = exports.Agreement.of("images", expected, logits)
    assert (agreement.n, agreement.difference, agreement.largest, agreement.same) == (2, 0.5, 4.0, 1)
    nan = exports.Agreement.of("images", expected, np.full_like(logits, np.nan))
    assert not nan.difference <= nan.largest


def test_a_network_of_zeros(here):
    """A difference of 0 is accepted if the largest |logit| is 0."""
    net = atmc.models.build("export_models:zeros", 10, input_shape=(1, 28, 28))
    atmc.save(net, "zeros.atmc")
    request = exports.ExportRequest(
        file=here / "zeros.atmc", to="onnx", out=here / "zeros.onnx", model="export_models:zeros", n=3
    )
    (agreement,) = exports.export(request).agreements
    assert (agreement.difference, agreement.largest) == (0, 0)
