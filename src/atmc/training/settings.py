"""The settings of training: each is one field of `Recipe`, with its default, bounds and meaning in one place.

The configuration's section [training] (`commands.config`) and the checks of Python arguments are derived from these
fields, and a test compares them with the table in docs/method.md. `default_recipe` fills in what a user leaves open;
`choose_objective` chooses the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
from torch import nn

from atmc.core.arguments import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Bounds
from atmc.core.errors import unknown
from atmc.core.rng import check_seed
from atmc.data import AUGMENTATIONS, Images, batch_count
from atmc.evaluation.accuracy import interval_accuracy
from atmc.models import USER_CODE_ERRORS
from atmc.robust.objectives import OBJECTIVES, TrainingAttack
from atmc.robust.threats import Threat

PHASES = ("dense", "l0", "admm", "tune")
DEFAULT_EPOCHS = {"dense": 20, "l0": 10, "admm": 10, "tune": 5}  # a method that lacks phases has as many in all
LEARNING_RATES = {
    "adamw": {"dense": 2e-3, "l0": 3e-3, "admm": 1e-3, "tune": 5e-4},
    "sgd": {"dense": 0.1, "l0": 0.02, "admm": 0.01, "tune": 0.005},
}
INITIALIZATIONS = ("given", "ibp")
RANKINGS = ("effect", "magnitude")
VAL_ATTACKS = ("quick", "pgd", "pgd-strong", "autoattack")
QUANTIZATIONS = ("proximal", "gradient", "straight-through")
BATCH_SIZE, SMALLEST_BATCH_SIZE = 128, 32  # what `choose_batch_size` chooses from
FEWEST_BATCHES = 40  # per epoch, for which it takes smaller ones
LARGE_BALL = 0.1  # the smallest eps of an l-infinity ball in which `choose_objective` takes `ibp`
FEWEST_STEPS = 600  # the fewest steps of a dense phase in which it does
FactorStart = Literal["sparse", "identity", "svd"]


def setting(
    help: str,
    default: Any = MISSING,
    *,
    with_batch_norm: Any = None,
    bounds: Bounds | None = None,
    choices: Collection[str] | None = None,
    optional: bool = False,
    section: str = "training",
    factory: Callable[[], Any] | None = None,
) -> Any:
    """Declare a field of `Recipe`.

    Args:
        help: what the setting does, in one line; docs/method.md shows it.
        default: its value. A mutable one is given as `factory`. A setting without both must be given.
        with_batch_norm: the value that `default_recipe` takes for a model with batch norm, if it differs.
        bounds: of a number.
        choices: the names that it may be.
        optional: whether None is a value.
        section: ``training`` for a key of the configuration's [training]; ``run`` for what a run sets elsewhere.
    """
    metadata = {
        "help": help,
        "with_batch_norm": with_batch_norm,
        "bounds": bounds,
        "choices": choices,
        "optional": optional,
        "section": section,
    }
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Every field is a setting; docs/method.md lists them with their meaning.

    The defaults are for a model without batch norm; `default_recipe` fills in those that depend on the model, and
    `choose_objective` the objective, which depends on the threat, too.

    Raises:
        ValueError: a value of the wrong type, outside its bounds, or not among its choices.
    """

    epochs: Mapping[str, int] = setting("epochs per phase: one number for all phases, or a table of some phases")
    learning_rate: Mapping[str, float] = setting("peak learning rate per phase, likewise")
    objective: str = setting(
        "training loss, see Objectives; method `nap` always uses `natural`", "mixed", choices=OBJECTIVES
    )
    objective_options: Mapping[str, float] = setting("options of the objective, see Objectives", factory=dict)
    attack_steps: int = setting("ascent steps of the training attack", 7, bounds=AT_LEAST_ONE)
    relative_step: float = setting(
        "path length of the training attack over eps: a step is `relative_step * eps / attack_steps`",
        TrainingAttack.relative_step,
        bounds=POSITIVE,
    )
    random_start: bool = setting(
        "start the training attack at a random point of the ball; false: at the image", TrainingAttack.random_start
    )
    batch_statistics: bool = setting(
        "let batch norm normalize by the attacked batch's own statistics during the attack",
        TrainingAttack.batch_statistics,
    )
    optimizer: str = setting(
        "AdamW, or SGD with Nesterov momentum 0.9", "adamw", with_batch_norm="sgd", choices=LEARNING_RATES
    )
    weight_decay: float = setting(
        "weight decay of the optimizer, on all parameters", 1e-4, with_batch_norm=5e-4, bounds=NOT_NEGATIVE
    )
    clip_norm: float | None = setting(
        "largest Euclidean norm of the whole gradient; a longer one is scaled down (default: none, 10 for certified "
        "objectives)",
        None,
        bounds=POSITIVE,
        optional=True,
    )
    batch_size: int = setting(
        "images per step (default: 128, and without batch norm 64 or 32 if an epoch would have fewer than 40 full "
        "batches); an epoch's last batch may be smaller, but a single remaining image joins the batch before it",
        BATCH_SIZE,
        bounds=AT_LEAST_ONE,
    )
    initialization: str = setting(
        "weights at the start: `given`, as the model comes, or `ibp`, drawn so that interval bounds keep their width "
        "from layer to layer (Shi et al. 2021)",
        "given",
        choices=INITIALIZATIONS,
    )
    warmup: float = setting(
        "fraction of a phase in which the learning rate rises; in `l0` it is `gradual`",
        0.15,
        bounds=Bounds(low=0, high=1, open_high=True),
    )
    eps_ramp: float = setting(
        "epochs of the dense phase in which the ball grows to full size", 0.0, bounds=NOT_NEGATIVE
    )
    equalize: bool = setting(
        "scale the weights into and out of each channel to one norm before the first pruning, which changes no "
        "decision (default: false, true for certified objectives)",
        False,
    )
    gradual: float = setting(
        "fraction of the l0 and admm phases in which the nonzeros fall to the budget (Zhu and Gupta 2018); meanwhile "
        "the learning rate of l0 rises, and what it removed stays out",
        0.5,
        bounds=Bounds(low=0, high=1),
    )
    sensitivity: float = setting(
        "which entries the budget keeps: those of largest effect^(1 - s) * (|x| sqrt(v))^s, s being this setting and v "
        "the mean squared gradient of the entry x; 0 leaves the gradient out",
        0.1,
        bounds=Bounds(low=0, high=1),
    )
    rank_by: str = setting(
        "what the effect of an entry is: the size of the change of W without it (`effect`), or its own magnitude, as "
        "in the paper; they differ for U and V only",
        "effect",
        choices=RANKINGS,
    )
    regrow: float = setting(
        "the admm phase starts with `regrow * k` nonzeros (at most N), so that factors can grow that start at zero",
        1.0,
        bounds=AT_LEAST_ONE,
    )
    quantization: str = setting(
        "how the admm phase moves values to codebooks: by ADMM with a `proximal` step after the optimizer's, by ADMM "
        "with its penalty in the `gradient`, as in the paper, or by rounding in the forward pass (`straight-through`)",
        "proximal",
        choices=QUANTIZATIONS,
    )
    weighted: bool = setting(
        "weigh the squared error of rounding an entry by the root of its mean squared gradient", True
    )
    rho: float = setting("penalty of ADMM", 30.0, bounds=POSITIVE)
    interval: int = setting("steps between two refreshes of ADMM's copy and dual", 10, bounds=AT_LEAST_ONE)
    balance: bool = setting(
        "double or halve rho if one relative residual is over three times the other (Wohlberg 2017)", False
    )
    factor_start: FactorStart = setting(  # noqa: RUF009 - it makes a field, as the calls above do
        "where U, V and C start, see Factors", "sparse", choices=get_args(FactorStart)
    )
    factor_profit: float = setting(
        "a sparse start takes a rank-one term of U and V if it saves this times its own nonzeros beyond them",
        1.0,
        bounds=NOT_NEGATIVE,
    )
    exclude: tuple[str, ...] = setting(
        'shell patterns of weights that stay dense, such as `"fc2.weight"`; a pattern that matches nothing is an error',
        (),
    )
    augment: str = setting("random changes of training images, see [data.md](data.md)", "none", choices=AUGMENTATIONS)
    val_n: int = setting("validation images under attack per epoch, the first ones", 1000, bounds=AT_LEAST_ONE)
    val_attack: str = setting(
        "the attack on them, see [evaluation.md](evaluation.md); objectives that train for proofs count proofs instead",
        "quick",
        choices=VAL_ATTACKS,
    )
    val_clean_n: int | None = setting(
        "clean validation images per epoch, the first ones; for quick trials", None, bounds=AT_LEAST_ONE, optional=True
    )
    bf16: bool = setting(
        "train in bfloat16 (in a configuration: `precision`); validation and evaluation are always in float32",
        False,
        section="run",
    )
    channels_last: bool = setting(
        "channels-last layout in training (in a configuration: `layout`); a model that cannot take it runs without",
        True,
        section="run",
    )
    seed: int = setting("key of every random draw (in a configuration: the run's `seed`)", 0, section="run")

    def __post_init__(self) -> None:
        """Check every field."""
        for name in SETTINGS:
            check_setting(name, getattr(self, name))
        OBJECTIVES[self.objective].check_options(self.objective, self.objective_options)
        check_seed(self.seed)


