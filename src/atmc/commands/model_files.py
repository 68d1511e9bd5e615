"""Open the model that a command was given: a model file, or a checkpoint with the name of its model."""

from __future__ import annotations

from pathlib import Path

from atmc import models
from atmc.commands.checkpoints import load_weights
from atmc.data import Data
from atmc.pack import artifact
from atmc.pack.artifact import LoadedModel

WEIGHTS = (".pt", ".pth", ".safetensors")  # suffixes of checkpoints, which hold weights only


def check_named(path: Path, model: str | None) -> None:
    """Raise ValueError for a checkpoint that came without the name of its model."""
    if path.suffix in WEIGHTS and model is None:
        raise ValueError(f"{path} holds weights only: name their model with --model")


def open_model_file(path: Path, model: str | None) -> LoadedModel:
    """Open a model file; model: package.module:factory that builds a user's own class.

    Raises:
        ValueError: the file is missing, damaged, or needs another factory.
    """
    return artifact.open(path, factory=models.import_factory(model) if model and ":" in model else None)


def open_model(path: Path, model: str | None, data: Data | None = None) -> LoadedModel:
    """Open a model file, or build a model of the zoo or of the user's own class with the weights of a checkpoint.

    Args:
        model: name of the zoo, or package.module:factory; for a model file only the latter is used.
        data: the data of a checkpoint's model; its mean and deviation normalize a model of the zoo, as in `compress`.

    Raises:
        ValueError: the file is missing, damaged or of another model, or a checkpoint came without a model's name.
    """
    if path.suffix not in WEIGHTS:
        return open_model_file(path, model)
    check_named(path, model)
    assert model is not None
    assert data is not None
    mean, std = (None, None) if ":" in model else (data.mean, data.std)
    network = models.build(model, data.num_classes, input_shape=data.input_shape, mean=mean, std=std)
    load_weights(network, str(path))
    return LoadedModel(network.eval(), factors={}, metadata={}, source=str(path))


def require_image_shape(loaded: LoadedModel) -> tuple[int, int, int]:
    """Return (c, h, w) of the images that a model file is for; raise ValueError if the file does not tell."""
    if loaded.input_shape is None:
        raise ValueError(f"{loaded.source} does not say what images its model takes: add --data")
    return loaded.input_shape


def check_image_shape(loaded: LoadedModel, data: Data) -> None:
    """Raise ValueError if a model file says that it takes images of another shape than the data have."""
    shape = loaded.input_shape
    if shape is not None and shape != data.input_shape:
        raise ValueError(
            f"{loaded.source} is for images of shape {shape} and does not take images of shape {data.input_shape}, "
            f"as {data.name} has them"
        )
