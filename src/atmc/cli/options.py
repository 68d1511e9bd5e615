"""Options that several commands share, and help texts that list names from the library's tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

ModelFile = Annotated[Path, typer.Argument(help="Model file (.atmc).")]
OwnClass = Annotated[str | None, typer.Option(help="package.module:factory, if the file is of your own class.")]
THREAT_HELP = "What the adversary may do, in pixel units, such as linf:8/255, l2:0.5 or l1:12."
Threat = Annotated[str, typer.Option(help=THREAT_HELP)]
ImageColumn = Annotated[str | None, typer.Option(help="Column of the images, if the data set has several of them.")]
LabelColumn = Annotated[
    str | None, typer.Option(help="Column of the labels, if it is called neither label nor fine_label.")
]
OverwriteFiles = Annotated[bool, typer.Option("--overwrite/--no-overwrite", help="Replace output files that exist.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this JSON file.")]


class Command(TyperCommand):
    """A command whose help may contain names of `LISTS` in braces; a list is imported when the help is shown."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the command, with the lists in place of their names."""
        for parameter in self.params:
            if isinstance(parameter, TyperArgument | TyperOption) and parameter.help:
                parameter.help = re.sub(r"\{(\w+)\}", lambda match: LISTS[match[1]](), parameter.help)
        super().format_help(ctx, formatter)


def split_names(text: str) -> list[str]:
    """Split names at commas.

    >>> split_names("pgd, fgsm")
    ['pgd', 'fgsm']
    """
    return [name.strip() for name in text.split(",")]


def _attacks() -> str:
    from atmc.evaluation.attacks import ATTACKS

    return ", ".join(ATTACKS)


def _epochs() -> str:
    """Return the default number of epochs of each phase."""
    from atmc.training.settings import DEFAULT_EPOCHS

    return ", ".join(f"{phase}={epochs}" for phase, epochs in DEFAULT_EPOCHS.items())


def _losses() -> str:
    from atmc.robust.attacks import LOSSES

    return ", ".join(LOSSES)


def _methods() -> str:
    from atmc.training.methods import METHODS

    return ", ".join(METHODS)


def _models() -> str:
    from atmc.models import NAMES

    return ", ".join(NAMES)


def _objectives() -> str:
    """Return the names of the training objectives, each with its options at their defaults."""
    from atmc.robust.objectives import OBJECTIVES

    options = {
        name: ",".join(f"{option}={value.default:g}" for option, value in spec.options.items())
        for name, spec in OBJECTIVES.items()
    }
    return ", ".join(f"{name}:{options[name]}" if options[name] else name for name in OBJECTIVES)


LISTS: dict[str, Callable[[], str]] = {
    "attacks": _attacks,
    "epochs": _epochs,
    "losses": _losses,
    "methods": _methods,
    "models": _models,
    "objectives": _objectives,
}
