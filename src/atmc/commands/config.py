"""A run's configuration, read from TOML: unknown keys are errors, and all errors are reported at once.

Values left open (``"auto"``, or a missing number) are chosen by `RunConfig.resolved` before the first step and written
to the run folder's config.toml, which therefore runs again to the same result.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_type_hints

import tomli_w
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from torch import nn

from atmc.compress.budget import Budget, parse_size
from atmc.core.rng import MAX_SEED
from atmc.evaluation.attacks import check_attacks, check_norm
from atmc.robust.objectives import OBJECTIVES, parse_objective
from atmc.robust.threats import Threat, parse_threat
from atmc.training.methods import check_method
from atmc.training.settings import SETTINGS, Recipe, check_setting, default_recipe

MAX_THREADS = 1024  # torch crashes where the system gives it no more


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


class _Section(BaseModel):
    """The section [training]: every setting of `Recipe`; what is missing is chosen by `default_recipe`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _fill_options(self) -> Self:
        """Write the objective's options out, so that a resumed run is compared with all of them."""
        values: Any = self
        if values.objective is None and values.objective_options is not None:
            raise ValueError("objective_options are given without an objective")
        if values.objective is not None:
            options = OBJECTIVES[values.objective].fill_options(values.objective, values.objective_options)
            values.objective_options = options or None
        return self


_FIELDS: Any = {
    name: _training_field(name, hint)
    for name, hint in get_type_hints(Recipe).items()
    if SETTINGS[name].metadata["section"] == "training"
}
Training: Any = create_model("Training", __base__=_Section, **_FIELDS)


class RunConfig(BaseModel):
    """One run: what to compress, against what, how small, and how it is judged."""

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
    training: Training = Training()  # a model that is made at run time, which mypy sees as Any

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        parse_threat(self.threat)
        check_attacks(self.attacks)
        for name in self.attacks:
            check_norm(name, parse_threat(self.threat))
        if isinstance(self.eval_n, dict):
            check_attacks(list(self.eval_n))
        for count in self.eval_n.values() if isinstance(self.eval_n, dict) else [self.eval_n]:
            if count is not None and count < 1:
                raise ValueError(f"expected eval_n >= 1, got {count}")
        if self.training.objective is not None:
            OBJECTIVES[self.training.objective].check_threat(self.training.objective, parse_threat(self.threat))
        self.budget()
        check_method(self.method, self.bits, max_bytes=self.max_bytes is not None)
        return self

    def budget(self) -> Budget:
        """The budget; `da` has none and keeps every weight."""
        if self.method == "da":
            if (self.ratio, self.nonzeros, self.max_bytes, self.bits) != (None, None, None, None):
                raise ValueError("method 'da' keeps every weight: leave out ratio, nonzeros, max_bytes and bits")
            return Budget(ratio=1.0)
        if [self.ratio, self.nonzeros, self.max_bytes].count(None) != 2:
            raise ValueError("give exactly one of ratio, nonzeros and max_bytes")
        size = None if self.max_bytes is None else parse_size(self.max_bytes)
        return Budget(ratio=self.ratio, nonzeros=self.nonzeros, max_bytes=size, bits=self.bits)

    def parsed_threat(self) -> Threat:
        """The threat."""
        return parse_threat(self.threat)

    def resolved(self) -> RunConfig:
        """With device, precision and thread count chosen for this machine.

        Raises:
            ValueError: CUDA asked for and absent.
        """
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise ValueError("device cuda was asked for, but torch sees no CUDA device here; use --device cpu")
        device = self.device if self.device != "auto" else "cuda" if cuda else "cpu"
        precision = self.precision if self.precision != "auto" else "bf16" if _fast_bf16(device) else "fp32"
        threads = self.threads or torch.get_num_threads()
        return self.model_copy(update={"device": device, "precision": precision, "threads": threads})

    def recipe(self, model: nn.Module) -> Recipe:
        """The training recipe, for a model whose kind chooses the optimizer."""
        given = {key: value for key, value in self.training.model_dump().items() if value is not None}
        if "exclude" in given:
            given["exclude"] = tuple(given["exclude"])
        if self.checkpoint and not isinstance(given.get("epochs"), int):  # trained already, unless told otherwise
            given["epochs"] = {"dense": 0, **given.get("epochs", {})}
        given["channels_last"] = self.layout != "contiguous"
        return default_recipe(model, **given, bf16=self.precision == "bf16", seed=self.seed)

    def completed(self, recipe: Recipe) -> RunConfig:
        """With every training setting written out as the recipe has it."""
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
        """The text of a config file that gives this configuration."""
        return tomli_w.dumps(_without_none(self.model_dump()))


def _fast_bf16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported())


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        ValueError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error


def parse(values: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """A checked configuration.

    Raises:
        ValueError: one message that names every unknown key (with the nearest known one) and every bad value.
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
        folder: the run folder. A run that is resumed without a file and a model has its own configuration.

    Raises:
        ValueError: as `read_toml` and `parse`; or there is no run to resume.
    """
    values = read_toml(file) if file else {}
    if resume and not values and options.get("model") is None:
        assert folder is not None
        if not (folder / "config.toml").exists():
            raise ValueError(f"there is no run in {folder} to resume")
        values = read_toml(folder / "config.toml")
    return parse(merge_options(values, options), str(file) if file else "options")


def merge_options(values: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration file with a command's options over them; see `configure`.

    A budget replaces the file's budget of whatever kind, epochs by phase only those of their phases, and an objective
    the file's objective with its options.
    """
    given = {key: value for key, value in options.items() if value is not None}
    budgets = {"ratio", "nonzeros", "max_bytes"}
    replaced = budgets if given.keys() & budgets else set()
    if given.get("method") == "da":  # which keeps every weight
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
        name: of the run, for the error.
    """
    ours, theirs = asked.model_dump(), stored.model_dump()
    pairs = {key: (ours[key], theirs[key]) for key in ours if key != "training"}
    for key, value in theirs["training"].items():  # an older run lacks settings that were added since: their defaults
        before = getattr(Recipe, key, None) if value is None else value
        pairs[f"training.{key}"] = (ours["training"][key], list(before) if isinstance(before, tuple) else before)
    changed = [f"{key} was {before!r}, is {now!r}" for key, (now, before) in pairs.items() if now != before]
    if changed:
        raise ValueError(f"{name} was begun with other settings: {'; '.join(changed)}")


def _describe(problem: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = Training.model_fields if problem["loc"][0] == "training" else RunConfig.model_fields
        near = get_close_matches(str(problem["loc"][-1]), list(known), n=1)
        return f"unknown key {where!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
