"""The inputs of the engines of `atmc bench`: images, and the model in the form that each engine reads."""

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

from atmc.commands.bench.worker import KINDS, OURS, PLAIN, TINY_SHAPE, EngineKind, ModelFiles, build_tiny
from atmc.commands.model_files import check_image_shape, require_image_shape
from atmc.core.rng import permutation
from atmc.data import Images, load_data
from atmc.deploy.engine import dense
from atmc.deploy.export import onnx_export
from atmc.deploy.graph.graph import FloatArray, Graph
from atmc.deploy.graph.simplify import round_constants, simplify_graph
from atmc.deploy.graph.trace import UnsupportedModel, trace
from atmc.evaluation.user_model import check_model
from atmc.models.factory import factory_name, first_line
from atmc.pack import artifact
from atmc.pack.artifact import LoadedModel

EXTRA = "pip install 'atmc[bench]'"
CALIBRATION = 256  # training images on which int8 is calibrated
BATCH = 64  # images at once
SEED = 0  # of random images and of the choice of calibration images


@dataclass(frozen=True)
class Inputs:
    """Images for the engines.

    Args:
        images: (n, c, h, w), to time and to compare on.
        labels: (n,) of the images; None for random images.
        calibration: (m, c, h, w), on which int8 is calibrated.
    """

    images: FloatArray
    labels: NDArray[np.int64] | None
    calibration: FloatArray

    def batch(self, size: int) -> FloatArray:
        """Return `size` images; the first ones are repeated if there are fewer."""
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
    """Return test images and training images of a data set, or random images if none is given.

    Args:
        loaded: the model.
        data: name of the data set.
        n: number of test images.
        largest: the largest batch size.

    Raises:
        ValueError: the model does not take the images, or its file does not say what images it takes.
    """
    if data is None:
        shape = require_image_shape(loaded)
        pixels = torch.rand(max(BATCH, largest), *shape, generator=torch.Generator().manual_seed(SEED))
        check_model(loaded.model, Images(pixels, torch.zeros(len(pixels), dtype=torch.int64)), None, probabilities=True)
        return Inputs(pixels.numpy(), None, pixels.numpy())
    splits = load_data(data, image_column=image_column, label_column=label_column)
    check_image_shape(loaded, splits)
    check_model(loaded.model, splits.test, splits.num_classes, probabilities=True)
    calibration = permutation(len(splits.train), seed=SEED, purpose="calibration")[:CALIBRATION]
    first = slice(0, n)
    labels = cast(NDArray[np.int64], splits.test.labels[first].numpy())
    return Inputs(splits.test.float_pixels(first).numpy(), labels, splits.train.float_pixels(calibration).numpy())


def find_missing_packages() -> dict[str, str]:
    """Map the name of every engine whose packages are not installed to a clause that names them and the extra."""
    reasons = {}
    for kind in KINDS:
        absent = [package for package in kind.packages if find_spec(package) is None]
        if absent:
            reasons[kind.name] = f"not installed: {', '.join(absent)}; {EXTRA}"
    return reasons


def write_forms(
    folder: Path,
    file: Path,
    model: nn.Module,
    plain: Graph | UnsupportedModel,
    *,
    input_shape: tuple[int, ...],
    calibration: FloatArray,
    factory: str | None = None,
) -> tuple[ModelFiles, dict[str, str]]:
    """Write the model as a pickled module and, if the packages are installed, as three ONNX models.

    Args:
        folder: to write into.
        file: the model file.
        model: its module.
        plain: the module's graph, not simplified, or why it has none; then only PyTorch can run it.
        input_shape: (c, h, w) of the images.
        calibration: images (n, c, h, w) for int8.
        factory: package.module:factory of a user's own class.

    Returns:
        the paths, and for every engine whose form could not be written the reason.
    """
    dense_file, int8_file, plain_file = (folder / f"{form}.onnx" for form in ("dense", "int8", PLAIN))
    files = ModelFiles(
        model=file,
        module=folder / "module.pt",
        dense=dense_file,
        int8=int8_file,
        plain=plain_file,
        input_shape=cast(tuple[int, int, int], input_shape),
        factory=factory,
    )
    with suppress(AttributeError, TypeError, pickle.PicklingError):  # a class that cannot be imported by its name
        torch.save(model, files.module)
    if isinstance(plain, UnsupportedModel):
        reasons = {kind.name: f"no ONNX model of it: {plain}" for kind in KINDS if kind.form != "module"}
        return files, reasons | {OURS: f"cannot run it: {plain}"}
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
    except onnx_export.runtime_errors() as error:  # the quantizer refuses some valid models
        return files, {kind.name: f"not quantized: {first_line(error)}" for kind in KINDS if kind.form == "int8"}
    return files, {}


def write_tiny(folder: Path) -> ModelFiles:
    """Write the network that workers run first in every form."""
    folder.mkdir()
    model, file = build_tiny(), folder / "tiny.atmc"
    artifact.save(model, file, input_shape=TINY_SHAPE)
    images = np.zeros((1, *TINY_SHAPE), np.float32)
    plain = trace(model, TINY_SHAPE).graph
    name = factory_name(build_tiny)
    return write_forms(folder, file, model, plain, input_shape=TINY_SHAPE, calibration=images, factory=name)[0]


def file_bytes(kind: EngineKind, files: ModelFiles, model: nn.Module) -> int:
    """Return the size of the file that an engine loads; for PyTorch the bytes of the state dict."""
    if kind.form != "module":
        return Path(getattr(files, kind.form)).stat().st_size
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())
