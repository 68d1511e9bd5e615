"""Adversarial examples in a file, to be shown to another engine: save, read, replay.

The file is NumPy's npz without pickle: `adv` (n, c, h, w) float32 in [0, 1], what fooled the model, or the clean image
where nothing did; `labels` (n,); `fooled` (n,) bool; `predictions` (n,), of the model that was attacked, on `adv`;
`about`, JSON in a string: threat, attacks, seed.
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
    """Adversarial images of one model, as in the file."""

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
    """How often another engine agrees with the model that was attacked, and how often it is right."""

    agreement: Accuracy
    accuracy: Accuracy
    attacked: float

    def to_json(self) -> dict[str, Any]:
        """As in the JSON of `atmc evaluate --replay`."""
        figures = {"agreement": self.agreement.to_json(), "accuracy": self.accuracy.to_json()}
        return figures | {"accuracy_of_the_attacked_model": round(self.attacked, 6)}


def collect(model: nn.Module, labels: Tensor, attacks: dict[str, Accuracy], /, **about: Any) -> AdversarialExamples:
    """The worst case of several attacks, each evaluated with `keep`: what the first successful one found.

    Args:
        labels: of all images, (at least n,).

    Raises:
        ValueError: an attack's images were not kept.
    """
    n = min(found.n for found in attacks.values())
    adv, fooled = None, torch.zeros(n, dtype=torch.bool)
    for name, found in attacks.items():
        if found.adv is None or found.fooled_by is None:
            raise ValueError(f"the adversarial images of {name} were not kept: evaluate with keep=True")
        adv = found.adv[:n].clone() if adv is None else adv
        new = (found.fooled_by[:n] >= 0) & ~fooled
        adv[new] = found.adv[:n][new]
        fooled |= new
    assert adv is not None
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen = [predictions(model, part.to(device)).cpu() for part in torch.split(adv, 500)]
    return AdversarialExamples(adv, labels[:n].cpu(), fooled, torch.cat(seen), {"attacks": list(attacks), **about})


def read(path: str | os.PathLike[str]) -> AdversarialExamples:
    """The examples of a file.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: torch.from_numpy(held[name]) for name in ("adv", "labels", "fooled", "predictions")}
            about = json.loads(str(held["about"]))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} holds no saved adversarial examples: {error}") from error
    n = len(arrays["labels"])
    if arrays["adv"].dim() != 4 or any(len(array) != n for array in arrays.values()):
        raise ValueError(f"{path} holds no saved adversarial examples: expected (n, c, h, w) images and n of the rest")
    return AdversarialExamples(**arrays, about=about)


def replay(path: str | os.PathLike[str], engine: nn.Module | Engine, *, batch_size: int = 500) -> Replay:
    """Show saved examples to another engine.

    Args:
        engine: a module, or a function from NumPy images (n, c, h, w) float32 to logits (n, classes).

    Raises:
        ValueError: no such file, or images that the engine does not take.
    """
    examples = read(path)
    seen = []
    for part in torch.split(examples.adv, batch_size):
        if isinstance(engine, nn.Module):
            device = next((p.device for p in engine.parameters()), torch.device("cpu"))
            try:
                seen.append(predictions(engine, part.to(device)).cpu())
            except (RuntimeError, ValueError) as error:
                shape = tuple(part.shape[1:])
                raise ValueError(f"the model does not take images of shape {shape}, as {path} holds") from error
        else:
            seen.append(torch.from_numpy(np.asarray(engine(part.numpy())).argmax(1)).to(torch.int64))
    found = torch.cat(seen)
    agreement = Accuracy.of(found == examples.predictions)
    attacked = float((examples.predictions == examples.labels).float().mean())
    return Replay(agreement, Accuracy.of(found == examples.labels), attacked)
