"""Sentences of errors that several parts raise."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(what: str, name: object, known: Iterable[str], *, expected: str | None = None) -> ValueError:
    """Build the error for a name that is not known; it names the nearest known one, if there is one.

    Args:
        what: what the name is of, such as "attack".
        name: the name that was given.
        known: the names that exist.
        expected: the list of names in words; by default all known ones, separated by commas.

    >>> raise unknown("attack", "pdg", ["pgd", "fgsm"])
    Traceback (most recent call last):
    ...
    ValueError: unknown attack 'pdg': expected one of pgd, fgsm; did you mean 'pgd'?
    """
    names = list(known)
    near = get_close_matches(str(name)[:200], names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {what} {name!r:.200}: expected {expected or 'one of ' + ', '.join(names)}{hint}")
