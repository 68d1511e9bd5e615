"""atmc: image classifiers that are small and hard to fool at once."""

from atmc import models
from atmc.api import EvaluationWarning, Report, Result, compress, evaluate, load, save
from atmc.compress.budget import Budget
from atmc.data import load_data
from atmc.deploy.engine import Engine
from atmc.recipe import Recipe
from atmc.robust.threats import L1, L2, Linf, parse_threat
from atmc.version import __version__

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
    "__version__",
    "compress",
    "evaluate",
    "load",
    "load_data",
    "models",
    "parse_threat",
    "save",
]
