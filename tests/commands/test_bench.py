"""`atmc bench` and the dense engines: they compute what PyTorch does, and the verdict follows from the times."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import StringIO
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

import atmc
from atmc.cli.bench_tables import bench_tables
from atmc.cli.main import main
from atmc.commands.bench import bench, inputs, worker
from atmc.commands.bench.figures import (
    compare_logits,
    describe_fastest,
    format_factor,
    format_milliseconds,
    summarize_times,
)
from atmc.commands.bench.worker import KINDS, TINY_SHAPE, EngineKind, ModelFiles, Worker, build_tiny
from atmc.deploy.engine import dense
from atmc.deploy.export import onnx_export
from atmc.deploy.graph.graph import run_graph
from atmc.deploy.graph.simplify import simplify

IMAGES = np.random.default_rng(0).random((5, 1, 28, 28), np.float32)


@pytest.fixture
def pruned(lenet):
    """Return a LeNet in which nine tenths of the weights are zero."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lenet.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=noise) < 0.1).mul_(3)
    return lenet.eval()


@pytest.fixture
def expected(pruned):
    with torch.no_grad():
        return pruned(torch.from_numpy(IMAGES)).numpy()


@pytest.fixture
def file(pruned, tmp_path):
    atmc.save(pruned, tmp_path / "model.atmc", input_shape=(1, 28, 28))
    return tmp_path / "model.atmc"


