"""Checkpoints as training scripts, libraries and failed downloads leave them."""

import argparse
import json
import pickle
import types
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from atmc import models
from atmc.commands.checkpoints import load_weights


def build(seed=0):
    return models.build("resnet18", 10, input_shape=(3, 32, 32), seed=seed)


@pytest.fixture(scope="module")
def state():
    return build(seed=5).state_dict()


def prefixed(prefix):
    return lambda state: {prefix + name: value for name, value in state.items()}


ACCEPTED = {
    "plain": lambda state: state,
    "DataParallel": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "Lightning": lambda state: {"state_dict": prefixed("model.")(state), "epoch": 3, "global_step": 7},
    "a metric beside the model": lambda state: {"state_dict": prefixed("net.")(state) | {"loss.weight": torch.ones(3)}},
    "model_state_dict": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}, "epoch": 3},
    "nested": lambda state: {"model": {"state_dict": state}},
    "timm": lambda state: {"arch": "resnet18", "state_dict": state, "version": 2, "metric": 0.5},
    "averaged alone": lambda state: {"model_ema": state},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(5), **prefixed("module.")(state)},
    "before torch 0.4.1": lambda state: {k: v for k, v in state.items() if "num_batches_tracked" not in k},
    "a namespace": lambda state: {"state_dict": state, "args": argparse.Namespace(lr=0.1, names=["a"])},
    "a simple namespace": lambda state: {"state_dict": state, "args": types.SimpleNamespace(lr=0.1)},
    "numbers of numpy": lambda state: {"state_dict": state, "best": np.float64(0.9), "epoch": np.int64(3)},
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    "double": lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
def test_weights_are_found(tmp_path, state, change):
    torch.save(change(state), tmp_path / "a.pt")
    model = build()
    load_weights(model, str(tmp_path / "a.pt"))
    own = model.state_dict()
    counted = [name for name in state if "num_batches" not in name]
    assert all(torch.allclose(own[name], state[name], rtol=1e-3, atol=1e-6) for name in counted)
    assert {value.dtype for value in own.values()} == {torch.float32, torch.int64}


def test_averaged_weights_come_first(tmp_path, state):
    torch.save({"state_dict": build(seed=1).state_dict(), "model_ema": state}, tmp_path / "a.pt")
    model = build()
    load_weights(model, str(tmp_path / "a.pt"))
    assert torch.equal(model.state_dict()["linear.weight"], state["linear.weight"])


def test_files_of_safetensors(tmp_path, state):
    names = list(state)
    for number, part in enumerate([names[:50], names[50:]]):
        save_file({f"module.{name}": state[name] for name in part}, tmp_path / f"part-{number}.safetensors")
    index = {"weight_map": {f"module.{name}": f"part-{int(i >= 50)}.safetensors" for i, name in enumerate(names)}}
    (tmp_path / "a.safetensors.index.json").write_text(json.dumps(index))
    model = build()
    load_weights(model, str(tmp_path / "a.safetensors.index.json"))
    assert torch.equal(model.state_dict()["linear.weight"], state["linear.weight"])
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"needs the file part-1\.safetensors, which is missing"):
        load_weights(model, str(tmp_path / "a.safetensors.index.json"))
    (tmp_path / "b.json").write_text(json.dumps({"weight_map": {"a": "../part-0.safetensors"}}))
    with pytest.raises(ValueError, match="names a file in another folder"):
        load_weights(model, str(tmp_path / "b.json"))


class Evil:
    def __reduce__(self):
        return print, ("this code was run",)


def replaced(value):
    return lambda state: {name: value(own) if name == "linear.weight" else own for name, own in state.items()}


def quantized(value):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(value, 0.01, 0, torch.qint8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (replaced(lambda v: (v * 127).to(torch.int8)), "linear.weight holds torch.int8, no weights"),
        (replaced(lambda v: v > 0), "linear.weight holds torch.bool, no weights"),
        (replaced(lambda v: v.to(torch.complex64)), "linear.weight holds torch.complex64, no weights"),
        (replaced(quantized), "linear.weight is quantized: make it an ordinary, dense tensor"),
        (replaced(torch.Tensor.to_sparse), "linear.weight is sparse_coo: make it an ordinary, dense tensor"),
        (replaced(lambda v: v * float("nan")), "linear.weight holds nan or infinity"),
        (replaced(lambda v: v[:7]), r"linear.weight has shape \(7, 512\), not \(10, 512\)"),
        (
            lambda s: {k: v for k, v in s.items() if "linear" not in k},
            r"2 of the model's \d+ tensors are not there",
        ),
        (
            lambda s: {k.replace("linear", "linears"): v for k, v in s.items()},
            r"linears\.bias; did you mean 'linears.weight'",
        ),
        (lambda s: {"state_dict": s, "hook": Evil()}, "holds more than weights, and loading it would run code"),
        (lambda s: nn.Linear(2, 2), "holds more than weights, and loading it would run code"),
        (lambda s: {"epoch": 3, "lr": 0.1}, "holds no state dict of tensors, but keys epoch, lr"),
        (lambda s: torch.ones(3), "holds no state dict of tensors, but a Tensor"),
    ],
)
def test_what_is_refused_and_why(tmp_path, state, change, sentence, capsys):
    torch.save(change(state), tmp_path / "a.pt")
    before = build().state_dict()
    model = build()
    with pytest.raises(ValueError, match=sentence):
        load_weights(model, str(tmp_path / "a.pt"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of git-lfs"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of git-lfs"),
        ("a.pt", b"\n<!DOCTYPE html><html>", "is a page of HTML"),
        ("a.pth", b"", "is empty"),
        ("a.pt", pickle.dumps({"a": 1}), "damaged or no file of torch.save|no state dict"),
        ("a.json", b"{}", "is no index of safetensors files"),
        ("a.json", b"[1", "is no index of safetensors files"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=sentence):
        load_weights(build(), str(tmp_path / name))


def test_a_file_that_is_cut_off(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"damaged or no file of torch\.save"):
        load_weights(build(), str(tmp_path / "a.pt"))
