"""The sparse engine computes what PyTorch does, on every kernel, for any batch, threads and contents of memory."""

import itertools
from functools import cache

import numpy as np
import pytest
from compilers import find_compiler
from networks import EXTREMES, chain, distance, floats, images_of, logits_of, random_graph, with_classifier

from atmc.deploy.engine import native, numba_kernel, sparse
from atmc.deploy.engine.program import KINDS, build_program
from atmc.deploy.engine.sparse import SparseNetwork, allocate_aligned, open_kernel
from atmc.deploy.engine.steps import lower
from atmc.deploy.graph.graph import AvgPool, Conv, Flatten, Graph, Linear, MaxPool, Relu

NATIVE = [("native", name, threads) for name in native.instruction_sets() for threads in (1, 2)]
KERNELS = [*NATIVE, ("numba", None, 1)]  # test_the_kernel_is_built_if_there_is_a_compiler: there is a native one
BATCHES = (1, 2, 5, 17)


@pytest.fixture(params=KERNELS, ids=lambda row: "-".join(str(part) for part in row if part), scope="module")
def kernel(request):
    name, instructions, threads = request.param
    return {"kernel": name, "instructions": instructions, "threads": threads}


@cache
def expected_of(key: object, n: int) -> tuple[Graph, np.ndarray, np.ndarray]:
    graph = EXTREMES[key] if isinstance(key, str) else random_graph(key) if isinstance(key, int) else single(*key)
    images = images_of(graph, n)
    return graph, images, logits_of(graph, images)


def expect_agreement(kernel: dict, key: object, n: int) -> None:
    graph, images, expected = expected_of(key, n)
    network = SparseNetwork(graph, **kernel)
    assert distance(network(images), expected) < 1e-5, (key, n)


