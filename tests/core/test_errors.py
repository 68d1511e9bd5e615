"""The one sentence for a name that is not known."""

import pytest

from atmc.core.errors import did_you_mean, unknown

ATTACKS = ["pgd", "pgd-strong", "fgsm"]


@pytest.mark.parametrize(
    ("name", "expected", "sentence"),
    [
        ("pdg", None, "unknown attack 'pdg': expected one of pgd, pgd-strong, fgsm; did you mean 'pgd'?"),
        ("PGD", None, "unknown attack 'PGD': expected one of pgd, pgd-strong, fgsm; did you mean 'pgd'?"),
        ("zoo", None, "unknown attack 'zoo': expected one of pgd, pgd-strong, fgsm"),
        (7, None, "unknown attack 7: expected one of pgd, pgd-strong, fgsm"),
        ("pdg", "an attack of the table", "unknown attack 'pdg': expected an attack of the table; did you mean 'pgd'?"),
    ],
)  # fmt: skip
def test_unknown_lists_what_is_known_and_names_the_nearest(name, expected, sentence):
    error = unknown("attack", name, ATTACKS, expected=expected)
    assert isinstance(error, ValueError)
    assert str(error) == sentence


def test_unknown_takes_any_iterable_of_names():
    assert str(unknown("key", "b", {"a": 1}.keys())) == "unknown key 'b': expected one of a"


def test_a_long_name_is_cut():
    assert len(str(unknown("attack", "x" * 10**6, ATTACKS))) < 300


def test_the_hint_keeps_the_known_names_case():
    assert did_you_mean("linff", ["Linf", "L2"]) == "; did you mean 'Linf'?"
    assert did_you_mean("zzz", ["Linf", "L2"]) == did_you_mean("Linf", []) == ""
