"""The configuration of a run, read from TOML: unknown keys are errors, and one message reports all errors.

`RunConfig.resolved` and `RunConfig.completed` choose the values that are left open (``"auto"``, or missing) before the
first step. They are written to the run folder's config.toml, which therefore gives the same result again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

import tomli_w
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from torch import nn

from atmc.commands.outputs import CONFIG
from atmc.compress.budget import Budget, parse_size
from atmc.core.errors import did_you_mean
from atmc.core.rng import MAX_SEED
from atmc.data import Images
from atmc.evaluation.attacks import check_attacks, check_norm
from atmc.robust.objectives import OBJECTIVES, parse_objective
from atmc.robust.threats import Threat, parse_threat
from atmc.training.methods import METHODS, find_method, keeps_every_weight
from atmc.training.settings import (
    SETTINGS,
    ObjectiveChoice,
    Recipe,
    check_setting,
    choose_objective,
    default_recipe,
)

MAX_THREADS = 1024  # torch crashes if the system refuses it a thread


def _training_field(name: str, hint: Any) -> tuple[Any, Any]:
    """Return (type, pydantic field) of the key of [training] for one setting, checked as `Recipe` checks it."""
    properties = SETTINGS[name].metadata
    in_toml = {
        "epochs": dict[str, int] | int,
        "learning_rate": dict[str, float] | float,
        "objective_options": dict[str, float],
        "exclude": list[str],
    }

    def check(value: Any) -> Any:
        check_setting(name, value)
        return value

    kind: Any = str if properties["choices"] else in_toml.get(name, hint)
    return Annotated[kind, AfterValidator(check)] | None, Field(default=None, description=properties["help"])


class _TrainingSection(BaseModel):
    """The section [training]: the settings of `Recipe`; `default_recipe` chooses those that are missing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fill_options(self) -> Self:
        """Write the objective's options out, so that a resumed run is compared with all of them."""
        values: Any = self
        if values.objective is None and values.objective_options is not None:
            raise ValueError("objective_options are given without an objective: name it too")
        if values.objective is not None:
            options = OBJECTIVES[values.objective].fill_options(values.objective, values.objective_options)
            values.objective_options = options or None
        return self


_FIELDS: Any = {
    name: _training_field(name, hint)
    for name, hint in get_type_hints(Recipe).items()
    if SETTINGS[name].metadata["section"] == "training"
}
Training: Any = create_model("Training", __base__=_TrainingSection, **_FIELDS)


class RunConfig(BaseModel):
    """One run: the model, the data, the threat, the budget, and how to train and to evaluate."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    data: str
    threat: str
    method: str = "atmc"
    ratio: float | None = None
    nonzeros: int | None = None
    max_bytes: str | int | None = None
    bits: int | None = None
    checkpoint: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    limit: int | None = Field(default=None, ge=1)
    normalize: bool = True
    dropout: float | None = Field(default=None, ge=0, lt=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=MAX_THREADS)
    layout: Literal["auto", "channels_last", "contiguous"] = "auto"
    attacks: list[str] = ["pgd"]
    steps: int | None = Field(default=None, ge=1)
    eval_n: int | dict[str, int] | None = None
    checks: bool = True
    verify: bool | None = None  # by default, if the objective trains for proofs
    training: Training = Training()  # a class made at run time, which mypy sees as Any

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        """Check the values that depend on each other, or on tables of names."""
        parse_threat(self.threat)
        check_attacks(self.attacks)
        if not self.attacks:
            raise ValueError("expected at least one attack")
        for name in self.attacks:
            check_norm(name, parse_threat(self.threat))
        if isinstance(self.eval_n, dict):
            check_attacks(list(self.eval_n))
        for count in self.eval_n.values() if isinstance(self.eval_n, dict) else [self.eval_n]:
            if count is not None and count < 1:
                raise ValueError(f"expected eval_n >= 1, got {count}")
        if self.training.objective is not None:
            OBJECTIVES[self.training.objective].check_threat(self.training.objective, parse_threat(self.threat))
        find_method(self.method, self.bits, max_bytes=self.max_bytes is not None)
        self.budget()
        return self

    def budget(self) -> Budget:
        """Return the budget; a method that does not compress has none and keeps every weight."""
        if not METHODS[self.method].compresses:
            if (self.ratio, self.nonzeros) != (None, None):
                raise ValueError(keeps_every_weight(self.method))
            return Budget(ratio=1.0)
        if [self.ratio, self.nonzeros, self.max_bytes].count(None) != 2:
            raise ValueError("give exactly one of ratio, nonzeros and max_bytes")
        size = None if self.max_bytes is None else parse_size(self.max_bytes)
        return Budget(ratio=self.ratio, nonzeros=self.nonzeros, max_bytes=size, bits=self.bits)

    def parsed_threat(self) -> Threat:
        """Return the threat."""
        return parse_threat(self.threat)

    def resolved(self) -> RunConfig:
        """Return the configuration with device, precision and thread count chosen for this machine.

        Raises:
            ValueError: CUDA is asked for, and this machine has none.
        """
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise ValueError("device cuda was asked for, but torch sees no CUDA device here; use --device cpu")
        device = self.device if self.device != "auto" else "cuda" if cuda else "cpu"
        precision = self.precision if self.precision != "auto" else "bf16" if _fast_bf16(device) else "fp32"
        threads = self.threads or torch.get_num_threads()
        return self.model_copy(update={"device": device, "precision": precision, "threads": threads})

    def training_settings(self) -> dict[str, Any]:
        """Return the settings of `Recipe` that are given, as arguments of `default_recipe`."""
        given = {key: value for key, value in self.training.model_dump().items() if value is not None}
        if "exclude" in given:
            given["exclude"] = tuple(given["exclude"])
        if self.checkpoint and not isinstance(given.get("epochs"), int):  # the weights are trained already
            given["epochs"] = {"dense": 0, **given.get("epochs", {})}
        given["channels_last"] = self.layout != "contiguous"
        return given | {"bf16": self.precision == "bf16", "seed": self.seed}

    def recipe(self, model: nn.Module) -> Recipe:
        """Return the training recipe; defaults depend on the model, see `default_recipe`."""
        return default_recipe(model, phases=METHODS[self.method].phases, **self.training_settings())

    def choose_objective(self, model: nn.Module, images: Images) -> ObjectiveChoice:
        """Return the objective that is taken if none is named, see `training.settings.choose_objective`."""
        settings = self.training_settings()
        given = {key: settings[key] for key in ("epochs", "batch_size") if key in settings}
        return choose_objective(model, images, self.parsed_threat(), **given, natural=METHODS[self.method].natural)

    def with_training(self, **values: Any) -> RunConfig:
        """Return the configuration with other values in its section [training]."""
        return self.model_copy(update={"training": self.training.model_copy(update=values)})

    def completed(self, recipe: Recipe) -> RunConfig:
        """Return the configuration with every training setting as the recipe has it."""
        fields = {name: getattr(recipe, name) for name in Training.model_fields}
        fields |= {
            "epochs": dict(recipe.epochs),
            "learning_rate": dict(recipe.learning_rate),
            "exclude": list(recipe.exclude),
            "objective_options": dict(recipe.objective_options) or None,
        }
        layout = "channels_last" if recipe.channels_last else "contiguous"
        return self.model_copy(update={"training": Training(**fields), "layout": layout})

    def to_toml(self) -> str:
        """Return the text of a config file that gives this configuration."""
        return tomli_w.dumps(_without_none(self.model_dump()))


def _fast_bf16(device: str) -> bool:
    """Return whether a device, "cpu" or "cuda", has instructions for bfloat16."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def _without_none(value: Any) -> Any:
    """Return nested dicts without their None values, which TOML cannot express."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file into a dict.

    Raises:
        ValueError: the file cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error


def parse(values: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Check values and return the configuration.

    Args:
        values: keys of `RunConfig`.
        source: their origin, which the error names.

    Raises:
        ValueError: one message that names every unknown key (with the nearest known one) and every wrong value.
    """
    try:
        return RunConfig(**values)
    except ValidationError as error:
        problems = [_describe(dict(problem)) for problem in error.errors()]
        raise ValueError(f"{source}: " + "; ".join(problems)) from None


