"""An engine in other processes and threads than the one that made it, and on images that are not in [0, 1]."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import atmc

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
TIMEOUT = 60  # seconds until a child counts as hanging


def make_engine(prefer="sparse", threads=2):
    model = atmc.models.build("lenet", 10, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.2)
    return atmc.Engine(model, threads=threads, prefer=prefer)


def make_images(n, seed=0):
    return np.random.default_rng(seed).random((n, 1, 28, 28), np.float32)


IMAGES = make_images(300)  # enough for several chunks per thread


def send_logits(engine, queue):
    queue.put(engine(IMAGES))


def run_in_child(method, engine):
    """Return the logits that a child process computes."""
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=send_logits, args=(engine, queue))
    child.start()
    waiting = threading.Thread(target=lambda: results.append(queue.get()), daemon=True)
    results = []
    waiting.start()
    waiting.join(TIMEOUT)
    child.join(TIMEOUT if results else 0)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0
    return results[0]


@FORKS
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("prefer", ["sparse", "dense"])
def test_a_fork_computes_as_its_parent(prefer):
    engine = make_engine(prefer)
    expected = engine(IMAGES)
    assert np.array_equal(run_in_child("fork", engine), expected)
    assert np.array_equal(engine(IMAGES), expected)


@FORKS
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_during_a_call_of_another_thread_computes_as_its_parent():
    engine = make_engine()
    expected = engine(IMAGES)
    with engine._lock:  # as another thread's call would hold it
        assert np.array_equal(run_in_child("fork", engine), expected)


@FORKS
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("work", ["engine(IMAGES)", "pass"])
def test_a_fork_ends_as_any_program(work):
    """Python closes what it holds at the end, unless multiprocessing ends the process. ONNX Runtime cannot do this."""
    code = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_engine_processes import make_engine, IMAGES
engine = make_engine()
engine(IMAGES)
if not (child := os.fork()):
    {work}
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.stdout, done.returncode) == ("7\n", 0), done.stderr


def test_a_spawned_process_gets_an_engine_that_was_pickled():
    engine = make_engine()
    assert np.array_equal(run_in_child("spawn", engine), engine(IMAGES))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine))])
@pytest.mark.parametrize("prefer", ["sparse", "dense"])
def test_copies_run_the_same(copied, prefer):
    engine = make_engine(prefer)
    other = copied(engine)
    assert other.describe() == engine.describe()
    assert np.array_equal(other(IMAGES), engine(IMAGES))
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        other(IMAGES * 2)


def test_several_threads_call_one_engine():
    engine = make_engine()
    batches = [make_images(n, seed=n) for n in (1, 5, 40, 300)]
    expected = [engine(batch) for batch in batches]
    wrong = []

    def call(index):
        for _ in range(20):
            if not np.array_equal(engine(batches[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x * 255, r"values in \[0, 1\], got values from .* to 25\d"),
        (lambda x: (x - 0.13) / 0.31, r"values in \[0, 1\], got values from -0.4"),
        (lambda x: np.where(x == x.max(), np.float32(1.001), x), r"got values from .* to 1.001;"),
        (lambda x: np.where(x == x.min(), np.float32(-0.001), x), r"got values from -0.001 to"),
        (lambda x: np.where(x == x.max(), np.float32(np.nan), x), "got nan or infinity"),
        (lambda x: np.where(x == x.max(), np.float32(-np.inf), x), "got nan or infinity"),
    ],
)
def test_images_that_are_not_in_the_unit_range_are_refused(change, sentence):
    engine = make_engine(threads=1)
    with pytest.raises(ValueError, match=sentence):
        engine(change(IMAGES).astype(np.float32))


def test_the_check_of_the_range_can_be_lifted():
    model = atmc.models.build("lenet", 10, seed=0).eval()
    engine = atmc.Engine(model, threads=1, prefer="sparse", check_range=False)
    images = make_images(4) * 3 - 1
    with torch.no_grad():
        assert np.allclose(engine(images), model(torch.from_numpy(images)).numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="got nan or infinity"):
        engine(images * np.float32(np.inf))


def test_values_a_hair_outside_and_negative_zero_are_clipped():
    engine = make_engine(threads=1)
    images = make_images(2)
    images[0, 0, :2, 0] = 0, 1
    odd = images.copy()
    odd[0, 0, :2, 0] = -1e-6, 1.000001
    assert np.array_equal(engine(odd), engine(images))
    odd[0, 0, 0, 0] = -0.0
    assert np.array_equal(engine(odd), engine(images))


@pytest.mark.parametrize("threads", [2.0, np.int64(2), torch.tensor(2)])
def test_whole_numbers_of_threads_of_any_type(threads):
    assert make_engine(threads=threads).threads == 2


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True, 2000, float("nan")])
def test_other_numbers_of_threads_are_refused(threads):
    with pytest.raises(ValueError, match="expected threads >= 1 and <= 1024, a whole number, got"):
        make_engine(threads=threads)