SETTINGS = {declared.name: declared for declared in fields(Recipe)}


def check_setting(name: str, value: Any) -> None:
    """Raise ValueError if a setting of `Recipe` cannot have this value: its type, its bounds, its choices.

    `objective_options` depend on the objective, and `Recipe` checks them.
    """
    properties, kind = SETTINGS[name].metadata, str(SETTINGS[name].type)
    if value is None and properties["optional"]:
        return
    if name == "epochs":
        fill_phases(value, DEFAULT_EPOCHS, name)
    if name == "learning_rate":
        fill_phases(value, LEARNING_RATES["sgd"], name)
    if properties["choices"] is not None and value not in properties["choices"]:
        raise unknown(name, value, properties["choices"])
    if kind.startswith(("int", "float")):
        number, noun = (Integral, "an integer") if kind.startswith("int") else (Real, "a number")
        if not isinstance(value, number) or isinstance(value, bool):
            raise ValueError(f"expected {name} to be {noun}, got {value!r}")
        if properties["bounds"] is not None and not properties["bounds"].contain(float(value)):
            raise ValueError(f"expected {name} {properties['bounds']}, got {value}")
    if kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"expected {name} to be true or false, got {value!r}")


@dataclass(frozen=True)
class ObjectiveChoice:
    """The objective that is taken where a user names none, and why: the end of a sentence after "because"."""

    name: str
    reason: str


