"""Draw values to project and quantize, shared by the tests of projections and of k-means."""

import torch
from hypothesis import strategies as st
from torch import Tensor

few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1e-30])
any_values = st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def distance(x: Tensor, q: Tensor) -> float:
    return float(((x.double() - q.double()) ** 2).sum())