def configure(
    options: Mapping[str, Any], *, file: Path | None = None, folder: Path | None = None, resume: bool = False
) -> RunConfig:
    """Return the configuration of a run: the options of a command over the values of a file.

    Args:
        options: keys of `RunConfig`, and `epochs`, `objective` ("trades:beta=3") and `val_n` of its section
            [training]; None if an option was not given.
        file: the configuration file, if one was given.
        folder: the run folder; a run that is resumed without file and model continues with the configuration there.

    Raises:
        ValueError: as `read_toml` and `parse`; or there is no run to resume.
    """
    values = read_toml(file) if file else {}
    if resume and not values and options.get("model") is None:
        assert folder is not None
        if not (folder / CONFIG).exists():
            raise ValueError(f"there is no run in {folder} to resume")
        values = read_toml(folder / CONFIG)
    return parse(merge_options(values, options), str(file) if file else "options")


def merge_options(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration file with a command's options over them; see `configure`.

    A budget replaces the file's budget of whatever kind, epochs by phase only those of their phases, and an objective
    the file's objective with its options.
    """
    given = {key: value for key, value in options.items() if value is not None}
    budgets = {"ratio", "nonzeros", "max_bytes"}
    replaced = budgets if given.keys() & budgets else set()
    method = METHODS.get(given.get("method", ""))
    if method is not None and not method.compresses:
        replaced = budgets | {"bits"}
    training: dict[str, Any] = {key: given.pop(key) for key in ("epochs", "objective", "val_n") if key in given}
    merged = {key: value for key, value in values.items() if key not in replaced} | given
    if not training:
        return merged
    section = dict(values.get("training", {}))
    if isinstance(training.get("epochs"), dict) and isinstance(section.get("epochs"), dict):
        training["epochs"] = section["epochs"] | training["epochs"]
    if "val_n" in training:
        training["val_clean_n"] = training["val_n"]
    if "objective" in training:
        training["objective"], training["objective_options"] = parse_objective(training["objective"])
    return merged | {"training": section | training}


def check_same(asked: RunConfig, stored: RunConfig, name: str) -> None:
    """Raise ValueError if the settings of a run that is to be resumed differ from those that it was started with.

    Args:
        asked: complete, see `RunConfig.completed`.
        stored: as read from the run's folder.
        name: what the error calls the run.
    """
    ours, theirs = asked.model_dump(), stored.model_dump()
    pairs = {key: (ours[key], theirs[key]) for key in ours if key != "training"}
    for key, value in theirs["training"].items():  # what an older run lacks, since it was added later, is the default
        before = getattr(Recipe, key, None) if value is None else value
        pairs[f"training.{key}"] = (ours["training"][key], list(before) if isinstance(before, tuple) else before)
    changed = [f"{key} was {before!r}, is {now!r}" for key, (now, before) in pairs.items() if now != before]
    if changed:
        raise ValueError(f"{name} was started with other settings: {'; '.join(changed)}")


def _describe(problem: dict[str, Any]) -> str:
    """Return one of pydantic's errors as a sentence."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = Training.model_fields if problem["loc"][0] == "training" else RunConfig.model_fields
        return f"unknown key {key!r}{did_you_mean(problem['loc'][-1], known)}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message
