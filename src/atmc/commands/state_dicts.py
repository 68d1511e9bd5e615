"""Read other people's checkpoints: find the state dict in a file, and the names in it that are a model's.

Checkpoints come from training scripts, Lightning, timm, DataParallel, `torch.compile`, averaging: the state dict lies
under some key, beside an epoch and an optimizer, and its names carry prefixes. No file is unpickled.
"""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import types
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from atmc.core.errors import did_you_mean

KEYS = (  # of the state dict in a file, in this order: averaged weights are those that a training script evaluates
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema", "averaged_model"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params"),
)
UNREADABLE = (  # the errors of torch.load on bytes that are no checkpoint
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    struct.error,
)
_SCALAR_NAMES = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # of numpy 1 and 2
HARMLESS: list[Any] = [  # what training scripts keep beside the weights; making such an object runs no code of the file
    *(argparse.Namespace, types.SimpleNamespace),
    *(np.dtype, *(type(np.dtype(name)) for name in ("bool", "int64", "float32", "float64"))),
    *((scalar, name) for scalar in [np.float64(0).__reduce__()[0]] for name in _SCALAR_NAMES),
]
COUNTERS = ("num_batches_tracked", "n_averaged")  # of batch norm and of AveragedModel: no output depends on them
SHOWN = 3  # names in an error


def read_state_dict(path: str) -> dict[str, Any]:
    """Return the state dict of a .safetensors, .safetensors.index.json or torch file, on the CPU.

    Raises:
        ValueError: the file is damaged, is something else, or holds no state dict.
    """
    _refuse_texts(path)
    if path.endswith(".safetensors"):
        return _read_safetensors(path)
    if path.endswith(".json"):
        return _read_shards(path)
    return _read_torch_file(path)


def fit_names(state: Mapping[str, Any], model: nn.Module, path: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict under the names of a model, in the model's number types.

    Prefixes such as ``module.`` or ``_orig_mod.`` are removed if that makes names fit. Counters that no output depends
    on may be missing, and normalization that the checkpoint does not hold stays the model's own.

    Args:
        path: of the file, for errors.

    Raises:
        ValueError: names or shapes differ, or a tensor holds no real numbers that are finite.
    """
    own = model.state_dict()
    renamed = _remove_prefix(state, own)
    for name, value in own.items():
        if name not in renamed and (name.startswith("normalize.") or name.rpartition(".")[2] in COUNTERS):
            renamed[name] = value
    missing = [name for name in own if name not in renamed]
    unknown = [name for name in renamed if name not in own and name.rpartition(".")[2] not in COUNTERS]
    shapes = [
        f"{name} has shape {tuple(renamed[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in renamed and renamed[name].shape != value.shape
    ]
    if missing or unknown:
        parts = [f"{len(missing)} of the model's {len(own)} tensors are not there: {_some(missing)}"] if missing else []
        parts += [f"{len(unknown)} of the file's are not the model's: {_some(unknown)}"] if unknown else []
        hint = did_you_mean(missing[0], unknown) if missing else ""
        raise ValueError(f"checkpoint {path} is of another model: {'; '.join(parts)}{hint}")
    if shapes:
        more = f", and {len(shapes) - SHOWN} more" if len(shapes) > SHOWN else ""
        raise ValueError(f"checkpoint {path} is of another model: {'; '.join(shapes[:SHOWN])}{more}")
    return {name: _as_type(name, renamed[name], value.dtype, path) for name, value in own.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _remove_prefix(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Remove the prefix that makes most names fit: whole words before a dot, the shortest of equal ones.

    Names without it are of other parts of a training script, such as a loss with weights, and are left out.
    """
    fitting = Counter({"": 0})
    for name in state:
        words = name.split(".")
        for count in range(len(words)):
            fitting[".".join([*words[:count], ""])] += ".".join(words[count:]) in own
    best = max(sorted(fitting, key=len), key=fitting.__getitem__)
    return {name.removeprefix(best): value for name, value in state.items() if name.startswith(best)}


def _as_type(name: str, value: Tensor, dtype: torch.dtype, path: str) -> Tensor:
    """Return a tensor as ordinary numbers of a type; raise ValueError if they do not mean the same there."""
    if value.is_quantized or value.layout != torch.strided:
        kind = "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        raise ValueError(f"checkpoint {path}: {name} is {kind}: make it an ordinary, dense tensor first")
    if dtype.is_floating_point and not value.is_floating_point():
        raise ValueError(f"checkpoint {path}: {name} holds {value.dtype}, no weights; convert it to float32 first")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise ValueError(f"checkpoint {path}: {name} holds nan or infinity")
    return value.to(dtype)


def _refuse_texts(path: str) -> None:
    """Raise ValueError for what a failed download leaves in place of a file."""
    with open(path, "rb") as file:
        head = file.read(200).lstrip()
    if not head:
        raise ValueError(f"checkpoint {path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"checkpoint {path} is a pointer of git-lfs: fetch the file itself (git lfs pull)")
    if head[:1] == b"<":
        raise ValueError(f"checkpoint {path} is a page of HTML or XML: the download failed")


def _read_safetensors(path: str) -> dict[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} is damaged or not a safetensors file: {error}") from error


def _read_shards(path: str) -> dict[str, Any]:
    """Read a state dict that lies in several safetensors files, by its index."""
    try:
        names = sorted(set(json.loads(Path(path).read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"checkpoint {path} is no index of safetensors files: it has no weight_map") from error
    state: dict[str, Any] = {}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"checkpoint {path} names a file in another folder: {name}")
        if not Path(path).with_name(name).is_file():
            raise ValueError(f"checkpoint {path} needs the file {name}, which is missing")
        state |= _read_safetensors(str(Path(path).with_name(name)))
    return state


def _read_torch_file(path: str) -> dict[str, Any]:
    """Return the state dict of a .pt file, as it is or under a usual key."""
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols of pickle
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ValueError(
                f"checkpoint {path} holds more than weights, and loading it would run code of the file: where you "
                "trust it, keep the weights alone, torch.save(model.state_dict(), ...)"
            ) from error
        raise ValueError(f"checkpoint {path} is damaged or no file of torch.save: {reason}") from error
    found = _find_state_dict(loaded)
    if found is None:
        kind = f"keys {_some(list(map(str, loaded)))}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise ValueError(f"checkpoint {path} holds no state dict of tensors, but {kind}")
    return found


def _find_state_dict(loaded: Any) -> dict[str, Any] | None:
    """Return the dict of tensors in what a file holds: itself, or what is under a usual key, however deep."""
    if not isinstance(loaded, Mapping) or not loaded:
        return None
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()):
        return dict(loaded)
    inner = (_find_state_dict(loaded[key]) for key in KEYS if key in loaded)
    return next((state for state in inner if state is not None), None)
