"""Values of weights to encode, shared by the tests of the coder and of the second decoder."""

import numpy as np
from hypothesis import strategies as st

SHAPES = [(1, 1), (1, 40), (40, 1), (7, 30), (30, 45), (4, 3, 3, 3), (5, 4, 1, 5), (3, 2, 7), (2, 3, 20, 20), (60,)]
KINDS = {
    "codebook": np.array([1.5, -2.0, 0.25, 0.1, -0.1], np.float32),
    "one value": np.array([-0.75], np.float32),
    "far apart": np.array([1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38, 65504, 65536, 6e-8, 1.0], np.float32),
    "signed zeros": np.array([0.0, -0.0, -0.0, 1.0], np.float32),
}


@st.composite
def weights(draw) -> tuple[np.ndarray, tuple[int, ...]]:
    """Draw a weight, of few values, float16, float32 or any finite bits, with some share of zeros; and its shape."""
    shape = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from([*KINDS, "fp16", "fp32", "any bits"]))
    if kind in KINDS:
        values = rng.choice(KINDS[kind], shape)
    elif kind == "any bits":
        values = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
        values[~np.isfinite(values)] = 0
    else:
        values = rng.standard_normal(shape).astype(np.float16 if kind == "fp16" else np.float32).astype(np.float32)
    density = draw(st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]))
    return np.where(rng.random(shape) < density, values, np.float32(0)), shape


def random_counts(rows: int, seed: int) -> np.ndarray:
    """Draw input counts: the nonzeros of each row of the weight before."""
    return np.random.default_rng(seed).integers(0, 20, rows).astype(np.int64)


def same_bits(one: np.ndarray, two: np.ndarray) -> bool:
    """Return whether float32 values are equal bit for bit, but for the sign of a zero."""
    plain = [(values.reshape(-1) + np.float32(0)).view(np.uint32) for values in (one, two)]
    return np.array_equal(*plain)
