"""The terminal that commands print to."""

from __future__ import annotations

import sys

from rich.console import Console

console = Console(width=None if sys.stdout.isatty() else 150)
NARROW = 110  # a terminal of fewer columns gets short forms, which fit 80


def is_narrow() -> bool:
    """Return whether the terminal gets the short forms."""
    return console.width < NARROW


def say(text: str) -> None:
    """Print text as it is, without rich's markup: names may hold square brackets."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)
