"""atmc: image classifiers that are small and hard to fool at once.

Public names are imported on first use (PEP 562), so that ``import atmc`` and ``atmc --help`` do not load torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from atmc.core.version import __version__

if TYPE_CHECKING:
    from atmc import models
    from atmc.api import compress, evaluate, load, save, verify
    from atmc.compress.budget import Budget
    from atmc.data import load_data
    from atmc.deploy.engine.engine import Engine
    from atmc.evaluation.evaluate import EvaluationWarning, Report
    from atmc.evaluation.verify.verify import Verification
    from atmc.robust.threats import L1, L2, Linf, parse_threat
    from atmc.training.job import Result
    from atmc.training.settings import Recipe

_HOME = {  # public name -> the module that defines it
    "Budget": "atmc.compress.budget",
    "Engine": "atmc.deploy.engine.engine",
    "EvaluationWarning": "atmc.evaluation.evaluate",
    "L1": "atmc.robust.threats",
    "L2": "atmc.robust.threats",
    "Linf": "atmc.robust.threats",
    "Recipe": "atmc.training.settings",
    "Report": "atmc.evaluation.evaluate",
    "Result": "atmc.training.job",
    "Verification": "atmc.evaluation.verify.verify",
    "compress": "atmc.api",
    "evaluate": "atmc.api",
    "load": "atmc.api",
    "load_data": "atmc.data",
    "parse_threat": "atmc.robust.threats",
    "save": "atmc.api",
    "verify": "atmc.api",
}
__all__ = [
    "L1",
    "L2",
    "Budget",
    "Engine",
    "EvaluationWarning",
    "Linf",
    "Recipe",
    "Report",
    "Result",
    "Verification",
    "__version__",
    "compress",
    "evaluate",
    "load",
    "load_data",
    "models",
    "parse_threat",
    "save",
    "verify",
]


_ROOMS = ("api", "core", "data", "deploy", "evaluation", "models", "pack", "report", "robust", "training")


def __getattr__(name: str) -> Any:
    """Import a public name, or a subpackage, on first use, and keep it."""
    if name in _ROOMS:
        return importlib.import_module(f"atmc.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'atmc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*__all__, *_ROOMS})


class _Package(ModuleType):
    """The package ``atmc``: the import of the subpackage ``atmc.compress`` must not hide the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "compress" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
