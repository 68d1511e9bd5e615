"""A run's configuration, read from TOML: unknown keys are errors, and all errors are reported at once.

Values left open (``"auto"``, or a missing number) are chosen by `RunConfig.resolved` before the first step and written
to the run folder's config.toml, which therefore runs again to the same result.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from atmc.api import DEFAULT_EPOCHS, LEARNING_RATES, by_phase, default_recipe
from atmc.compress.budget import Budget, parse_size
from atmc.methods import check_method
from atmc.recipe import Recipe
from atmc.rng import MAX_SEED
from atmc.robust.protocols import check_attacks, check_norm
from atmc.robust.threats import L2, Threat, parse_threat

MAX_THREADS = 1024  # torch crashes where the system gives it no more


class Training(BaseModel):
    """The section [training]: fields of `phases.Recipe`; what is missing is chosen by `api.default_recipe`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    epochs: dict[str, int] | int | None = None
    learning_rate: dict[str, float] | float | None = None
    objective: Literal["natural", "gaussian", "mixed", "pgd_at", "trades", "mart"] | None = None
    attack_steps: int | None = Field(default=None, ge=1)
    relative_step: float | None = Field(default=None, gt=0)
    random_start: bool | None = None
    batch_statistics: bool | None = None
    optimizer: Literal["adamw", "sgd"] | None = None
    weight_decay: float | None = Field(default=None, ge=0)
    batch_size: int | None = Field(default=None, ge=1)
    warmup: float | None = Field(default=None, ge=0, lt=1)
    eps_ramp: float | None = Field(default=None, ge=0)
    gradual: float | None = Field(default=None, ge=0, le=1)
    regrow: float | None = Field(default=None, ge=1)
    rho: float | None = Field(default=None, gt=0)
    interval: int | None = Field(default=None, ge=1)
    balance: bool | None = None
    factor_start: Literal["identity", "svd"] | None = None
    exclude: list[str] | None = None
    augment: Literal["none", "crop", "flip", "crop-flip"] | None = None
    val_n: int | None = Field(default=None, ge=1)
    val_clean_n: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Training:
        by_phase(self.epochs, DEFAULT_EPOCHS, "epochs")
        by_phase(self.learning_rate, LEARNING_RATES["sgd"], "learning_rate")
        return self


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
    training: Training = Training()

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
        if self.training.objective == "gaussian" and not isinstance(parse_threat(self.threat), L2):
            raise ValueError(f"objective 'gaussian' is for l2 threats, whose eps is its sigma, got {self.threat}")
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
