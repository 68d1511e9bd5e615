"""The settings of training: one field of `Recipe` each, with its default, bounds and meaning in one place.

The configuration's section [training] (`commands.config`), the checks of Python arguments and the table in
docs/method.md are derived from these fields. `default_recipe` chooses the optimizer and its rates for a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal

from torch import nn

from atmc.core.errors import unknown
from atmc.core.rng import check_seed
from atmc.data.augment import AUGMENTATIONS
from atmc.robust.objectives import OBJECTIVES

PHASES = ("dense", "l0", "admm", "tune")
DEFAULT_EPOCHS = {"dense": 20, "l0": 10, "admm": 10, "tune": 5}
LEARNING_RATES = {
    "adamw": {"dense": 2e-3, "l0": 1e-3, "admm": 1e-3, "tune": 5e-4},
    "sgd": {"dense": 0.1, "l0": 0.02, "admm": 0.01, "tune": 0.005},
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The values that a numeric setting may take: low <= value <= high, with the ends left out as asked."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def contain(self, value: float) -> bool:
        """Whether a value is finite and within the bounds."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        low = f"{'>' if self.open_low else '>='} {self.low:g}"
        high = f"{'<' if self.open_high else '<='} {self.high:g}"
        return low if self.high == math.inf else f"{low} and {high}"


POSITIVE = Bounds(low=0, open_low=True)
NOT_NEGATIVE = Bounds(low=0)
AT_LEAST_ONE = Bounds(low=1)


