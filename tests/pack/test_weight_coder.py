"""The coder of tensors: bit-for-bit round trips, code lengths near the floor, and untrusted bytes."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import SHAPES, random_counts, same_bits, weights

from atmc.pack import coder_run, other_tensors, weight_coder
from atmc.pack.arithmetic import DECODE, ENCODE
from atmc.pack.coder_run import Stream
from atmc.pack.other_tensors import decode_other_tensors, encode_other_tensors
from atmc.pack.weight_coder import CodeLengths, CodingError, Layout, entropy_bits, log2_binomial


def has_ideal_length(length: int, bits: float) -> bool:
    """Return whether a code has its ideal length, but for zero bytes that are cut off and the bytes of its end."""
    return -9 - 1e-4 * bits / 8 <= length - bits / 8 <= 4 + 1e-4 * bits / 8


@given(weights(), st.booleans(), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_a_weight_round_trips_bit_for_bit(weight, hinted, seed):
    values, shape = weight
    layout = Layout.of(shape)
    counts = random_counts(shape[1] if len(shape) > 1 else 1, seed) if hinted else None
    data, lengths = weight_coder.encode_matrix(values, layout, counts)
    decoded, decoded_lengths = weight_coder.decode_matrix(data, layout, counts)
    assert same_bits(decoded, values)
    assert decoded_lengths == lengths
    assert has_ideal_length(len(data), lengths.total)
    assert weight_coder.encode_matrix(decoded, layout, counts)[0] == data


def encode_and_decode(values: np.ndarray, shape: tuple[int, ...], seed: int) -> tuple[object, ...]:
    """Return all that coding a weight and other tensors gives: bytes, code lengths, and the decoded values' bytes."""
    layout, counts = Layout.of(shape), random_counts(shape[1] if len(shape) > 1 else 1, seed)
    others = [("bias", values.reshape(-1)[:50]), ("steps", np.array([seed, -1]))]
    kinds = [(role, array.dtype, len(array)) for role, array in others]
    matrix, packed = weight_coder.encode_matrix(values, layout, counts), encode_other_tensors(others)
    decoded = weight_coder.decode_matrix(matrix[0], layout, counts)[0].tobytes()
    return matrix, packed, decoded, [array.tobytes() for array in decode_other_tensors(packed[0], kinds)[0]]


@given(weights(), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_compiled_and_plain_functions_give_the_same_bits(weight, seed):
    results = []
    for functions in (coder_run.compile_functions(), coder_run.plain_functions()):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coder_run, "select_functions", lambda decisions, chosen=functions: chosen)
            results.append(encode_and_decode(*weight, seed))
    assert results[0] == results[1]


def test_without_numba_the_plain_functions_serve(monkeypatch):
    values = uniform((50, 80), 500, 4, seed=0)
    coder_run.compile_functions.cache_clear()
    with_numba = encode_and_decode(values, (50, 80), 0)
    monkeypatch.setitem(sys.modules, "numba", None)
    coder_run.compile_functions.cache_clear()
    assert coder_run.select_functions(10**9) is coder_run.plain_functions()
    assert encode_and_decode(values, (50, 80), 0) == with_numba
    coder_run.compile_functions.cache_clear()


TYPES = [np.float32, np.float64, np.int64, np.int32, np.uint8, np.bool_]


@given(st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 30), st.integers(0, 9)), max_size=8))
@settings(max_examples=100, deadline=None)
def test_small_tensors_round_trip_bit_for_bit(drawn):
    tensors = []
    for i, (kind, size, seed) in enumerate(drawn):
        rng = np.random.default_rng(seed)
        values = rng.integers(-2, 3, size).astype(np.float64)
        if seed % 3 == 0 and kind in (np.float32, np.float64):
            values = rng.standard_normal(size) * 10.0 ** rng.integers(-40, 38)
        tensors.append(
            (
                ["bias", "weight", f"b{i}"][seed % 3],
                values.astype(np.int64 if kind is np.uint8 else np.float64).astype(kind),
            )
        )
    data, lengths = encode_other_tensors(tensors)
    arrays, decoded_lengths = decode_other_tensors(
        data, [(role, values.dtype, len(values)) for role, values in tensors]
    )
    assert decoded_lengths == lengths
    assert has_ideal_length(len(data), sum(lengths))
    for (_, values), decoded in zip(tensors, arrays, strict=True):
        assert decoded.dtype == values.dtype
        expected = values + np.float32(0) if values.dtype == np.float32 else values
        assert decoded.tobytes() == expected.tobytes()