def error(logits, expected):
    return np.abs(logits - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("channels_last", [False, True])
def test_torch_runs_a_module_and_restores_the_thread_count(pruned, expected, channels_last):
    before = torch.get_num_threads()
    assert error(dense.open_torch(pruned, before + 1, channels_last=channels_last)(IMAGES), expected) < 1e-5
    assert torch.get_num_threads() == before


def test_onnxruntime_in_float32_and_in_int8(pruned, expected):
    model = onnx_export.to_bytes(simplify(pruned))
    assert error(onnx_export.open_runtime(model, 1)(IMAGES), expected) < 1e-5
    int8 = dense.quantize_int8(model, IMAGES)
    assert 1e-4 < error(onnx_export.open_runtime(int8, 1)(IMAGES), expected) < 0.1
    weights = [tensor.data_type for tensor in onnx.load_from_string(int8).graph.initializer if len(tensor.dims) > 1]
    assert weights == [onnx.TensorProto.INT8] * 4


def test_openvino_in_float32_and_in_its_own_precision(pruned, expected):
    model = onnx_export.to_bytes(simplify(pruned))
    exact = dense.open_openvino(model, 1, precision="f32")
    for images, logits in ((IMAGES, expected), (IMAGES[:1], expected[:1]), (IMAGES, expected)):
        assert error(exact(images), logits) < 1e-5
    assert error(dense.open_openvino(model, 1)(IMAGES), expected) < 0.03
    assert dense.openvino_precision() in ("f32", "bf16", "f16")


def test_the_fastest_dense_engine_is_onnxruntime_if_installed_else_torch(pruned, expected, monkeypatch):
    graph = simplify(pruned)
    name, run = dense.open_fastest(graph, 1)
    assert name == "ONNX Runtime"
    assert error(run(IMAGES), expected) < 1e-5
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    name, run = dense.open_fastest(graph, 1)
    assert name == "PyTorch, channels_last"
    assert error(run(IMAGES), run_graph(graph, torch.from_numpy(IMAGES)).numpy()) < 1e-5


def test_summary_of_calls():
    summary = summarize_times([0.004, 0.001, 0.002, 0.003, 0.005], 6)
    assert summary == {
        "median_ms": pytest.approx(3),
        "q1_ms": pytest.approx(2),
        "q3_ms": pytest.approx(4),
        "images_per_second": pytest.approx(2000),
        "calls": 5,
    }


def test_comparison_with_labels_and_with_pytorch():
    logits = np.array([[1, 2], [5, 3], [0, 1]], np.float32)
    compared = compare_logits(logits, np.array([[1, 2], [3, 10], [0, 1]], np.float32), np.array([1, 0, 0]))
    assert compared == {"accuracy": pytest.approx(2 / 3), "same_top1": 2, "difference": pytest.approx(0.7)}
    assert compare_logits(logits, None, None) == {"accuracy": None}


def row(engine, precision, low, median, high, accuracy=None):
    times = {"threads": 1, "batch": 8, "q1_ms": low, "median_ms": median, "q3_ms": high}
    return {"engine": engine, "precision": precision, "accuracy": accuracy, "times": [times]}


def verdict(*rows):
    return describe_fastest({"threads": [1], "batches": [8], "engines": [row("atmc", "float32", 1.9, 2, 2.1), *rows]})


def test_the_verdict_names_the_fastest_engine_and_the_factor():
    assert verdict() == ["1 thread, batch 8: atmc takes 2.00 ms; there is nothing to compare it with."]
    fast, slow = row("A", "float32", 29, 30, 31), row("B", "float32", 90, 90, 90)
    assert verdict(fast, slow) == [
        "1 thread, batch 8: atmc takes 2.00 ms, 15.0 times as fast as the fastest of the others (A, 30.0 ms)."
    ]
    assert verdict(fast, row("C", "bfloat16", 1, 1, 1, 0.5)) == [
        "1 thread, batch 8: atmc takes 2.00 ms, 2.00 times as slow as the fastest of the others (C bfloat16, 1.00 ms, "
        "50.0% right) and 15.0 times as fast as the fastest of the others in float32 (A, 30.0 ms)."
    ]
    assert "about as long as the fastest of the others (A, 2.05 ms)." in verdict(row("A", "float32", 2.0, 2.05, 2.2))[0]


def test_a_narrow_terminal_gets_whole_words():
    times = {"threads": 1, "q1_ms": 1.2e-2, "median_ms": 1.21e-2, "q3_ms": 1.22e-2, "images_per_second": 123456.0}
    shared = {
        "precision": "float32",
        "load_bytes": 123456789,
        "run_bytes": {"1": None, "64": 1},
        "file_bytes": 44734328,
    }
    compared = {"accuracy": 0.9876, "same_top1": 1000, "difference": 1e-7}
    rows = [
        {"engine": name, "times": [times | {"batch": batch} for batch in (1, 64)], **shared, **compared}
        for name in ("atmc", "OpenVINO, its default")
    ]
    rows[0]["runs"] = "sparse (native, avx512), 1 thread"
    figures = {"model": "m.atmc", "data": "digits", "images": 1000, "batches": [1, 64], "threads": [1]}
    figures |= {
        "macs": {"dense": 1000, "left": 10},
        "engines": rows,
        "left_out": {"A": "not installed"},
        "verdict": ["V."],
    }
    for width in (80, 150):
        console = Console(width=width, record=True, file=StringIO())
        for table in bench_tables(figures, narrow=width < 110):
            console.print(table)
        printed = console.export_text()
        for words in (
            "OpenVINO, its default",
            "0.0121",
            "44,734,328",
            "98.76%",
            "1,000 dense, 10 left (1.00%)",
            "left out: A",
        ):
            assert words in printed
        assert ("[0.0120, 0.0122]" in printed) == (width == 150)


def test_numbers_have_three_digits():
    assert [format_milliseconds(value) for value in (0.01234, 1.234, 12.34, 1234.5)] == [
        "0.0123",
        "1.23",
        "12.3",
        "1,234",
    ]
    assert [format_factor(value) for value in (1.234, 12.34, 123.4)] == ["1.23", "12.3", "123"]


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None if name == "openvino" else name)
    reasons = inputs.find_missing_packages()
    assert set(reasons) == {kind.name for kind in KINDS if kind.name.startswith("OpenVINO")}
    assert set(reasons.values()) == {"not installed: openvino; pip install 'atmc[bench]'"}


def test_an_onnx_model_that_cannot_be_made_leaves_its_engines_out(pruned, tmp_path, monkeypatch):
    def refused(*arguments):
        raise ValueError("no such operator")

    monkeypatch.setattr(inputs.dense, "quantize_int8", refused)
    write = partial(inputs.write_forms, input_shape=(1, 28, 28))
    files, left_out = write(tmp_path, tmp_path / "m", pruned, simplify(pruned), calibration=IMAGES)
    assert files.module.exists()
    assert files.dense.exists()
    assert left_out == dict.fromkeys(
        ("ONNX Runtime int8", "OpenVINO int8"), "not quantized: ValueError: no such operator"
    )
    monkeypatch.setattr(inputs.onnx_export, "to_bytes", refused)
    _, left_out = write(tmp_path, tmp_path / "m", pruned, simplify(pruned), calibration=IMAGES)
    assert set(left_out) == {kind.name for kind in KINDS if "onnx" in kind.packages}


