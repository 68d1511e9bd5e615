"""atmc.Engine: the inputs that it takes and refuses, and that it computes what PyTorch does."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

import atmc
from atmc.deploy.engine import dense, engine
from atmc.deploy.graph.simplify import simplify
from atmc.pack import artifact

RNG = np.random.default_rng(0)


def prune(model: nn.Module, share: float) -> nn.Module:
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < share)
    return model.eval()


def images_of(n: int, *shape: int) -> np.ndarray:
    return RNG.random((n, *shape), dtype=np.float32)


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    return prune(atmc.models.build("lenet", 10, seed=0), 0.05)


@pytest.fixture(scope="module")
def file(lenet, tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "model.atmc"
    atmc.save(lenet, path)
    return path


def logits_agree(logits: np.ndarray, model: nn.Module, images: np.ndarray) -> bool:
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    assert logits.dtype == np.float32
    return logits.shape == expected.shape and bool(
        np.abs(logits - expected).max(initial=0) <= 1e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize("n", [0, 1, 3, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_file_a_module_and_a_graph(n, threads, lenet, file):
    images = images_of(n, 1, 28, 28)
    for source in (file, str(file), lenet, simplify(lenet)):
        run = atmc.Engine(source, threads=threads)
        logits = run(images)
        assert logits.shape == (n, 10)
        assert n == 0 or logits_agree(logits, lenet, images)
        assert run.describe().startswith("sparse (")


def test_a_resnet_of_the_zoo():
    model = prune(atmc.models.build("resnet18", 7, seed=0, mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3]), 0.02)
    images = images_of(3, 3, 32, 32)
    assert logits_agree(atmc.Engine(model, threads=1)(images), model, images)


class Own(nn.Module):
    """A user's own class."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_a_users_own_class(tmp_path):
    model = prune(Own(5), 0.5)
    atmc.save(model, tmp_path / "own.atmc", input_shape=(3, 10, 10))
    images = images_of(4, 3, 10, 10)
    run = atmc.Engine(tmp_path / "own.atmc", factory=Own, threads=1, prefer="sparse")
    assert logits_agree(run(images), model, images)
    with pytest.raises(artifact.FactoryNeeded, match="give the factory"):
        atmc.Engine(tmp_path / "own.atmc")
    with pytest.raises(ValueError, match="input_shape"):
        atmc.Engine(model)
    assert logits_agree(atmc.Engine(model, input_shape=(3, 10, 10), prefer="sparse")(images), model, images)


@pytest.mark.parametrize("prefer", ["sparse", "dense", "auto"])
def test_networks_with_few_zeros_run_on_the_fastest_engine(prefer, monkeypatch):
    model = atmc.models.build("lenet", 10, seed=0).eval()
    images = images_of(20, 1, 28, 28)
    times = {"sparse": [3.0, 1.0, 3.0, 1.0], "dense": [2.0, 2.0]}  # at one image and at many; by one thread and by two

    def time_call(network, images):
        return times["sparse" if isinstance(network, engine.SparseNetwork) else "dense"][int(len(images) > 1)]

    monkeypatch.setattr(engine, "time_call", time_call)
    run = atmc.Engine(model, threads=1, prefer=prefer)
    assert logits_agree(run(images), model, images)
    assert logits_agree(run(images[:2]), model, images[:2])
    description = run.describe()
    if prefer == "auto":
        assert description.startswith("dense (")
        assert " below 16 images, else sparse (" in description
    else:
        assert description.startswith(f"{prefer} (")
        assert description.endswith("1 thread")


def test_without_onnxruntime_pytorch_is_the_dense_engine(monkeypatch, lenet):
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    run = atmc.Engine(lenet, threads=1, prefer="dense")
    assert run.describe() == "dense (PyTorch, channels_last), 1 thread"
    images = images_of(3, 1, 28, 28)
    assert logits_agree(run(images), lenet, images)


def test_images_of_any_strides(lenet, file):
    run = atmc.Engine(file, threads=1)
    images = images_of(6, 1, 28, 28)
    for view in (images[::2], images[..., ::-1], images.transpose(0, 1, 3, 2), np.asfortranarray(images)):
        assert logits_agree(run(view), lenet, np.ascontiguousarray(view))
    one = images[:1]
    first = run(one)
    kept = first.copy()
    run(images[1:2])
    np.testing.assert_array_equal(first, kept)  # a later call does not change what was returned


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 28, 28), np.float32), r"expected images of shape \(n, 1, 28, 28\), got \(1, 28, 28\)"),
        (np.zeros((2, 3, 28, 28), np.float32), r"got \(2, 3, 28, 28\)"),
        (np.zeros((2, 1, 28, 28)), "float32 in .0, 1., got float64"),
        (np.zeros((2, 1, 28, 28), np.uint8), "got uint8"),
        (torch.zeros(2, 1, 28, 28), "numpy array of float32 in .0, 1., got Tensor"),
        (np.full((2, 1, 28, 28), np.nan, np.float32), "expected finite images"),
        (np.full((1, 1, 28, 28), -np.inf, np.float32), "expected finite images"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, message, file):
    with pytest.raises(ValueError, match=message):
        atmc.Engine(file, threads=1)(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "expected threads >= 1 and <= 1024, a whole number, got 0"),
        ({"prefer": "fast"}, "unknown prefer 'fast': expected auto, sparse or dense"),
    ],
)
def test_wrong_options(options, message, file):
    with pytest.raises(ValueError, match=message):
        atmc.Engine(file, **options)


def test_files_that_are_no_model_of_this_version(tmp_path, file):
    data = bytearray(file.read_bytes())
    data[4] = 9
    (tmp_path / "future.atmc").write_bytes(data)
    with pytest.raises(artifact.UnsupportedVersion, match="version 9"):
        atmc.Engine(tmp_path / "future.atmc")
    (tmp_path / "torn.atmc").write_bytes(file.read_bytes()[:-30])
    with pytest.raises(artifact.ArtifactError):
        atmc.Engine(tmp_path / "torn.atmc")


def test_an_operator_that_it_does_not_know_is_named():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.SiLU(), nn.Flatten(), nn.Linear(2 * 6 * 6, 3))
    with pytest.raises(ValueError, match=r"^the engine cannot run the model: aten\.silu of layer 1 is not supported"):
        atmc.Engine(model, input_shape=(1, 8, 8))


def test_calls_from_several_threads(lenet, file):
    run, images = atmc.Engine(file, threads=2), images_of(40, 1, 28, 28)
    right = []

    def work(first: int) -> None:
        right.extend(logits_agree(run(part), lenet, part) for part in np.split(images[first:], 5) for _ in range(3))

    workers = [threading.Thread(target=work, args=(first,)) for first in (0, 20, 35)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 45