def test_small_tensors_of_more_roles_than_have_contexts_of_their_own(monkeypatch):
    monkeypatch.setattr(other_tensors, "MAX_SETS", 3)
    tensors = [(f"role{i}", np.array([i, 0, 0.1], np.float32)) for i in range(9)]
    data, _ = encode_other_tensors(tensors)
    arrays, _ = decode_other_tensors(data, [(role, values.dtype, 3) for role, values in tensors])
    assert all(np.array_equal(a, b) for a, (_, b) in zip(arrays, tensors, strict=True))


def test_constants_and_zeros_cost_next_to_nothing():
    assert len(encode_other_tensors([("bias", np.full(10_000, 0.5, np.float32))])[0]) <= 3
    assert len(encode_other_tensors([("bias", np.zeros(10_000, np.float32))])[0]) <= 3
    assert weight_coder.encode_matrix(np.zeros((100, 100), np.float32), Layout.of((100, 100))) == (b"", CodeLengths())
    assert len(weight_coder.encode_matrix(np.full((100, 100), -3, np.float32), Layout.of((100, 100)))[0]) <= 8


def uniform(shape: tuple[int, ...], nonzeros: int, levels: int, seed: int) -> np.ndarray:
    """Draw a weight with nonzeros at uniformly random positions."""
    rng = np.random.default_rng(seed)
    values = np.zeros(math.prod(shape), np.float32)
    book = rng.standard_normal(levels).astype(np.float16).astype(np.float32)
    values[rng.choice(len(values), nonzeros, replace=False)] = rng.choice(book, nonzeros)
    return values


def floor(values: np.ndarray) -> float:
    """Return log2 C(N, k) + k H(codes), bits."""
    nonzero = values[values != 0]
    return log2_binomial(values.size, len(nonzero)) + entropy_bits(nonzero)


@pytest.mark.parametrize(
    ("shape", "nonzeros", "levels"),
    [
        ((500, 800), 2_000, 4),
        ((500, 800), 20_000, 16),
        ((64, 64, 3, 3), 3_000, 8),
        ((50, 20, 5, 5), 12_000, 64),
        ((10, 500), 2_500, 2),
        ((256, 300), 40_000, 256),
    ],
)
def test_on_uniform_positions_within_3_percent_of_the_floor(shape, nonzeros, levels):
    values = uniform(shape, nonzeros, levels, seed=levels)
    lengths = weight_coder.encode_matrix(values, Layout.of(shape))[1]
    assert lengths.positions + lengths.values <= 1.03 * floor(values)


