"""Numbers of other types than Python's mean what they say, or are refused with a true sentence."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import atmc
from atmc.core.arguments import AT_LEAST_ONE, POSITIVE, parse_real, parse_whole


@pytest.mark.parametrize(
    "half", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]), torch.tensor(0.5), Fraction(1, 2)]
)
def test_real_numbers_of_any_type(half):
    assert parse_real("eps", half, POSITIVE) == 0.5
    assert type(parse_real("eps", half, POSITIVE)) is float
    assert str(atmc.Linf(half)) == str(atmc.L2(half)).replace("l2", "linf") == "linf:0.5"
    assert atmc.Budget(ratio=half) == atmc.Budget(ratio=0.5)


@pytest.mark.parametrize("four", [4, 4.0, np.int8(4), np.uint64(4), np.float32(4), torch.tensor(4), Fraction(8, 2)])
def test_whole_numbers_of_any_type(four):
    assert parse_whole("bits", four, AT_LEAST_ONE) == 4
    assert type(parse_whole("bits", four, AT_LEAST_ONE)) is int
    assert atmc.Budget(nonzeros=four, bits=four) == atmc.Budget(nonzeros=4, bits=4)


@pytest.mark.parametrize(
    "value",
    ["0.1", None, True, np.True_, float("nan"), float("inf"), -1, 0, 1j, [0.5], np.zeros(2), torch.zeros(2), b"1"],
)
def test_what_is_no_positive_number_is_refused(value):
    for parse in (parse_real, parse_whole):
        with pytest.raises(ValueError, match=r"expected eps > ?=? ?[01].*, got "):
            parse("eps", value, POSITIVE if parse is parse_real else AT_LEAST_ONE)


@pytest.mark.parametrize(("size", "bytes_"), [("6kB", 6000), ("6 KiB", 6144), (np.int64(900), 900), (900.0, 900)])
def test_sizes_of_files_may_be_texts(size, bytes_):
    assert atmc.Budget(max_bytes=size).max_bytes == bytes_


@pytest.mark.parametrize("size", ["six", "6 gB", 0.5, -3, True])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match=r"expected (a size such as 24kB|max_bytes >= 1)"):
        atmc.Budget(max_bytes=size)
