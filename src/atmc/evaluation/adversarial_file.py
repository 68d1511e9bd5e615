"""Adversarial examples in a file: save, read, and replay them on another engine.

The file is NumPy's npz without pickle: `adv` (n, c, h, w) float32 in [0, 1], the image that fooled the model, or the
clean image if none did; `labels` (n,); `fooled` (n,) bool; `predictions` (n,) of the attacked model on `adv`; `about`,
JSON in a string: threat, attacks, seed.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atmc.core.files import write_beside
from atmc.evaluation.accuracy import predictions
from atmc.evaluation.statistics import Accuracy

Engine = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class AdversarialExamples:
    """Adversarial images of one model; the fields are those of the file."""

    adv: Tensor
    labels: Tensor
    fooled: Tensor
    predictions: Tensor
    about: dict[str, Any]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        buffer, path = BytesIO(), Path(path)
        arrays = {name: getattr(self, name).cpu().numpy() for name in ("adv", "labels", "fooled", "predictions")}
        np.savez_compressed(buffer, **arrays, about=np.array(json.dumps(self.about)))
        write_beside(path, buffer.getvalue())


@dataclass(frozen=True)
class Replay:
    """Adversarial images on another engine.

    Args:
        agreement: how often the engine agrees with the attacked model.
        accuracy: how often the engine is right.
        attacked_accuracy: how often the attacked model is right.
    """

    agreement: Accuracy
    accuracy: Accuracy
    attacked_accuracy: float

    def to_json(self) -> dict[str, Any]:
        """Return the figures as in the JSON of `atmc evaluate --replay`."""
        figures = {"agreement": self.agreement.to_json(), "accuracy": self.accuracy.to_json()}
        return figures | {"accuracy_of_the_attacked_model": round(self.attacked_accuracy, 6)}


def collect(model: nn.Module, labels: Tensor, attacks: dict[str, Accuracy], /, **about: Any) -> AdversarialExamples:
    """Collect the worst case of several attacks: for each example the image of the first attack that fooled the model.

    Args:
        labels: labels of the examples, and perhaps of more.
        attacks: accuracies, evaluated with `keep`, by attack.
        about: entries of the field `about`, such as the threat.

    Raises:
        ValueError: an attack's images were not kept.
    """
    n = min(accuracy.n for accuracy in attacks.values())
    adv, fooled = None, torch.zeros(n, dtype=torch.bool)
    for name, accuracy in attacks.items():
        if accuracy.adv is None or accuracy.fooled_by is None:
            raise ValueError(f"the adversarial images of {name} were not kept: evaluate with keep=True")
        adv = accuracy.adv[:n].clone() if adv is None else adv
        new = (accuracy.fooled_by[:n] >= 0) & ~fooled
        adv[new] = accuracy.adv[:n][new]
        fooled |= new
    assert adv is not None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    predicted = [predictions(model, part.to(device)).cpu() for part in torch.split(adv, 500)]
    return AdversarialExamples(adv, labels[:n].cpu(), fooled, torch.cat(predicted), {"attacks": list(attacks), **about})


def read(path: str | os.PathLike[str]) -> AdversarialExamples:
    """Read the examples of a file.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = {name: torch.from_numpy(saved[name]) for name in ("adv", "labels", "fooled", "predictions")}
            about = json.loads(str(saved["about"]))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no saved adversarial examples: {error}") from error
    n = len(arrays["labels"])
    if arrays["adv"].dim() != 4 or any(len(array) != n for array in arrays.values()):
        raise ValueError(
            f"{path} holds no saved adversarial examples: expected adv (n, c, h, w) and n entries elsewhere"
        )
    return AdversarialExamples(**arrays, about=about)


def replay(path: str | os.PathLike[str], engine: nn.Module | Engine, *, batch_size: int = 500) -> Replay:
    """Classify the saved examples of a file with another engine.

    Args:
        engine: a module, or a function from NumPy images (n, c, h, w) float32 to logits (n, classes).

    Raises:
        ValueError: there is no such file, or the engine does not take its images.
    """
    examples = read(path)
    parts = []
    for part in torch.split(examples.adv, batch_size):
        if isinstance(engine, nn.Module):
            device = next((p.device for p in engine.parameters()), torch.device("cpu"))
            try:
                parts.append(predictions(engine, part.to(device)).cpu())
            except (RuntimeError, ValueError) as error:
                shape = tuple(part.shape[1:])
                raise ValueError(f"the model does not take images of shape {shape}, as {path} holds") from error
        else:
            parts.append(torch.from_numpy(np.asarray(engine(part.numpy())).argmax(1)).to(torch.int64))
    predicted = torch.cat(parts)
    return Replay(
        agreement=Accuracy.of(predicted == examples.predictions),
        accuracy=Accuracy.of(predicted == examples.labels),
        attacked_accuracy=float((examples.predictions == examples.labels).float().mean()),
    )