def single(*geometry: object) -> Graph:
    """Build a convolution or a pool, and a layer that reads all of its output."""
    rng = np.random.default_rng(len(repr(geometry)))
    match geometry:
        case "conv", stride, padding, kernel, dilation, groups:
            weight = floats(rng, 8, 4 // groups, *kernel, density=0.3)
            options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            return with_classifier(chain((4, 9, 8), Conv(weight, floats(rng, 8), **options), Relu()))
        case "max", kernel, stride, padding, dilation, ceil_mode:
            return with_classifier(chain((2, 9, 8), MaxPool(kernel, stride, padding, dilation, ceil_mode)))
        case "mean", kernel, stride, padding, ceil_mode, count:
            return with_classifier(chain((2, 9, 8), AvgPool(kernel, stride, padding, ceil_mode, count), Relu(0.6)))
    raise AssertionError(geometry)


def test_the_kernel_is_built_if_there_is_a_compiler():
    name = find_compiler("C++")
    assert native.instruction_sets(), f"there is {name} but no kernel of this version: pip install -e ."
    assert "portable" in native.instruction_sets()


def test_numba_runs_every_kind_of_operation():
    assert numba_kernel.NAMES == KINDS


@pytest.mark.parametrize("seed", range(0, 60, 12))
def test_random_networks(kernel, seed):
    for key in range(seed, seed + 12):
        for n in BATCHES:
            expect_agreement(kernel, key, n)


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(kernel, name):
    for n in BATCHES:
        expect_agreement(kernel, name, n)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(kernel, groups):
    strides, paddings = [(1, 1), (2, 2), (2, 1), (3, 2)], [(0, 0), (1, 1), (2, 1), (1, 3)]
    for rest in itertools.product(strides, paddings, [(3, 3), (1, 1), (5, 2)], [(1, 1), (2, 1)]):
        expect_agreement(kernel, ("conv", *rest, groups), 3)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pools(kernel, ceil_mode):
    windows = [((2, 2), (0, 0)), ((2, 2), (1, 1)), ((3, 2), (1, 0)), ((1, 3), (0, 1))]
    for (size, padding), stride in itertools.product(windows, [(1, 1), (2, 2), (3, 2)]):
        for dilation in [(1, 1), (2, 3)] if padding == (0, 0) else [(1, 1)]:
            expect_agreement(kernel, ("max", size, stride, padding, dilation, ceil_mode), 3)
        for count in (False, True):
            expect_agreement(kernel, ("mean", size, stride, padding, ceil_mode, count), 3)


@pytest.mark.parametrize("seed", range(4))
def test_outputs_four_at_a_time(kernel, seed, monkeypatch):
    every = dict.fromkeys((*(f"native, {name}" for name in native.instruction_sets()), "numba"), 0.0)
    monkeypatch.setattr(sparse, "FOUR_COST", every)
    for key in range(5 * seed, 5 * seed + 5):
        graph, _, _ = expected_of(key, 1)
        for n in BATCHES:
            expect_agreement(kernel, key, n)
    kinds = {KINDS[kind] for kind in build_program(lower(graph, four_cost=0.0), 2).ops["kind"]}
    assert "convolve_fours" in kinds


def test_any_number_of_images(kernel):
    graph = EXTREMES["fork"]
    network = SparseNetwork(graph, **kernel)
    assert network(images_of(graph, 0)).shape == (0, 5)
    images = images_of(graph, 5 * network.chunk + 3)  # enough for threads to take whole chunks
    assert network.chunk > 1
    expected = logits_of(graph, images)
    for n in (len(images), network.chunk + 1, network.chunk, 1, len(images)):
        assert distance(network(images[:n]), expected[:n]) < 1e-5


@pytest.mark.parametrize("key", [*range(20), *EXTREMES])
def test_images_do_not_affect_each_other(kernel, key):
    graph, images, _ = expected_of(key, 5)
    network = SparseNetwork(graph, **kernel)
    before = network(images)
    for other in (1e6, -1e6):
        changed = np.full_like(images, other)
        changed[2] = images[2]
        np.testing.assert_array_equal(network(changed)[2], before[2])


@pytest.mark.parametrize("key", [*range(20), *EXTREMES])
@pytest.mark.parametrize("garbage", [1e30, -1e30])
def test_earlier_contents_of_memory_do_not_matter(kernel, key, garbage):
    runs, name = open_kernel(**kernel)
    for n in (1, 5):
        graph, images, _ = expected_of(key, n)
        program = build_program(lower(graph, four_cost=sparse.FOUR_COST.get(name, np.inf)), n)
        logits = np.empty((n, program.classes), np.float32)
        arena = np.full_like(allocate_aligned(program.arena_floats), garbage)
        runs.bind(program, arena, images, logits)()
        np.testing.assert_array_equal(logits, SparseNetwork(graph, **kernel)(images))


@pytest.mark.parametrize("instructions", [*native.instruction_sets(), "numba"])
def test_results_do_not_depend_on_the_number_of_threads(instructions):
    options = {"kernel": "numba"} if instructions == "numba" else {"instructions": instructions}
    for seed in range(20):
        graph, images, _ = expected_of(seed, 5)
        one, *others = (SparseNetwork(graph, threads=n, **options)(images) for n in (1, 2, 5))
        for logits in others:
            np.testing.assert_array_equal(logits, one)


def test_a_kernel_may_change_its_program_and_its_memory(kernel):
    graph, images, expected = expected_of(0, 5)
    network = SparseNetwork(graph, **kernel)
    for _ in range(2):
        for n in (5, 1, 2, 3, 4, 5):  # more batch sizes than are kept
            assert distance(network(images[:n]), expected[:n]) < 1e-5
    program, logits = network.program(5), np.empty_like(expected, np.float32)
    runs, _ = open_kernel(**kernel)
    for _ in range(2):
        runs.bind(program, allocate_aligned(program.arena_floats), images, logits)()
        assert distance(logits, expected) < 1e-5


def test_invalid_graphs_and_arguments_are_refused():
    with pytest.raises(ValueError, match=r"ends in \(n, classes\)"):
        SparseNetwork(chain((1, 4, 4), Relu()))
    graph = EXTREMES["fork"]
    with pytest.raises(ValueError, match="unknown kernel 'cuda': expected native or numba"):
        SparseNetwork(graph, kernel="cuda")
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"expected at least one thread, got {threads}"):
            SparseNetwork(graph, threads=threads)
    if NATIVE:
        with pytest.raises(ValueError, match="unknown instruction set 'neon': expected one of"):
            SparseNetwork(graph, instructions="neon")


def test_without_the_native_kernel_numba_serves(monkeypatch):
    monkeypatch.setattr(native, "instruction_sets", list)
    graph, images, expected = expected_of(0, 2)
    network = SparseNetwork(graph)
    assert network.kernel_name == "numba"
    assert distance(network(images), expected) < 1e-5
    with pytest.raises(ValueError, match="the native kernel was not built"):
        SparseNetwork(graph, kernel="native")


def test_a_batch_that_32_bit_offsets_cannot_address_is_refused():
    steps = lower(EXTREMES["fork"])
    with pytest.raises(ValueError, match="a batch of 40000000 images needs"):
        build_program(steps, 40_000_000)


def test_features_of_any_width_are_scaled_and_added():
    width, rng = 30_000, np.random.default_rng(0)  # a dense diagonal would take 3.6 GB
    graph = chain((1, 1, width), Flatten(), Relu(), Linear(floats(rng, 2, width), floats(rng, 2)))
    images = images_of(graph, 2) - 0.5
    assert distance(SparseNetwork(graph)(images), logits_of(graph, images)) < 1e-5