def tiny_files(path):
    """Return a `ModelFiles` whose files are all at one path, for engines that do not read them."""
    forms = dict.fromkeys(("model", "module", "dense", "int8", "plain"), path)
    return ModelFiles(**forms, input_shape=TINY_SHAPE)


def test_a_worker_measures_the_memory_of_its_engine(monkeypatch, tmp_path):
    megabytes = 1 << 18

    def load(files, threads):
        weights = np.ones(100 * megabytes if files.factory is None else 1, np.float32)
        return lambda images: images * weights[0] + np.ones(50 * megabytes, np.float32)[:1], {}

    monkeypatch.setattr(worker, "KINDS", (EngineKind("heavy", "float32", (), "model", load),))
    files = tiny_files(tmp_path)
    heavy = Worker("heavy", files, replace(files, factory="tiny"))
    loaded, run = heavy.load(1)["load_bytes"], heavy.warm_up(IMAGES)["run_bytes"]
    if not Path("/proc/self/clear_refs").exists():  # elsewhere than on Linux
        assert (loaded, run) == (None, None)
        return
    assert 95e6 < loaded < 140e6
    assert 145e6 < run < 200e6


def test_a_worker_says_why_loading_failed(monkeypatch, tmp_path):
    def load(files, threads):
        raise KeyError("Conv")

    monkeypatch.setattr(worker, "KINDS", (EngineKind("broken", "float32", (), "model", load),))
    files = tiny_files(tmp_path)
    pipe, worker_pipe = Pipe()
    pipe.send(("load", (1,)))
    thread = threading.Thread(target=worker.serve, args=(worker_pipe, "broken", files, files))
    thread.start()
    assert pipe.recv() == (False, "KeyError: 'Conv'")
    pipe.close()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_an_unexpected_error_ends_a_worker(monkeypatch, tmp_path):
    class Unexpected(Exception):
        pass

    def load(files, threads):
        raise Unexpected

    monkeypatch.setattr(worker, "KINDS", (EngineKind("broken", "float32", (), "model", load),))
    files = tiny_files(tmp_path)
    pipe, worker_pipe = Pipe()
    pipe.send(("load", (1,)))
    with pytest.raises(Unexpected):
        worker.serve(worker_pipe, "broken", files, files)


def test_a_failure_of_onnxruntime_is_one_sentence():
    with pytest.raises(RuntimeError, match="onnxruntime cannot load the model: "):
        onnx_export.open_runtime(b"no model")


def test_a_tiny_network_needs_the_whole_decoder():
    model = build_tiny()
    assert model(torch.zeros(2, *TINY_SHAPE)).shape == (2, 64)
    weight = model[3].weight
    assert weight.count_nonzero() < weight.numel()
    assert len(weight.unique()) == 7


GROUPED = """
from torch import nn

def build(num_classes):
    layers = nn.Conv2d(1, 8, 3, stride=3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(648, num_classes)
    return nn.Sequential(*layers)
"""


@pytest.fixture
def in_threads(monkeypatch):
    """Run workers in threads, which start faster than processes."""

    @contextmanager
    def threaded_worker(kind, files, tiny_files):
        pipe, worker_pipe = Pipe()
        thread = threading.Thread(target=worker.serve, args=(worker_pipe, kind.name, files, tiny_files))
        thread.start()
        yield pipe
        pipe.close()
        thread.join(timeout=10)

    monkeypatch.setattr(bench, "start_worker", threaded_worker)
    monkeypatch.setattr(bench, "ROUND_SECONDS", 0.0)


def run(request):
    *progress, last = bench.bench(request)
    assert all(isinstance(event, bench.BenchStatus) for event in progress)
    return last.figures


def test_every_engine_is_timed_on_the_same_images(file, in_threads, tmp_path):
    path = tmp_path / "figures.json"
    request = bench.BenchRequest(
        file=file, data="digits", threads=(1,), batches=(1, 3), reps=2, n=50, json_path=path, unsimplified=True
    )
    figures = run(request)
    assert json.loads(path.read_text()) == figures
    assert {row["engine"] for row in figures["engines"]} | set(figures["left_out"]) == {kind.name for kind in KINDS}
    accuracies = {row["engine"]: row["accuracy"] for row in figures["engines"]}
    assert accuracies["atmc"] == accuracies["PyTorch"]
    assert figures["images"] == 50
    assert figures["macs"]["left"] < 0.11 * figures["macs"]["dense"]
    assert figures["engines"][0]["file_bytes"] == file.stat().st_size
    for row in figures["engines"]:
        assert [(times["threads"], times["batch"], times["calls"]) for times in row["times"]] == [(1, 1, 2), (1, 3, 2)]
        assert row["difference"] < (1e-5 if row["precision"] == "float32" else 0.3)
    assert len(figures["verdict"]) == 2