def choose_batch_size(model: nn.Module, n: int) -> int:
    """Return the images per step that suit a model and n training images, if none are given: 128, 64 or 32.

    With few images, batches of 128 make so few steps that training does not get far (results/defaults, "Few images").
    A model with batch norm keeps 128, since its statistics are those of the batch.

    >>> [choose_batch_size(nn.Linear(2, 2), n) for n in (55_000, 5_120, 5_000, 1_294)]
    [128, 128, 64, 32]
    """
    size = BATCH_SIZE
    while size > SMALLEST_BATCH_SIZE and n < FEWEST_BATCHES * size and not has_batch_norm(model):
        size //= 2
    return size


def choose_objective(
    model: nn.Module,
    images: Images,
    threat: Threat,
    *,
    epochs: Any = None,
    batch_size: int | None = None,
    natural: bool = False,
) -> ObjectiveChoice:
    """Return the objective that suits a threat and a model.

    In large l-infinity balls it is `ibp`: what is proved of such a network exceeds what attacks leave of one that was
    trained against them (docs/method.md, "Objectives", has the figures). Otherwise it is the paper's `mixed`: in small
    balls, for other norms, for a network without interval bounds, and where `ibp` would make the network constant, with
    a dense phase of few steps, or with weights that were trained for something else.

    Args:
        model: on any device.
        images: of training.
        threat: the perturbations of training.
        epochs: as in `default_recipe`; without dense ones the model's weights count as trained.
        batch_size: images per step; by default those of `choose_batch_size`.
        natural: whether the method trains on clean images alone.

    Raises:
        ValueError: epochs of an unknown phase, or numbers that make no sense.
    """
    batch_size = choose_batch_size(model, len(images)) if batch_size is None else batch_size
    check_setting("batch_size", batch_size)
    steps = fill_phases(epochs, DEFAULT_EPOCHS, "epochs")["dense"] * batch_count(len(images), batch_size)
    if natural:
        return ObjectiveChoice("natural", "the method trains on clean images")
    if threat.name != "linf":
        return ObjectiveChoice("mixed", "proofs are for linf threats only")
    if threat.eps < LARGE_BALL:
        return ObjectiveChoice("mixed", f"training for proofs costs too much accuracy at an eps below {LARGE_BALL:g}")
    if 0 < steps < FEWEST_STEPS:
        reason = f"training for proofs takes {FEWEST_STEPS:,} steps or more, and the dense phase has {steps:,}"
        return ObjectiveChoice("mixed", reason)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        certified = interval_accuracy(model, images.to(device), threat, n=1 if steps else 100)
    except USER_CODE_ERRORS as error:  # a user's model, in which interval bounds may meet anything
        return ObjectiveChoice("mixed", (str(error) or type(error).__name__).splitlines()[0])
    if not steps and not certified.accuracy:
        return ObjectiveChoice("mixed", "interval bounds certify no image with the weights that are given")
    return ObjectiveChoice("ibp", f"at an eps of {LARGE_BALL:g} or more, proofs exceed what attacks leave otherwise")