@given(
    st.sampled_from([(100, 200), (20, 2000), (1500, 30), (32, 48, 3, 3), (30, 25, 5, 5)]),
    st.floats(0.1, 0.95),
    st.integers(0, 6),
    st.integers(0, 999),
)
@settings(max_examples=8, deadline=None)
def test_never_above_5_percent_over_the_floor(shape, density, bits, seed):
    """The tensors have more than 2,000 nonzeros, and at least 40 per value of the codebook."""
    nonzeros = max(int(density * math.prod(shape)), 2001)
    values = uniform(shape, nonzeros, min(2**bits, nonzeros // 40), seed)
    lengths = weight_coder.encode_matrix(values, Layout.of(shape))[1]
    assert lengths.positions + lengths.values <= 1.05 * floor(values)


def test_dead_rows_and_columns_cost_next_to_nothing():
    """Positions cost what the live rows and columns cost, and at most four bits per dead row or column."""
    rng = np.random.default_rng(0)
    live = uniform((150, 160), 2_400, 1, seed=1)
    values = np.zeros((300, 400), np.float32)
    rows, columns = np.sort(rng.permutation(300)[:150]), np.sort(rng.permutation(400)[:160])
    values[np.ix_(rows, columns)] = live.reshape(150, 160)
    lengths = weight_coder.encode_matrix(values, Layout.of((300, 400)))[1]
    assert lengths.positions <= 1.05 * floor(live) + 4 * (150 + 240)
    assert lengths.positions < 0.8 * floor(values)


def test_dead_inputs_are_known_from_the_weight_before():
    """Columns fed by rows without nonzeros are expected to be empty: the hint makes the positions shorter."""
    rng = np.random.default_rng(0)
    fed = rng.integers(0, 2, 120) * 9
    values = np.where((rng.random((60, 120)) < 0.2) & (fed > 0), np.float32(1), np.float32(0))
    layout = Layout.of((60, 120))
    hinted, plain = (
        weight_coder.encode_matrix(values, layout, counts)[1].positions for counts in (fed.astype(np.int64), None)
    )
    assert hinted < plain - 60


class TestNeighbors:
    """Contexts of a value's row, input channel and neighbors make codes shorter if values depend on these."""

    def sizes(self, values: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
        """Return the bits of the values with and without the contexts of neighbors; both codes decode to the values."""
        bits = []
        layout = Layout.of(values.shape)
        for limit in (weight_coder.MAX_NEIGHBOR_SIDES, 0):
            monkeypatch.setattr(weight_coder, "MAX_NEIGHBOR_SIDES", limit)
            data, lengths = weight_coder.encode_matrix(values, layout)
            assert np.array_equal(weight_coder.decode_matrix(data, layout)[0], values.reshape(-1))
            bits.append(lengths.values)
        return bits[0], bits[1]

    @pytest.mark.parametrize("plain", [False, True])
    def test_signs_shared_in_a_kernel(self, plain, monkeypatch):
        rng = np.random.default_rng(0)
        sign = np.where(rng.random((30, 30, 1, 1)) < 0.5, -1.0, 1.0)
        size = 1 + rng.random((30, 30, 3, 3)) if plain else rng.integers(1, 5, (30, 30, 3, 3))
        kept = rng.random((30, 30, 3, 3)) < 0.7
        near, alone = self.sizes((sign * size * kept).astype(np.float32), monkeypatch)
        assert near < alone - 0.4 * kept.sum()  # of the bit that a sign takes

    @pytest.mark.parametrize("axis", [0, 1])
    def test_signs_of_rows_and_columns(self, axis, monkeypatch):
        rng = np.random.default_rng(1)
        sign = (
            np.where(rng.random((60, 60)) < 0.5, -1.0, 1.0)[:1] if axis else np.where(rng.random((60, 1)) < 0.5, -1, 1)
        )
        kept = rng.random((60, 60)) < 0.5
        near, alone = self.sizes((sign * rng.integers(1, 3, (60, 60)) * kept).astype(np.float32), monkeypatch)
        assert near < alone - 0.5 * kept.sum()

    def test_sizes_of_neighbors(self, monkeypatch):
        rng = np.random.default_rng(2)
        large = np.repeat(rng.random((40, 40, 1)) < 0.5, 9, axis=2).reshape(40, 40, 3, 3)
        values = (np.where(large, 3, 1) + rng.integers(0, 2, large.shape)) * rng.choice([-1, 1], large.shape)
        near, alone = self.sizes(values.astype(np.float32), monkeypatch)
        assert near < alone - 0.4 * values.size

    def test_nothing_to_learn_costs_next_to_nothing(self, monkeypatch):
        values = uniform((50, 60, 3, 3), 3000, 16, seed=3)
        near, alone = self.sizes(values, monkeypatch)
        assert near <= alone + 1


class TestUntrustedBytes:
    """Any bytes give a CodingError, or finite values of the right shape."""

    @given(st.one_of(st.binary(max_size=60), st.integers(0, 40).map(lambda n: b"\xff" * n)), st.sampled_from(SHAPES))
    @settings(max_examples=200, deadline=None)
    def test_random_bytes(self, data, shape):
        layout = Layout.of(shape)
        try:
            values, _ = weight_coder.decode_matrix(data, layout)
        except CodingError:
            return
        assert values.shape == (math.prod(shape),)
        assert np.isfinite(values).all()

    @given(st.binary(max_size=60), st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 30)), max_size=5))
    @settings(max_examples=100, deadline=None)
    def test_random_bytes_as_small_tensors(self, data, kinds):
        asked = [("bias", np.dtype(kind), size) for kind, size in kinds]
        try:
            arrays, _ = decode_other_tensors(data, asked)
        except CodingError:
            return
        assert [(values.dtype, len(values)) for values in arrays] == [(dtype, size) for _, dtype, size in asked]
        assert all(np.isfinite(values).all() for values in arrays)

    def test_plain_bits_beyond_all_parts(self):
        """A code above the last of an interval's equal parts, which no encoder writes, is read as cut off."""
        reader = Stream(DECODE, data=b"\xff" * 40)
        contexts = reader.new_tree_contexts(1, 0)
        reader.code_symbols(np.zeros(3, np.int64), 2, 1, 1, contexts)  # leaves an interval that is no power of two
        numbers = [reader.code_number(11) for _ in range(30)]
        assert min(numbers) >= 0
        assert max(numbers) < 2**11
        assert reader.over_read

    def test_a_short_code_of_a_large_tensor_is_given_up_early(self):
        """The decoder stops at the end of the bytes, not after 800 million values."""
        data = weight_coder.encode_matrix(uniform((20, 2000), 3000, 2, seed=0), Layout.of((20, 2000)))[0]
        with pytest.raises(CodingError, match=r"cut off|out of range"):
            weight_coder.decode_matrix(data[: len(data) // 2], Layout.of((20, 2000)))
        with pytest.raises(CodingError, match="the code is cut off"):
            decode_other_tensors(b"\x55" * 40, [("ids", np.dtype(np.int64), 100_000_000)])

    def code(self, *numbers: tuple[int, int]) -> bytes:
        writer = Stream(ENCODE, room=200)
        for width, number in numbers:
            writer.code_number(width, number)
        return writer.finish()

    @pytest.mark.parametrize(
        ("numbers", "message"),
        [
            ([(1, 0), (2, 3)], "there is no group size 3, only 1"),
            ([(1, 0), (2, 0), (1, 0), (1, 0), (1, 0), (3, 0)], "cut off"),
        ],
    )
    def test_malformed_headers_are_refused(self, numbers, message):
        with pytest.raises(CodingError, match=message):
            weight_coder.decode_matrix(self.code(*numbers), Layout(2, 3))

    def test_contexts_for_more_sides_than_are_allowed(self):
        wide = Layout(1, weight_coder.MAX_NEIGHBOR_SIDES)
        with pytest.raises(CodingError, match="too many rows and channels for contexts of neighbors"):
            weight_coder.decode_matrix(self.code((1, 0), (2, 0), (1, 0), (1, 0), (1, 1), (3, 0)), wide)

    def test_values_that_are_not_finite(self, monkeypatch):
        monkeypatch.setattr(weight_coder, "flatten_finite", lambda values: values.reshape(-1))
        for value in (np.nan, np.inf):
            array = np.array([[value, 1]], np.float32)
            with pytest.raises(CodingError, match="not finite"):
                weight_coder.decode_matrix(weight_coder.encode_matrix(array, Layout.of((1, 2)))[0], Layout.of((1, 2)))

    def test_a_codebook_value_that_no_float16_has(self):
        writer = Stream(ENCODE, room=100)
        for width, number in ((1, 0), (2, 0), (1, 1), (1, 1), (8, 0), (1, 0), (3, 0)):
            writer.code_number(width, number)
        writer.code_ascending(np.array([70_000]))
        with pytest.raises(CodingError, match="codebook value is out of range"):
            weight_coder.decode_matrix(writer.finish(), Layout(2, 3))

    def test_a_truth_value_is_0_or_1(self):
        data = encode_other_tensors([("flag", np.array([0, 1, 2], np.uint8))])[0]
        with pytest.raises(CodingError, match="neither 0 nor 1"):
            decode_other_tensors(data, [("flag", np.dtype(np.bool_), 3)])


def test_values_that_cannot_be_written():
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="expected finite values"):
            weight_coder.encode_matrix(np.array([[value]], np.float32), Layout.of((1, 1)))
        for kind in (np.float32, np.float64):
            with pytest.raises(ValueError, match="expected finite values"):
                encode_other_tensors([("bias", np.array([value], kind))])
    with pytest.raises(CodingError, match="4,194,304 together"):
        Layout.of((3, 2**22))


def test_floors():
    assert log2_binomial(10, 0) == pytest.approx(0, abs=1e-9)
    assert entropy_bits(np.array([1, 1, 2, 2])) == 4
    assert entropy_bits(np.array([])) == 0
    assert CodeLengths(1, 2, 3, 4).total == 10
