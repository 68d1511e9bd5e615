"""Build the errors that several parts raise, so that each sentence is written once."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_MAX_SHOWN = 200  # characters of a name that is compared and shown: names may come from untrusted files


def unknown(what: str, name: object, known: Iterable[str], *, expected: str | None = None) -> ValueError:
    """Build the error for a name that is not known; it names the nearest known one, if one is near.

    Args:
        what: what the name is of, such as "attack".
        name: the name that was given.
        known: the names that exist.
        expected: the known names in words, if a list of all of them would not do.

    >>> raise unknown("attack", "pdg", ["pgd", "fgsm"])
    Traceback (most recent call last):
    ...
    ValueError: unknown attack 'pdg': expected one of pgd, fgsm; did you mean 'pgd'?
    """
    names = list(known)
    expected = expected or f"one of {', '.join(names)}"
    return ValueError(f"unknown {what} {name!r:.{_MAX_SHOWN}}: expected {expected}{did_you_mean(name, names)}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the end of a sentence that names the known name nearest to a name, "" if none is near.

    Upper and lower case count as equal.

    >>> did_you_mean("Pdg", ["pgd", "fgsm"])
    "; did you mean 'pgd'?"
    """
    by_lower_case = {text.lower(): text for text in known}
    near = get_close_matches(str(name)[:_MAX_SHOWN].lower(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[near[0]]!r}?" if near else ""
