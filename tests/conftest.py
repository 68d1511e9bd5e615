"""Shared fixtures: one thread, so that results do not depend on the machine; data and a model."""

import pytest
import torch

from atmc import models
from atmc.data import Data, Images, load_data


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits() -> Data:
    return load_data("digits")


@pytest.fixture(scope="session")
def few(digits) -> tuple[Images, Images]:
    """Return a few digits for training and validation."""
    return digits.train.take(slice(0, 256)), digits.val.take(slice(0, 100))


@pytest.fixture
def lenet():
    return models.build("lenet", 10, seed=0)