def default_epochs(phases: Collection[str]) -> dict[str, int]:
    """Return the default epochs of a method with these phases; after `dense` every method has as many in all.

    >>> default_epochs(("dense", "l0", "tune"))
    {'dense': 20, 'l0': 20, 'admm': 0, 'tune': 5}
    """
    epochs = {phase: count if phase in phases else 0 for phase, count in DEFAULT_EPOCHS.items()}
    main = "l0" if "l0" in phases else "tune"
    epochs[main] += sum(DEFAULT_EPOCHS.values()) - sum(epochs.values()) if main in phases else 0
    return epochs


def default_recipe(model: nn.Module, *, phases: Collection[str] = PHASES, **settings: Any) -> Recipe:
    """Return a recipe from some settings; the others get the defaults that suit the model and the method.

    The default of `batch_size` is 128 here; `choose_batch_size` takes the number of images into account.

    A method that compresses without the phases l0 and admm trains in `tune`, with the rate of `l0`. A model with batch
    norm gets SGD, as is usual in adversarial training; one without gets AdamW, since SGD with the same rate often does
    not converge against large perturbations.

    Args:
        phases: of the method (`MethodSpec.phases`).
        settings: fields of `Recipe`; epochs and learning_rate may be one number for every phase or a dict of some.

    Raises:
        ValueError: an unknown setting, or a value that it cannot have.
    """
    for name in settings:
        if name not in SETTINGS:
            raise unknown("setting", name, SETTINGS, expected="a field of atmc.Recipe")
    if has_batch_norm(model):
        for name, declared in SETTINGS.items():
            if declared.metadata["with_batch_norm"] is not None:
                settings.setdefault(name, declared.metadata["with_batch_norm"])
    optimizer = settings.setdefault("optimizer", SETTINGS["optimizer"].default)
    objective = settings.setdefault("objective", SETTINGS["objective"].default)
    check_setting("optimizer", optimizer)
    check_setting("objective", objective)
    settings["epochs"] = fill_phases(settings.get("epochs"), default_epochs(phases), "epochs")
    rates = dict(LEARNING_RATES[optimizer])
    if "l0" not in phases:
        rates["tune"] = rates["l0"]
    settings["learning_rate"] = fill_phases(settings.get("learning_rate"), rates, "learning_rate")
    if OBJECTIVES[objective].certified:
        settings.setdefault("eps_ramp", settings["epochs"]["dense"] / 2)
        settings.setdefault("clip_norm", 10.0)
        settings.setdefault("equalize", True)
    settings["objective_options"] = OBJECTIVES[objective].fill_options(objective, settings.get("objective_options"))
    return Recipe(**settings)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether any module of the model is a batch norm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def fill_phases(given: Any, defaults: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a value for each phase, from one number for all or from a dict of some; the others get the defaults.

    Args:
        given: a number, a dict phase -> number, or None for the defaults.
        name: of the setting, ``epochs`` (integers) or ``learning_rate``.

    >>> fill_phases({"l0": 3}, {"dense": 20, "l0": 10}, "epochs")
    {'dense': 20, 'l0': 3}

    Raises:
        ValueError: an unknown phase, or a value that is not a number >= 0 (an integer for epochs).
    """
    if given is None:
        return dict(defaults)
    kind: Any = Integral if name == "epochs" else Real
    values = dict(given) if isinstance(given, Mapping) else dict.fromkeys(defaults, given)
    for phase, value in values.items():
        if phase not in defaults:
            raise unknown(f"phase of {name}", phase, defaults)
        if not (isinstance(value, kind) and 0 <= value < math.inf):
            raise ValueError(f"expected {name} >= 0 in phase {phase}, got {value!r}")
    return {**defaults, **values}