def setting(
    help: str,
    default: Any = MISSING,
    *,
    bounds: Bounds | None = None,
    choices: Collection[str] | None = None,
    optional: bool = False,
    section: str = "training",
    factory: Callable[[], Any] | None = None,
) -> Any:
    """Declare a field of `Recipe`.

    Args:
        help: what the setting does, in one line.
        default: its value for a model without batch norm; `factory` makes one that is mutable, and without both the
            setting must be given.
        bounds: of a number.
        choices: of a name.
        optional: whether None is a value.
        section: ``training`` for a key of the configuration's [training]; ``run`` for what a run sets elsewhere.
    """
    metadata = {"help": help, "bounds": bounds, "choices": choices, "optional": optional, "section": section}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Every field is a setting; `help(Recipe)` and docs/method.md list them with their meaning.

    The defaults are for a model without batch norm; `default_recipe` chooses by the model.

    Raises:
        ValueError: a value of the wrong type, outside its bounds, or not among its choices.
    """

    epochs: Mapping[str, int] = setting("epochs per phase; a phase that is not named does not train")
    learning_rate: Mapping[str, float] = setting("peak learning rate per phase")
    objective: str = setting("training loss", "mixed", choices=OBJECTIVES)
    objective_options: Mapping[str, float] = setting("options of the objective, such as beta of trades", factory=dict)
    attack_steps: int = setting("ascent steps of the training attack", 7, bounds=AT_LEAST_ONE)
    relative_step: float = setting("total path length of the training attack over eps", 2.0, bounds=POSITIVE)
    random_start: bool = setting("start the training attack at a random point of the ball", True)
    batch_statistics: bool = setting("let batch norm use the attacked batch's own statistics during attacks", False)
    optimizer: str = setting("adamw, or sgd with Nesterov momentum 0.9", "adamw", choices=("adamw", "sgd"))
    weight_decay: float = setting("weight decay of the optimizer", 1e-4, bounds=NOT_NEGATIVE)
    batch_size: int = setting("images per step", 128, bounds=AT_LEAST_ONE)
    warmup: float = setting(
        "fraction of the dense phase in which the learning rate rises",
        0.15,
        bounds=Bounds(low=0, high=1, open_high=True),
    )
    eps_ramp: float = setting(
        "epochs of the dense phase in which the ball grows to full size", 0.0, bounds=NOT_NEGATIVE
    )
    gradual: float = setting(
        "fraction of the l0 and admm phases in which the nonzeros fall to the budget (Zhu and Gupta 2018)",
        0.5,
        bounds=Bounds(low=0, high=1),
    )
    regrow: float = setting(
        "the admm phase starts with this many times the budget, so that factors which start at zero can take part",
        4.0,
        bounds=AT_LEAST_ONE,
    )
    rho: float = setting("penalty of ADMM", 0.1, bounds=POSITIVE)
    interval: int = setting("steps between two refreshes of ADMM's copy and dual", 10, bounds=AT_LEAST_ONE)
    balance: bool = setting("adapt rho by residual balancing (Boyd et al. 2011, section 3.4.1)", False)
    factor_start: Literal["identity", "svd"] = setting(
        "where U, V and C start", "identity", choices=("identity", "svd")
    )
    exclude: tuple[str, ...] = setting("shell patterns of weights that stay dense, such as head.*", ())
    augment: str = setting("random changes of training images", "none", choices=AUGMENTATIONS)
    val_n: int = setting("validation images under attack per epoch, the first ones", 1000, bounds=AT_LEAST_ONE)
    val_clean_n: int | None = setting(
        "clean validation images per epoch, the first ones (default: all)", None, bounds=AT_LEAST_ONE, optional=True
    )
    bf16: bool = setting("train in bfloat16; validation is always in float32", False, section="run")
    channels_last: bool = setting("memory layout of images and kernels in training", True, section="run")
    seed: int = setting("keys every random draw", 0, section="run")

    def __post_init__(self) -> None:
        """Check every field."""
        for each in fields(self):
            check_setting(each.name, getattr(self, each.name))
        OBJECTIVES[self.objective].check_options(self.objective, self.objective_options)
        check_seed(self.seed)


SETTINGS = {each.name: each for each in fields(Recipe)}


def check_setting(name: str, value: Any) -> None:
    """Raise ValueError if a setting of `Recipe` cannot have this value: its type, its bounds, its choices."""
    about, kind = SETTINGS[name].metadata, str(SETTINGS[name].type)
    if value is None and about["optional"]:
        return
    if about["choices"] is not None and value not in about["choices"]:
        raise unknown(name, value, about["choices"])
    if kind.startswith(("int", "float")):
        number, word = (Integral, "an integer") if kind.startswith("int") else (Real, "a number")
        if not isinstance(value, number) or isinstance(value, bool):
            raise ValueError(f"expected {name} to be {word}, got {value!r}")
        if about["bounds"] is not None and not about["bounds"].contain(float(value)):
            raise ValueError(f"expected {name} {about['bounds']}, got {value}")
    if kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"expected {name} to be true or false, got {value!r}")


def default_recipe(model: nn.Module, **settings: Any) -> Recipe:
    """Return a recipe whose optimizer suits the model, unless the settings say otherwise.

    A model with batch norm gets SGD, as is usual in adversarial training; one without gets AdamW, since SGD with the
    same rate often does not converge against large perturbations.

    Args:
        settings: fields of `Recipe`; epochs and learning_rate may be one number for every phase or a dict of some.

    Raises:
        ValueError: an unknown setting, or a value that it cannot have.
    """
    for name in settings:
        if name not in SETTINGS:
            raise unknown("setting", name, SETTINGS, expected="a field of atmc.Recipe")
    normed = has_batch_norm(model)
    optimizer = settings.setdefault("optimizer", "sgd" if normed else "adamw")
    check_setting("optimizer", optimizer)
    settings.setdefault("weight_decay", 5e-4 if normed else 1e-4)
    settings["epochs"] = fill_phases(settings.get("epochs"), DEFAULT_EPOCHS, "epochs")
    settings["learning_rate"] = fill_phases(settings.get("learning_rate"), LEARNING_RATES[optimizer], "learning_rate")
    objective = settings.setdefault("objective", SETTINGS["objective"].default)
    check_setting("objective", objective)
    settings["objective_options"] = OBJECTIVES[objective].fill_options(objective, settings.get("objective_options"))
    return Recipe(**settings)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any module of the model is a batch norm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def fill_phases(given: Any, defaults: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return a value per phase from one number for all or from a dict of some, filled up with the defaults.

    Raises:
        ValueError: an unknown phase, or a value that is not a number >= 0 (an integer for epochs).
    """
    if given is None:
        return dict(defaults)
    kind: Any = Integral if what == "epochs" else Real
    values = dict(given) if isinstance(given, Mapping) else dict.fromkeys(defaults, given)
    for phase, value in values.items():
        if phase not in defaults:
            raise unknown(f"phase of {what}", phase, defaults)
        if not (isinstance(value, kind) and 0 <= value < math.inf):
            raise ValueError(f"expected {what} >= 0 in phase {phase}, got {value!r}")
    return {**defaults, **values}