def test_engines_that_are_missing_are_left_out(file, in_threads, monkeypatch):
    monkeypatch.setattr(inputs, "find_spec", lambda name: None)
    figures = run(bench.BenchRequest(file=file, threads=(1,), batches=(1,), reps=1))
    assert [row["engine"] for row in figures["engines"]] == ["atmc", "PyTorch", "PyTorch, channels_last"]
    assert set(figures["left_out"]) == {kind.name for kind in KINDS[3:] if kind.form != worker.PLAIN}
    assert figures["left_out"]["ONNX Runtime"] == "not installed: onnx, onnxruntime; pip install 'atmc[bench]'"


def test_a_model_that_the_graph_does_not_hold(in_threads, tmp_path, monkeypatch):
    (tmp_path / "bench_models.py").write_text(GROUPED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    atmc.save(atmc.models.build("bench_models:build", 10, seed=0), "model.atmc", input_shape=(1, 28, 28))
    request = bench.BenchRequest(
        file=Path("model.atmc"), model="bench_models:build", threads=(1,), batches=(1,), reps=1, n=5
    )
    figures = run(request)
    assert [row["engine"] for row in figures["engines"]] == ["PyTorch", "PyTorch, channels_last"]
    assert figures["left_out"]["atmc"].startswith("cannot run it: aten.group_norm of layer 1 is not supported")
    assert figures["left_out"]["ONNX Runtime"].startswith("no ONNX model of it: aten.group_norm")
    assert figures["macs"] is None
    assert "atmc cannot run the model; the fastest is PyTorch" in figures["verdict"][0]
    console = Console(file=StringIO(), width=120)
    console.print(*bench_tables(figures))
    assert "left out: atmc: cannot run it" in console.file.getvalue()


def test_an_engine_that_fails_is_left_out_but_not_ours(file, in_threads, monkeypatch):
    def failing(name):
        def load(files, threads):
            raise RuntimeError("no such kernel") if files.factory is None else ValueError("no such network")

        kinds = tuple(replace(kind, load=load) if kind.name == name else kind for kind in KINDS[:3])
        for module in (bench, inputs, worker):
            monkeypatch.setattr(module, "KINDS", kinds)
        return bench.BenchRequest(file=file, threads=(1, 2), batches=(1,), reps=1)

    figures = run(failing("PyTorch"))
    assert figures["left_out"] == {"PyTorch": "failed: ValueError: no such network"}
    assert [row["engine"] for row in figures["engines"]] == ["atmc", "PyTorch, channels_last"]
    assert "difference" not in figures["engines"][0]
    with pytest.raises(RuntimeError, match="the engine failed: ValueError: no such network"):
        run(failing("atmc"))


def test_the_command_prints_its_tables(file, monkeypatch, capsys):
    for module in (bench, inputs):
        monkeypatch.setattr(module, "KINDS", KINDS[:1])
    monkeypatch.setattr("sys.argv", ["atmc", "bench", str(file), "--batch", "1", "--threads", "1", "--reps", "1"])
    with pytest.raises(SystemExit) as status:
        main()
    printed = " ".join(capsys.readouterr().out.split())
    assert status.value.code == 0
    assert "atmc runs sparse (" in printed
    assert "nothing to compare it with" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reps", "0"], "expected reps >= 1, got 0"),
        (["--batch", "1,0"], "expected batch >= 1, got 1,0"),
        (["--threads", "two"], "expected --threads as numbers separated by commas, got 'two'"),
        (["--n", "0"], "expected n >= 1, got 0"),
        (["--json", "no/such.json"], "there is no folder no to write such.json into"),
        (["--json", "there.json"], "there.json exists: add --overwrite to replace it"),
    ],
)
def test_wrong_input_is_one_sentence(file, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(file.parent)
    Path("there.json").touch()
    monkeypatch.setattr("sys.argv", ["atmc", "bench", str(file), *arguments])
    with pytest.raises(SystemExit) as status:
        main()
    assert status.value.code == 2
    assert capsys.readouterr().err == f"atmc: {message}\n"
