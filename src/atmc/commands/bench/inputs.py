"""What `atmc bench` gives to the engines: images, and the model in the form that each of them reads."""

from __future__ import annotations

import pickle
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from atmc.commands.bench.worker import KINDS, PLAIN, TINY_SHAPE, Files, Kind, tiny
from atmc.commands.model_files import check_image_shape, require_image_shape
from atmc.core.rng import permutation
from atmc.data import Images, load_data
from atmc.deploy.engine import dense
from atmc.deploy.export import onnx_export
from atmc.deploy.graph.graph import FloatArray, Graph
from atmc.deploy.graph.simplify import round_constants, simplify_graph
from atmc.deploy.graph.trace import trace
from atmc.evaluation.evaluate import check_model
from atmc.models.factory import factory_name, first_line
from atmc.pack import artifact
from atmc.pack.artifact import LoadedModel

EXTRA = "pip install 'atmc[bench]'"
CALIBRATION, BATCH, SEED = 256, 64, 0


@dataclass(frozen=True)
class Inputs:
    """Images (n, c, h, w) to time and to compare on, their labels (n,) where there is data, and others to calibrate."""

    images: FloatArray
    labels: NDArray[np.int64] | None
    calibration: FloatArray

    def batch(self, size: int) -> FloatArray:
        """So many images, the first ones again where there are fewer."""
        return np.ascontiguousarray(self.images[np.arange(size) % len(self.images)])


def load_inputs(
    loaded: LoadedModel,
    *,
    data: str | None,
    n: int,
    largest: int,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Inputs:
    """Test images and training images of the data; random ones where there is none. ValueError: they do not fit."""
    if data is None:
        shape = require_image_shape(loaded)
        pixels = torch.rand(max(BATCH, largest), *shape, generator=torch.Generator().manual_seed(SEED))
        check_model(loaded.model, Images(pixels, torch.zeros(len(pixels), dtype=torch.int64)), None, probabilities=True)
        return Inputs(pixels.numpy(), None, pixels.numpy())
    found = load_data(data, image_column=image_column, label_column=label_column)
    check_image_shape(loaded, found)
    check_model(loaded.model, found.test, found.num_classes, probabilities=True)
    chosen = permutation(len(found.train), seed=SEED, purpose="calibration")[:CALIBRATION]
    some = slice(0, n)
    labels = cast(NDArray[np.int64], found.test.labels[some].numpy())
    return Inputs(found.test.float_pixels(some).numpy(), labels, found.train.float_pixels(chosen).numpy())


def missing() -> dict[str, str]:
    """Engines whose packages are not installed, and what to do about it."""
    found = {}
    for kind in KINDS:
        absent = [package for package in kind.packages if find_spec(package) is None]
        if absent:
            found[kind.name] = f"not installed: {', '.join(absent)}; {EXTRA}"
    return found


def write_forms(
    folder: Path,
    file: Path,
    model: nn.Module,
    plain: Graph,
    *,
    calibration: FloatArray,
    factory: str | None = None,
) -> tuple[Files, dict[str, str]]:
    """Write the model for PyTorch and, as far as the packages for it are there, as ONNX in its three forms.

    Args:
        plain: the model as it was traced.
        calibration: images (n, c, h, w) for int8.

    Returns:
        the files, and the engines that go without theirs, and why.
    """
    dense_file, int8_file, plain_file = (folder / f"{form}.onnx" for form in ("dense", "int8", PLAIN))
    files = Files(file, folder / "module.pt", dense_file, int8_file, plain_file, plain.input_shape, factory)
    with suppress(AttributeError, TypeError, pickle.PicklingError):  # a class that its name does not lead to
        torch.save(model, files.module)
    if find_spec("onnx") is None:
        return files, {}
    try:
        data = onnx_export.to_bytes(round_constants(simplify_graph(plain)))
        onnx_export.to_onnx(round_constants(plain), files.plain)
    except ValueError as error:
        return files, {kind.name: f"no ONNX model: {error}" for kind in KINDS if "onnx" in kind.packages}
    files.dense.write_bytes(data)
    if find_spec("onnxruntime") is None:
        return files, {}
    try:
        files.int8.write_bytes(dense.quantize_int8(data, calibration))
    except onnx_export.runtime_errors() as error:  # the quantizer has its own ideas of what a model may hold
        return files, {kind.name: f"not quantized: {first_line(error)}" for kind in KINDS if kind.form == "int8"}
    return files, {}


def write_tiny(folder: Path) -> Files:
    """The network that workers run first, in every form."""
    folder.mkdir()
    model, file = tiny(), folder / "tiny.atmc"
    artifact.save(model, file, input_shape=TINY_SHAPE)
    images = np.zeros((1, *TINY_SHAPE), np.float32)
    plain = trace(model, TINY_SHAPE).graph
    return write_forms(folder, file, model, plain, calibration=images, factory=factory_name(tiny))[0]


def file_bytes(kind: Kind, files: Files, model: nn.Module) -> int:
    """Bytes of what an engine loads; of PyTorch, those of the state dict."""
    if kind.form != "module":
        return Path(getattr(files, kind.form)).stat().st_size
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())
