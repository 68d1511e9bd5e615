"""How to train: every setting, checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

from atmc.augment import AUGMENTATIONS
from atmc.rng import check_seed
from atmc.robust.objectives import OBJECTIVES

CHOICES: dict[str, Collection[str]] = {
    "objective": OBJECTIVES,
    "augment": AUGMENTATIONS,
    "optimizer": ("adamw", "sgd"),
    "factor_start": ("identity", "svd"),
}


@dataclass(frozen=True)
class Recipe:
    """How to train; every field is a setting of the command line's configuration file.

    These are the values for a model without batch norm; `api.default_recipe` chooses by the model.

    Args:
        epochs: phase name -> epochs; phases not named do not train.
        learning_rate: phase name -> peak rate.
        objective: a name in `OBJECTIVES`.
        attack_steps, relative_step, random_start, batch_statistics: the training attack, see `TrainingAttack`.
        optimizer: ``adamw`` or ``sgd`` (Nesterov momentum 0.9).
        warmup: share of the dense phase in which the rate rises.
        eps_ramp: epochs of the dense phase in which the ball grows to full size.
        gradual: share of the l0 and admm phases in which the nonzeros shrink to the budget (Zhu and Gupta 2018).
        regrow: the admm phase begins with so many times the budget, so that factors starting at zero can take part.
        rho, interval, balance: ADMM's penalty, steps between refreshes, residual balancing.
        factor_start: ``identity`` or ``svd``.
        exclude: patterns of weights that stay as they are.
        bf16: train in bfloat16; validation is in float32 always.
        channels_last: memory layout of images and kernels in training; False where a model cannot take it.
        val_n, val_clean_n: validation images each epoch, the first so many under attack and of clean ones (None: all).
    """

    epochs: Mapping[str, int]
    learning_rate: Mapping[str, float]
    objective: str = "mixed"
    attack_steps: int = 7
    relative_step: float = 2.0
    random_start: bool = True
    batch_statistics: bool = False
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    batch_size: int = 128
    warmup: float = 0.15
    eps_ramp: float = 0.0
    gradual: float = 0.5
    regrow: float = 4.0
    rho: float = 0.1
    interval: int = 10
    balance: bool = False
    factor_start: Literal["identity", "svd"] = "identity"
    exclude: tuple[str, ...] = ()
    augment: str = "none"
    bf16: bool = False
    channels_last: bool = True
    val_n: int = 1000
    val_clean_n: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for a setting that makes no sense."""
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: expected one of {', '.join(known)}")
        for name in ("attack_steps", "batch_size", "interval", "val_n", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise ValueError(f"expected {name} to be an integer, got {getattr(self, name)!r}")
        check_seed(self.seed)
        if self.val_clean_n is not None and not (isinstance(self.val_clean_n, Integral) and self.val_clean_n > 0):
            raise ValueError(f"expected val_clean_n > 0 or none for the whole split, got {self.val_clean_n!r}")
        for name in ("attack_steps", "batch_size", "interval", "val_n", "relative_step", "rho"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in ("weight_decay", "eps_ramp"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        if not (0 <= self.warmup < 1 and 0 <= self.gradual <= 1 and 1 <= self.regrow < math.inf):
            raise ValueError(
                f"expected 0 <= warmup < 1, 0 <= gradual <= 1 and regrow >= 1, "
                f"got {self.warmup}, {self.gradual} and {self.regrow}"
            )
