"""Build the models of the golden files in tests/golden, which `python tests/golden_files.py` wrote once.

Their values follow from a rule, so that a test can compute what must come out. A change of the bytes is a change of the
format, and requires a new VERSION.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from atmc import models
from atmc.compress.factorize import cut_ranks, factorize, factors
from atmc.pack import artifact

FOLDER = Path(__file__).parent / "golden"
TOOL = "0.1.0"  # the release that the files name
DESCRIPTION = {"input_shape": (1, 4, 4), "classes": 3, "threat": "linf:0.1", "method": "atmc"}


def spread(shape: tuple[int, ...], every: int, values: list[float]) -> torch.Tensor:
    """Return zeros with one of the values in turn at each `every`-th place."""
    flat = np.zeros(int(np.prod(shape)), np.float32)
    places = range(every // 2, len(flat), every)
    flat[list(places)] = [values[i % len(values)] for i in range(len(places))]
    return torch.from_numpy(flat.reshape(shape))


class Net(nn.Module):
    """A convolution, batch norm if asked for, and a linear layer, for images of 1 x 4 x 4."""

    def __init__(self, num_classes: int, *, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.norm = nn.BatchNorm2d(5) if norm else nn.Identity()
        self.head = nn.Linear(20, num_classes)
        self.register_buffer("steps", torch.tensor([1, -2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


def build_normed(num_classes: int) -> nn.Module:
    return Net(num_classes, norm=True)


def fill(model: nn.Module, every: int, values: list[float]) -> nn.Module:
    """Fill weights and factors by `spread`, biases with 0.5, -0.25, 0 and 0.125 in turn; in place, and returned."""
    with torch.no_grad():
        for parts in factors(model).values():
            for parameter in parts.values():
                parameter.copy_(spread(tuple(parameter.shape), every, values))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(spread(tuple(parameter.shape), 1, [0.5, -0.25, 0.0, 0.125]))
    return model


def codebook() -> nn.Module:
    """Build a zoo LeNet with a codebook of three values per weight."""
    return fill(models.build("lenet", 10, seed=0), 4001, [0.5, -1.25, 3.0])


def sparse() -> nn.Module:
    """Build a network of distinct values that float16 holds exactly, at few places."""
    return fill(Net(3), 3, [1 + i / 64 for i in range(300)])


def ranked() -> nn.Module:
    """Build a network with one weight as U V + C, the other as U V of rank 2, in float32."""
    model = factorize(Net(3), exclude=("head.*",))
    return fill(cut_ranks(model, {"head.weight": 2}), 4, [0.1, -0.7, 0.3])


def dense() -> nn.Module:
    """Build a network without zeros, with batch norm and its statistics."""
    model = fill(build_normed(3), 1, [i / 7 - 2 for i in range(31)])
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0, 0.25]))
        model.norm.running_mean.copy_(torch.arange(5) / 3)
        model.norm.running_var.copy_(torch.arange(5) + 1.0)
        model.norm.num_batches_tracked.fill_(300)
    return model


MODELS = {"codebook": codebook, "sparse": sparse, "ranked": ranked, "dense": dense}
FACTORIES = {"codebook": None, "sparse": Net, "ranked": Net, "dense": build_normed}


def to_bytes(name: str) -> bytes:
    """Return the bytes of a golden file as this release writes them, with its own version as the tool."""
    return artifact.to_bytes(MODELS[name](), **(DESCRIPTION if FACTORIES[name] else {}))


if __name__ == "__main__":
    artifact.__version__ = TOOL
    FOLDER.mkdir(exist_ok=True)
    for name in MODELS:
        data = to_bytes(name)
        (FOLDER / f"{name}.atmc").write_bytes(data)
        print(name, len(data), "bytes")
